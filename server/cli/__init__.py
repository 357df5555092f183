"""The command line. Translates flags to settings and results to the terminal; nobody imports it.

Long commands show progress on standard error; with ``--json`` they print one JSON object a result on standard output
and nothing else there.
"""

from __future__ import annotations

import os

import typer

from server.cli import bench, bench_grouping, bench_serve, checks, experiment, models, serving, training

app = typer.Typer(name="motserve", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for part in (serving, training, models, experiment, checks, bench):
    app.add_typer(part.app)
bench.bench.command("serve")(bench_serve.serve)
bench.bench.command("grouping")(bench_grouping.grouping)


# Of GNU's OpenMP, which torch's own loops on CPUs run in: how often a thread that waits for others looks before it
# sleeps. Its own default is milliseconds, in which the threads that are waited for may lack the core that is looked on
# from: beside other work, an event loop included, decoding took many times as long before the kernels had threads of
# their own, and without them still does.
_LOOKS = "10000"


def main() -> None:
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _LOOKS)  # before torch is imported
    app()
