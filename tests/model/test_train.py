"""Training: exact resume, killed runs, schedules, and both objectives against their plain forms."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model.attention import attend_whole_sequences
from model.checkpoint import load_model
from model.config import ModelConfig
from model.errors import TrainingError
from model.joint import JointSequences, joint_losses
from model.mixing import WholeSequences
from model.optimizer import Muon
from model.recipe import TrainSettings, preset_named
from model.train import Trainer
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2, group_size=4, n_expert=6, expert_size=8
)
SETTINGS = TrainSettings(steps=8, batch=8, length=16, warmup=2, learning_rate=1e-2, save_every=4, anneal_from=0.5)
STREAM = np.random.default_rng(0).integers(0, 60, 2000).astype(np.uint16)
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "joint": {"joint_copies": 3, "optimizer": "muon"},
}


def _trainer(folder: Path, **changes: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(CONFIG, dataclasses.replace(SETTINGS, **changes), STREAM, folder)


def _log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stopped_after", [4, 6])  # at a saved state, and beyond one
def test_a_resumed_run_is_the_same_to_the_last_digit(kind: str, stopped_after: int, tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole", **KINDS[kind])
    assert len(list(whole.run())) == 8
    first = _trainer(tmp_path / "parts", **KINDS[kind])
    steps = first.run()
    for _ in range(stopped_after):
        next(steps)
    steps.close()
    second = _trainer(tmp_path / "parts", **KINDS[kind])
    assert second.resume() and second.step == 4
    assert len(list(second.run())) == 4
    assert _log(tmp_path / "parts") == _log(tmp_path / "whole")
    parts, expected = _weights(tmp_path / "parts"), _weights(tmp_path / "whole")
    assert all(torch.equal(parts[name], expected[name]) for name in expected)


def test_training_learns_and_anneals(tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, dataclasses.replace(SETTINGS, steps=60), np.arange(2000) % 60, tmp_path)
    steps = list(trainer.run())
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert steps[0].temperature == 1 and steps[-1].temperature == pytest.approx(0.1)
    assert load_model(tmp_path).config.temperature == pytest.approx(0.1)


def test_another_runs_state_is_refused(tmp_path: Path) -> None:
    list(_trainer(tmp_path).run())
    with pytest.raises(TrainingError, match="another learning_rate"):
        _trainer(tmp_path, learning_rate=1.0).resume()


def test_half_a_log_line_is_cut(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    list(trainer.run())
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "los')
    again = _trainer(tmp_path)
    assert again.resume()
    assert list(again.run()) == []
    assert len(_log(tmp_path)) == 8


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_state(tmp_path: Path) -> None:
    """kill -9 at many moments; what comes out in the end is what an undisturbed run makes."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n} boats went out at {n * 7 % 11} and came home." for n in range(900)))

    def command(folder: Path) -> list[str]:
        arguments = [
            "train",
            str(folder),
            "--data",
            str(text),
            "--preset",
            "tiny",
            "--steps",
            "30",
            "--save-every",
            "1",
        ]
        return [sys.executable, "-c", "from server.cli import main; main()", *arguments]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    kills = 0
    for delay in (0.1, 0.3, 0.05, 0.7, 0.2, 0.45):
        process = subprocess.Popen(command(tmp_path / "killed"), stderr=subprocess.DEVNULL)
        before = _states(tmp_path / "killed")
        while process.poll() is None and _states(tmp_path / "killed") == before:
            time.sleep(0.01)  # the first new state is there: training has begun
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True)
    killed, whole = _weights(tmp_path / "killed"), _weights(tmp_path / "whole")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert _log(tmp_path / "killed") == _log(tmp_path / "whole")


def _states(folder: Path) -> int:
    state = folder / "state.pt"
    return state.stat().st_mtime_ns if state.exists() else 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch": 6}, "group_size"),
        ({"length": 17}, "n_positions"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup": 9}, "warmup"),
        ({"anneal_from": 1.5}, "anneal_from"),
        ({"final_temperature": 2.0}, "final_temperature"),
        ({"joint_copies": 9}, "joint_copies"),
        ({"joint_distill": 2.0}, "joint_distill"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"save_every": 0}, "save_every"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=named):
        _trainer(tmp_path, **changes)


def test_presets() -> None:
    assert preset_named("tiny", {"steps": 5})[1].steps == 5
    with pytest.raises(TrainingError, match="preset"):
        preset_named("huge", {})


@given(st.integers(1, 500), st.integers(0, 100), st.floats(0, 1), st.floats(0.01, 1))
def test_schedules(steps: int, warmup: int, anneal_from: float, final: float) -> None:
    settings = TrainSettings(
        steps=steps, warmup=min(warmup, steps), anneal_from=anneal_from, final_temperature=final, batch=4, length=8
    )
    rates = [settings.rate(step) for step in range(steps)]
    temperatures = [settings.temperatures(step, 1.0, 1)[0] for step in range(steps + 1)]
    assert all(0 < rate <= settings.learning_rate * (1 + 1e-9) for rate in rates)
    after = rates[settings.warmup :]
    assert all(one >= other for one, other in itertools.pairwise(after))
    assert all(one >= other for one, other in itertools.pairwise(temperatures))
    assert temperatures[0] == 1.0 and all(final * (1 - 1e-9) <= t <= 1 for t in temperatures)
    if anneal_from < 0.999:
        assert temperatures[-1] == pytest.approx(final)


def _joint_by_hand(model: Transformer, ids: torch.Tensor, copies: int, temperature: float) -> torch.Tensor:
    """Logits of the copies, token by token: a copy's group is itself alone, and an expert is its own when it beats
    every rival of the mixed group at that place."""
    batch, length = ids.shape
    mixed: list[torch.Tensor] = []

    def record(layer: int, bank: Any, x: torch.Tensor) -> torch.Tensor:
        mixed.append(x)
        return WholeSequences(CONFIG, batch, temperature=temperature)(layer, bank, x)

    def unmixed(layer: int, bank: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        size = CONFIG.group_size
        for copy in range(copies):
            first = copy // size * size
            rivals = [other for other in range(first, first + size) if other != copy]
            for place in range(length):
                row = x[copy * length + place]
                scores = row @ bank.controller
                others = torch.stack([mixed[layer][other * length + place] @ bank.controller for other in rivals])
                for expert in (scores > others.amax(0)).nonzero().flatten().tolist():
                    hidden = bank.activation(row @ bank.lin1[expert])
                    out[copy * length + place] += hidden @ bank.lin2[expert]
        return out

    positions = torch.arange(length)
    model(
        ids.reshape(-1), positions.repeat(batch),
        lambda _, qkv: attend_whole_sequences(qkv, batch, CONFIG.n_head), record,
    )  # fmt: skip
    hidden = model(
        ids[:copies].reshape(-1), positions.repeat(copies),
        lambda _, qkv: attend_whole_sequences(qkv, copies, CONFIG.n_head), unmixed,
    )  # fmt: skip
    return model.logits(hidden)


def test_joint_copies_decode_as_by_hand() -> None:
    model = Transformer(CONFIG)
    model.initialize(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    ids = torch.from_numpy(STREAM[: 8 * 10].astype(np.int64)).view(8, 10)
    copies = 3
    mix = JointSequences(CONFIG, 8, copies, temperature=0.5)
    both = torch.cat((ids, ids[:copies]))
    with torch.no_grad():
        hidden = model(
            both.reshape(-1), torch.arange(10).repeat(11),
            lambda _, qkv: attend_whole_sequences(qkv, 11, CONFIG.n_head), mix,
        )  # fmt: skip
        found = model.logits(hidden)[8 * 10 :]
        expected = _joint_by_hand(model, ids, copies, 0.5)
        plain = model.logits(
            model(
                ids.reshape(-1),
                torch.arange(10).repeat(8),
                lambda _, qkv: attend_whole_sequences(qkv, 8, CONFIG.n_head),
                WholeSequences(CONFIG, 8, temperature=0.5),
            )
        )
        together = model.logits(hidden)[: 8 * 10]
    torch.testing.assert_close(together, plain, atol=1e-4, rtol=1e-4)
    same = (found - expected).abs().amax(1) < 1e-4
    assert same.float().mean() > 0.9  # the weakest of very many wins of one expert are dropped


def test_the_joint_losses_against_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator)  # 3 mixed, 2 copies of the first two
    targets = torch.randint(0, 11, (3, 7), generator=generator)
    loss, private, learnt = joint_losses(logits, targets, 2, distill=0.25)
    mixed = F.cross_entropy(logits[:3].reshape(-1, 11), targets.reshape(-1))
    copied = logits[3:].log_softmax(-1)
    teacher = logits[:2].softmax(-1)
    hard = -copied.gather(-1, targets[:2, :, None]).mean()
    soft = -(teacher * copied).sum(-1).mean()
    torch.testing.assert_close((loss, private, learnt), (mixed, hard, 0.75 * hard + 0.25 * soft))


def test_muon_steps_by_nearly_orthogonal_matrices() -> None:
    parameter = torch.nn.Parameter(torch.zeros(6, 10))
    parameter.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    Muon([parameter], lr=0.1, weight_decay=0.0).step()
    singular = torch.linalg.svdvals(parameter.detach())
    assert singular.max() / singular.min() < 2  # of the gradient itself it is much more
    assert torch.linalg.svdvals(parameter.grad).max() / torch.linalg.svdvals(parameter.grad).min() > 2
