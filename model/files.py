"""Files that appear whole or not at all, whenever the process is killed. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    os.replace(partial, path)


def write_json(path: Path, values: object) -> None:
    """Indented, whole or not at all. Raises OSError."""
    with whole(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")
