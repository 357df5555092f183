"""``motserve experiment``: files, standard output, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from model.experiments.experiments import EXPERIMENTS
from server.cli import app
from server.experiment_plots import _PANELS

TEXT = "\n\n".join(f"The {n} boats went out at {n * 7 % 11} and came home in the rain." for n in range(900))


def invoke(folder: Path, name: str, *more: object) -> Result:
    arguments = ("experiment", name, "--data", folder / "text.txt", "--validation", folder / "text.txt")
    return CliRunner().invoke(app, [*map(str, arguments), "--scale", "tiny", "--seeds", "1", *map(str, more)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_all_experiments_write_a_file_and_a_picture_each(folder: Path) -> None:
    found = invoke(folder, "all", "--out", folder / "out", "--json")
    assert found.exit_code == 0, found.output
    results = [json.loads(line) for line in found.stdout.splitlines()]
    assert [result["experiment"] for result in results] == [experiment.name for experiment in EXPERIMENTS]
    for result in results:
        assert json.loads((folder / "out" / f"{result['experiment']}.json").read_text()) == result
        assert (folder / "out" / f"{result['experiment']}.png").read_bytes().startswith(b"\x89PNG")
    assert set(_PANELS) == {experiment.name for experiment in EXPERIMENTS}


def test_rows_are_printed_for_people(folder: Path) -> None:
    found = invoke(folder, "group-size", "--out", folder / "out")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert len(lines) > 4 and all(line.startswith("experiment group-size  live ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("everything", "--out", "{}/out"), "everything"),
        (("steps", "--out", "{}/out", "--scale", "huge"), "huge"),
        (("steps", "--out", "{}/other", "--validation", "/nowhere"), "/nowhere"),
        (("steps", "--out", "{}/other", "--kernels", "swift"), "swift"),
        (("steps", "--out", "/dev/null/out"), "/dev/null"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: tuple[str, ...], named: str, folder: Path) -> None:
    found = invoke(folder, *(part.format(folder) for part in arguments))
    assert found.exit_code == 2
    lines = [line for line in found.stderr.splitlines() if line.startswith("motserve: ")]
    assert len(lines) == 1 and named in lines[0], found.output
    assert "Traceback" not in found.output
