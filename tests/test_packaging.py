"""What is installed is whole: the bundled checkpoint, the playground and the type markers travel with the code."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEMO = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "reference.safetensors",
    "private.json",
    "grouping.json",
    "MODEL_CARD.md",
]


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "model", "server", "clients"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert set(listed.stdout.splitlines()) <= packed
    assert {f"server/demo/{name}" for name in DEMO} <= packed
    assert {f"{package}/py.typed" for package in ("model", "server", "clients")} <= packed
