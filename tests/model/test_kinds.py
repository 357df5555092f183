"""Every kind of feed-forward layer: sizes at equal FLOPs, files, training, evaluation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.calibrate import record_crowd
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.errors import CheckpointError, TrainingError
from model.evaluate import Evaluator, modes_of, windows_of
from model.groups import Fill
from model.kinds import FEED_FORWARDS, flop_matched
from model.recipe import TrainSettings, preset_named
from model.train import Trainer
from model.transformer import Transformer
from tests.model.checkpoints import WEIGHTS, edit, edit_config
from tests.model.kinds import EXPERT_CHOICE, KINDS, MOT, SWITCH, TOKEN_CHOICE, TOP_K, make, trainers_logits

kinds = pytest.mark.parametrize("name", KINDS)


# Equal FLOPs


def _products(model: Transformer, config: ModelConfig) -> float:
    """Multiplications a token in the first feed-forward layer's matrices, counted from its tensors."""
    weights = dict(model.h[0].mlp.named_parameters())
    if "c_fc.weight" in weights:
        return weights["c_fc.weight"].numel() + weights["c_proj.weight"].numel()
    lin1, lin2 = weights["lin1"], weights["lin2"]
    one = lin1[0].numel() + lin2[0].numel()
    if config.is_grouped:
        return len(lin1) * one / config.group_size
    routed = weights["controller"].shape[1]
    return (config.experts_per_token + len(lin1) - routed) * one


@given(
    experts=st.integers(1, 24), size=st.integers(1, 12), group=st.integers(1, 8), kind=st.sampled_from(FEED_FORWARDS)
)
def test_kinds_cost_as_much_as_the_model_they_come_from(experts: int, size: int, group: int, kind: str) -> None:
    mot = ModelConfig(
        vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=1, n_expert=experts, expert_size=size, group_size=group
    )
    try:
        config = flop_matched(mot, kind)
    except TrainingError as error:
        assert "group_size" in str(error) and kind in ("dense", "switch", "top-k")
        assert experts * size % group or experts % group or experts < 2 * group
        return
    before, after = Transformer(mot), Transformer(config)
    assert _products(after, config) == pytest.approx(_products(before, mot))
    assert config.active_hidden == pytest.approx(experts * size / group) == pytest.approx(mot.active_hidden)
    if kind != "dense":  # as many parameters too
        assert after.banks[0].lin1.numel() == before.banks[0].lin1.numel()
        assert config.expansion == pytest.approx(group)


@pytest.mark.parametrize("preset", ["demo", "tiny"])
def test_presets_have_every_kind(preset: str) -> None:
    hidden = {kind: preset_named(preset, {}, feed_forward=kind)[0].active_hidden for kind in FEED_FORWARDS}
    assert set(hidden.values()) == {{"demo": 576.0, "tiny": 64.0}[preset]}


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"feed_forward.*sparse"):
        preset_named("tiny", {}, feed_forward="sparse")


def test_a_temperature_to_anneal_is_refused_where_there_is_none() -> None:
    with pytest.raises(TrainingError, match="final_temperature"):
        preset_named("tiny", {"final_temperature": 0.1}, feed_forward="switch")


# Files


@kinds
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = make(KINDS[name])
    save_model(model, tmp_path, dtype=torch.float32, shard_bytes=20_000)
    found = load_model(tmp_path)
    # What config.json does not state, the tensors tell.
    assert dataclasses.replace(found.config, n_inner=None) == dataclasses.replace(model.config, n_inner=None)
    ids = torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(trainers_logits(found, ids), trainers_logits(model, ids))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type


@pytest.mark.parametrize("config", [SWITCH, TOP_K, EXPERT_CHOICE], ids=lambda config: config.model_type)
@pytest.mark.parametrize(
    ("tensor", "shape"),
    [("h.0.mlp.lin1", (3, 40)), ("h.1.mlp.lin1", (11, 24, 3)), ("h.0.mlp.lin2", (2, 2, 2)),
     ("h.0.mlp.controller", (24, 30))],
)  # fmt: skip
def test_a_wrong_shape_names_file_and_tensor(
    config: ModelConfig, tensor: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    save_model(make(config), tmp_path, dtype=torch.float32)
    edit(tmp_path, lambda tensors: tensors.update({f"transformer.{tensor}": torch.zeros(shape)}))
    with pytest.raises(CheckpointError) as raised:
        load_model(tmp_path)
    assert WEIGHTS in str(raised.value) and tensor in str(raised.value) and "shape" in str(raised.value)


def test_too_few_experts_are_named(tmp_path: Path) -> None:
    save_model(make(TOP_K), tmp_path, dtype=torch.float32)
    edit(tmp_path, lambda tensors: tensors.update({"transformer.h.0.mlp.lin1": torch.zeros(4, 24, 10)}))
    with pytest.raises(CheckpointError, match=r"lin1.*too few experts"):
        load_model(tmp_path)


def test_another_kinds_tensors_are_refused(tmp_path: Path) -> None:
    save_model(make(SWITCH), tmp_path, dtype=torch.float32)
    edit_config(tmp_path, model_type="gpt2")
    with pytest.raises(CheckpointError, match="c_fc"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "soft-moe"}, "model_type"),
        ({"model_type": "switch", "experts_per_token": 2}, "experts_per_token"),
        ({"model_type": "mot", "n_shared_expert": 1}, "n_shared_expert"),
        ({"model_type": "top-k", "experts_per_token": 33}, "experts_per_token"),
        ({"model_type": "top-k", "experts_per_token": 0}, "experts_per_token"),
        ({"model_type": "top-k", "experts_per_token": True}, "experts_per_token"),
        ({"model_type": "top-k", "n_shared_expert": -1}, "n_shared_expert"),
        ({"model_type": "top-k", "n_shared_expert": 1.5}, "n_shared_expert"),
        ({"model_type": "top-k", "normalize_gates": True}, "normalize_gates"),
        ({"model_type": "top-k", "normalize_gates": 1}, "normalize_gates"),
        ({"model_type": "switch", "use_discrete_routing": True}, "use_discrete_routing"),
        ({"model_type": "expert-choice", "temperature": 0.5}, "temperature"),
        ({"model_type": "expert-choice", "temperature": 0, "emit_softmax_over_experts": True}, "emit_softmax"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=named) as raised:
        ModelConfig.load(tmp_path)
    assert "config.json" in str(raised.value)


# Training


def _trainer(config: ModelConfig, folder: Path, **changes: Any) -> Trainer:
    settings = TrainSettings(steps=40, batch=8, length=16, warmup=2, learning_rate=1e-2, save_every=5)
    folder.mkdir(exist_ok=True)
    stream = np.random.default_rng(0).permutation(61)[np.arange(3000) % 61].astype(np.uint16)
    return Trainer(config, dataclasses.replace(settings, **changes), stream, folder)


@kinds
def test_training_learns_and_exports_the_same_kind(name: str, tmp_path: Path) -> None:
    steps = list(_trainer(KINDS[name], tmp_path, steps=60).run())
    assert steps[-1].loss < 0.5 * steps[0].loss
    config = load_model(tmp_path).config
    assert config.model_type == KINDS[name].model_type
    assert config.temperature == {"mot": 0.1}.get(name, KINDS[name].temperature)
    if KINDS[name].is_token_choice:
        assert all(0.8 < step.balance < KINDS[name].n_expert for step in steps)  # about 1 when even
    else:
        assert all(step.balance == 0 for step in steps)


@kinds
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_same_to_the_last_digit(name: str, optimizer: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 8, "optimizer": optimizer}
    whole = [step.loss for step in _trainer(KINDS[name], tmp_path / "whole", **changes).run()]
    first = _trainer(KINDS[name], tmp_path / "parts", **changes).run()
    for _ in range(6):
        next(first)
    first.close()
    second = _trainer(KINDS[name], tmp_path / "parts", **changes)
    assert second.resume() and [step.loss for step in second.run()] == whole[5:]


def test_the_balance_loss_balances(tmp_path: Path) -> None:
    """A router that begins at one expert is spread by a large weight and not by none."""

    def last_balance(weight: float) -> float:
        trainer = _trainer(SWITCH, tmp_path / str(weight), steps=30, balance_weight=weight, capacity_factor=9.0)
        with torch.no_grad():
            for bank in trainer.model.banks:
                bank.controller[:, 0] += 0.05
            trainer.model.h[0].ln_2.bias.fill_(1.0)
            trainer.model.h[1].ln_2.bias.fill_(1.0)
        steps = list(trainer.run())
        assert steps[0].balance > 1.3
        return steps[-1].balance

    assert last_balance(1.0) < 1.2 < last_balance(0.0)


def test_a_state_of_before_a_setting_existed_is_resumed(tmp_path: Path) -> None:
    steps = _trainer(MOT, tmp_path).run()
    for _ in range(5):
        next(steps)
    steps.close()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["config"]["n_shared_expert"], state["settings"]["balance_weight"]
    torch.save(state, tmp_path / "state.pt")
    assert _trainer(MOT, tmp_path).resume()


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("mot", {"balance_weight": 0.1}, "balance_weight"),
        ("dense", {"capacity_factor": 1.0}, "capacity_factor"),
        ("top-k", {"capacity_factor": 1.0}, "capacity_factor"),
        ("switch", {"capacity_factor": 0.0}, "capacity_factor"),
        ("switch", {"balance_weight": -0.1}, "balance_weight"),
        ("top-k", {"balance_weight": float("nan")}, "balance_weight"),
        ("expert-choice", {"batch": 6}, "group_size"),
        ("expert-choice", {"joint_copies": 1}, "joint_copies"),
    ],
)
def test_settings_that_a_kind_has_no_use_for_are_refused(
    name: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=named):
        _trainer(KINDS[name], tmp_path, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["switch", "top-k", "expert-choice"])
def test_a_compiled_run_computes_the_same(name: str, tmp_path: Path) -> None:
    plain = [step.loss for step in _trainer(KINDS[name], tmp_path / "plain", steps=3).run()]
    compiled = [step.loss for step in _trainer(KINDS[name], tmp_path / "compiled", steps=3, compile=True).run()]
    assert compiled == pytest.approx(plain, rel=1e-3)


# Evaluation


def _evaluator(config: ModelConfig) -> tuple[Evaluator, Transformer]:
    model = make(config)
    windows = windows_of(np.random.default_rng(1).integers(0, 61, 900).astype(np.int32), 20)
    crowd = Fill.build("zeros", config, model.banks, None) if config.is_grouped else Fill("none", None)
    return Evaluator(model, windows, crowd, None), model


@kinds
def test_the_mixed_mode_is_the_trainers_pass(name: str) -> None:
    config = KINDS[name]
    evaluator, model = _evaluator(config)
    found = evaluator.run("mixed", temperature=0, skip_below=0)
    ids = evaluator.windows
    logprobs = trainers_logits(model, ids[:, :-1])
    wanted = logprobs.gather(2, ids[:, 1:, None]).mean().neg().exp()
    assert found.perplexity == pytest.approx(float(wanted), rel=1e-4)
    used = {"dense": 1, "switch": 1, "top-k": 5, "top-k-normalized": 5}.get(name, 8)
    assert found.experts_per_token == used


@kinds
def test_every_mode_that_a_kind_has(name: str) -> None:
    config = KINDS[name]
    evaluator, _ = _evaluator(config)
    for mode in modes_of(config):
        found = evaluator.run(mode, temperature=config.temperature, skip_below=0)
        assert found.perplexity > 1 and found.temperature in (config.temperature, 0)
    assert len(modes_of(config)) == (5 if config.is_grouped else 1)


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_modes_of_mixing_are_refused_where_nothing_mixes(name: str, tmp_path: Path) -> None:
    evaluator, model = _evaluator(KINDS[name])
    with pytest.raises(ValueError, match="private"):
        evaluator.run("private", temperature=1, skip_below=0)
    with pytest.raises(TrainingError, match="crowd"):
        record_crowd(model, np.zeros(900, np.int32), tmp_path, seed=0)
