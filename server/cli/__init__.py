"""The command line. Translates flags to settings and results to the terminal; nobody imports it.

Long commands show progress on standard error; with ``--json`` they print one JSON object a result on standard output
and nothing else there.
"""

from __future__ import annotations

import typer

from server.cli import bench, bench_grouping, checks, experiment, models, serving, training

app = typer.Typer(name="motserve", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for part in (serving, training, models, experiment, checks, bench):
    app.add_typer(part.app)
bench.bench.command("grouping")(bench_grouping.grouping)


def main() -> None:
    app()
