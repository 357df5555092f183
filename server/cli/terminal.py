"""What the commands share: errors in one line, progress, results. Knows no command."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from model.errors import CheckpointError, TrainingError

ModelOption = Annotated[Path | None, typer.Option("--model", help="Checkpoint folder; default: the bundled one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a result on standard output.")]


def fail(message: str) -> NoReturn:
    print(f"motserve: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What the user can mend is said in one line, without a traceback."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        fail(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
    except (CheckpointError, TrainingError, ValueError, OSError) as error:
        fail(str(error))


@contextlib.contextmanager
def progress(label: str, *, shown: bool = True) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not shown, refresh_per_second=2
    ) as bar:
        yield bar, bar.add_task(label, total=1.0, note="")


def print_result(values: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values), flush=True)
        return
    parts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
    print("  ".join(parts), flush=True)
