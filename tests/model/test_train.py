"""Training: exact resume, killed runs, accumulation, evaluation as it goes, and what is logged."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import load_model
from model.errors import TrainingError
from model.evaluate import Evaluator
from model.groups import Fill
from model.mixing import ExpertBank, WholeSequences, exact_products, mixing_entropy, mixing_weights
from model.recipe import preset_named
from model.tokenizer import Tokenizer
from model.train import Trainer
from tests.model.runs import CONFIG, SETTINGS, STREAM, TEXT, make_trainer, read_log, train_command, weights

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "joint": {"joint_copies": 3, "optimizer": "muon"},
    "accumulate": {"accumulate": 2, "joint_copies": 2},
    "learnable": {"temperature_mode": "learnable", "learn_temperature": "expert", "learn_from": 0.3},
    "learnable-muon": {"temperature_mode": "learnable", "optimizer": "muon", "accumulate": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stopped_after", [4, 6])  # at a saved state, and beyond one
def test_a_resumed_run_is_the_same_to_the_last_digit(kind: str, stopped_after: int, tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", **KINDS[kind])
    assert len(list(whole.run())) == 8
    first = make_trainer(tmp_path / "parts", **KINDS[kind])
    steps = first.run()
    for _ in range(stopped_after):
        next(steps)
    steps.close()
    second = make_trainer(tmp_path / "parts", **KINDS[kind])
    assert second.resume() and second.step == 4
    assert len(list(second.run())) == 4
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")
    parts, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(parts[name], expected[name]) for name in expected)


def test_training_learns_and_anneals(tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, dataclasses.replace(SETTINGS, steps=60), np.arange(2000) % 60, tmp_path)
    steps = list(trainer.run())
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert steps[0].temperature == 1 and steps[-1].temperature == pytest.approx(0.1)
    assert load_model(tmp_path).config.temperature == pytest.approx(0.1)


def test_another_runs_state_is_refused(tmp_path: Path) -> None:
    list(make_trainer(tmp_path).run())
    with pytest.raises(TrainingError, match="another learning_rate, temperature_mode;"):
        make_trainer(tmp_path, learning_rate=1.0, temperature_mode="fixed").resume()
    assert make_trainer(tmp_path, save_every=3, export_dtype="bfloat16", shard_bytes=100).resume()


def test_a_state_of_an_older_version_is_resumed(tmp_path: Path) -> None:
    """One that names none of the later settings, and no temperatures."""
    steps = make_trainer(tmp_path, anneal_from=0.6).run()
    expected = [next(steps).loss for _ in range(5)][4:]
    steps.close()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in ("accumulate", "temperature_mode", "learn_temperature", "learn_from", "temperature_rate", "eval_every"):
        del state["settings"][name]
    del state["temperatures"], state["config"]["n_shared_expert"]
    torch.save(state, tmp_path / "state.pt")
    again = make_trainer(tmp_path, anneal_from=0.6)
    assert again.resume() and again.step == 4
    assert [next(again.run()).loss] == expected


def test_half_a_log_line_is_cut(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    list(trainer.run())
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "los')
    again = make_trainer(tmp_path)
    assert again.resume()
    assert list(again.run()) == []
    assert len(read_log(tmp_path)) == 8


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature_mode": "learnable", "learn_temperature": "expert"}, {"optimizer": "muon", "batch": 24}],
)
def test_micro_batches_add_up_to_the_batch(changes: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for accumulate in (1, 2):
        trainer = make_trainer(tmp_path, **changes, accumulate=accumulate)
        figures, _ = trainer._gradients()
        found[accumulate] = (figures, [parameter.grad for parameter in trainer._parameters()])
    torch.testing.assert_close(found[2], found[1], rtol=1e-5, atol=1e-7)
    assert all(gradient.any() for gradient in found[1][1])


def test_micro_batches_learn_what_the_batch_learns(tmp_path: Path) -> None:
    whole = [step.loss for step in make_trainer(tmp_path / "whole").run()]
    split = [step.loss for step in make_trainer(tmp_path / "split", accumulate=2).run()]
    assert split == pytest.approx(whole, rel=1e-4)


def test_joint_runs_report_both_losses_apart(tmp_path: Path) -> None:
    joint, plain = make_trainer(tmp_path, joint_copies=4, joint_distill=0.0), make_trainer(tmp_path)
    with torch.no_grad():
        for bank in (*joint.model.banks, *plain.model.banks):
            bank.lin2.mul_(10)  # so that it counts what experts see
    found, alone = joint.train_step(), plain.train_step()
    assert found.loss == pytest.approx(alone.loss, rel=1e-6)  # mixed cross-entropy: copies have no part in it
    assert found.private_loss is not None and found.private_loss != pytest.approx(found.loss, rel=1e-3)
    assert found.joint_loss == pytest.approx(found.loss + SETTINGS.joint_weight * found.private_loss, rel=1e-5)
    assert alone.joint_loss is None and alone.private_loss is None
    assert found.gradient_norm > 0 and found.balance == 0


def test_the_mixing_entropy_is_that_of_the_steps_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, accumulate=2, optimizer="muon")
    with torch.no_grad():
        for bank in trainer.model.banks:
            bank.controller.mul_(50)
    seen: list[float] = []
    batch = WholeSequences(CONFIG, 8)

    def mix(layer: int, bank: ExpertBank, x: torch.Tensor) -> torch.Tensor:
        scores = exact_products(x, bank.controller).view(2, 4, 16, -1).transpose(1, 2).flatten(0, 1)  # [32, G, E]
        merge, _ = mixing_weights(scores, 1.0, over_experts=False, discrete=False)
        seen.append(float(mixing_entropy(merge).mean()))
        return batch(layer, bank, x)

    ids = trainer.sampler.batch(0)[:, :-1]
    from model.attention import attend_whole_sequences

    with torch.no_grad():
        trainer.model(
            ids.reshape(-1), torch.arange(16).repeat(8), lambda _, qkv: attend_whole_sequences(qkv, 8, 2), mix
        )
    found = trainer.train_step().mixing_entropy
    assert found == pytest.approx(sum(seen) / 2, rel=1e-5) and found is not None and found < 0.95
    dense = make_trainer(tmp_path, CONFIG.replace(model_type="gpt2"))
    assert dense.train_step().mixing_entropy is None


@pytest.mark.parametrize("mode", ["scheduled", "learnable"])
def test_evaluation_is_that_of_the_checkpoint(mode: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    config, settings = preset_named("tiny", {
        "steps": 5, "eval_every": 2, "eval_windows": 6, "temperature_mode": mode, "export_dtype": "float32",
    })  # fmt: skip
    trainer = Trainer.prepare(config, settings, [text], tmp_path, validation=text)
    assert trainer.validation is not None and len(trainer.validation.windows) == 8  # full groups
    list(trainer.run())
    logged = {line["step"]: line["validation_perplexity"] for line in read_log(tmp_path)}
    assert [step for step, value in logged.items() if value is not None] == [2, 4, 5]
    model, tokenizer = load_model(tmp_path), Tokenizer.load(tmp_path)
    evaluator = Evaluator(model, trainer.validation.windows, Fill("none", None), tokenizer)
    found = evaluator.run("mixed", temperature=0, skip_below=0)
    assert found.perplexity == pytest.approx(logged[5], rel=1e-5) != logged[2]
    assert found.bits_per_byte == pytest.approx(read_log(tmp_path)[-1]["validation_bits_per_byte"], rel=1e-5)


def test_too_little_held_out_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text(TEXT[:500])
    config, settings = preset_named("tiny", {})
    with pytest.raises(TrainingError, match="validation"):
        Trainer.prepare(config, settings, [tmp_path / "text.txt"], tmp_path, validation=tmp_path / "short.txt")


def test_the_checkpoint_is_written_in_shards(tmp_path: Path) -> None:
    list(make_trainer(tmp_path / "one").run())
    list(make_trainer(tmp_path / "many", shard_bytes=3000).run())
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    many, one = weights(tmp_path / "many"), weights(tmp_path / "one")
    assert many.keys() == one.keys() and all(torch.equal(many[name], one[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (),
        (
            "--accumulate", "2", "--optimizer", "muon", "--temperature-mode", "learnable", "--learn-temperature",
            "expert", "--learn-from", "0.2", "--joint-copies", "2",
        ),
    ],
)  # fmt: skip
def test_a_killed_run_goes_on_from_its_last_state(flags: tuple[str, ...], tmp_path: Path) -> None:
    """kill -9 at many moments; what comes out in the end is what an undisturbed run makes."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    subprocess.run(train_command(whole, text, *flags), check=True, capture_output=True)
    kills = 0
    for delay in (0.1, 0.3, 0.05, 0.7, 0.2, 0.45):
        process = subprocess.Popen(train_command(killed, text, *flags), stderr=subprocess.DEVNULL)
        before = _states(killed)
        while process.poll() is None and _states(killed) == before:
            time.sleep(0.01)  # the first new state is there: training has begun
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    subprocess.run(train_command(killed, text, *flags), check=True, capture_output=True)
    found, expected = weights(killed), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_log(killed) == read_log(whole)


def _states(folder: Path) -> int:
    state = folder / "state.pt"
    return state.stat().st_mtime_ns if state.exists() else 0


@pytest.mark.cuda
@pytest.mark.parametrize("changes", [{}, {"joint_copies": 4, "temperature_mode": "learnable"}, {"compile": True}])
def test_cuda_learns_what_the_cpu_learns(changes: dict[str, Any], tmp_path: Path) -> None:
    from model.workers import Workers, resolve_device

    settings = dataclasses.replace(SETTINGS, **changes)
    losses = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        folder.mkdir()
        trainer = Trainer(CONFIG, settings, STREAM, folder, workers=Workers(device=resolve_device(device)))
        losses[device] = [step.loss for step in trainer.run()]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    assert make_trainer(tmp_path / "cuda", **changes).resume()  # what CUDA saved goes on on the CPU
