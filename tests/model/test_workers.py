"""Several processes train what one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.errors import TrainingError
from model.workers import Workers, joined, resolve_device
from tests.model.runs import TEXT, read_log, train_command, weights


def test_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as workers:
        assert workers == Workers() and workers.is_first
        workers.wait()
        values = torch.tensor([1.0, 2.0])
        workers.average([values])
        assert values.tolist() == [1, 2]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"device.*tpu"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(TrainingError, match=r"device.*CUDA"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == torch.device("cuda", 1) and resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TrainingError, match="2 CUDA devices"):
        resolve_device("cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optimizer", "muon", "--temperature-mode", "learnable", "--joint-copies", "2", "--compile"),
        ("--feed-forward", "dense", "--batch", "6"),
    ],
)  # fmt: skip
def test_two_processes_train_what_one_does(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The same batches, in two processes and in two micro-batches of one."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    flags = (*flags, "--device", "cpu", "--validation", str(text), "--eval-every", "10", "--eval-windows", "8")
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(train_command(one, text, "--accumulate", "2", *flags), check=True, capture_output=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, *train_command(two, text, *flags, "--json")[1:]]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 30  # the first process alone speaks
    found, expected = read_log(two), read_log(one)
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(1, 31))
    for name in ("loss", "gradient_norm", "temperature", "mixing_entropy", "validation_perplexity"):
        for line, other in zip(found, expected, strict=True):
            assert line[name] is other[name] is None or line[name] == pytest.approx(other[name], rel=1e-4)
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    ours, theirs = weights(two), weights(one)
    assert all((ours[name] - theirs[name]).abs().max() < 0.02 for name in theirs)


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, *train_command(tmp_path / "run", text, "--batch", "4")[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "group_size (4) times accumulate (1) times processes (2)" in done.stderr
