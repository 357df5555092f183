"""Temperatures, fixed, scheduled and learnt, and the checkpoint that holds one of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import attend_whole_sequences
from model.checkpoint import load_model
from model.joint import JointSequences
from model.mixing import WholeSequences
from model.temperatures import folded, overall
from model.train import Trainer
from model.transformer import Transformer
from tests.model.runs import CONFIG, STREAM, make_trainer

TABLES: dict[str, dict[str, Any]] = {
    "fixed": {"temperature_mode": "fixed"},
    "scheduled": {"final_temperature": 0.1, "anneal_from": 0.0},
    "by layer": {"final_temperature": (0.05, 0.5), "anneal_from": 0.0},
    "a layer": {"temperature_mode": "learnable"},
    "an expert": {"temperature_mode": "learnable", "learn_temperature": "expert"},
}


def _trained(name: str, folder: Path, **more: Any) -> Trainer:
    """At its end, with weights and learnt temperatures that matter."""
    trainer = make_trainer(folder, **TABLES[name], **more)
    list(trainer.run())
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
        for factors in trainer.temperatures.parameters():
            factors.normal_(std=0.7, generator=torch.Generator().manual_seed(1))
    return trainer


def _logits(model: Transformer, temperature: float | Tensor, *, copies: int = 0) -> Tensor:
    ids = torch.from_numpy(STREAM[: 8 * 16].astype("int64")).view(8, 16)
    rows = torch.cat((ids, ids[:copies]))
    mix: Any = WholeSequences(CONFIG, 8, temperature=temperature)
    if copies:
        mix = JointSequences(CONFIG, 8, copies, temperature=temperature)
    with torch.no_grad():
        hidden = model(
            rows.reshape(-1), torch.arange(16).repeat(len(rows)),
            lambda _, qkv: attend_whole_sequences(qkv, len(rows), CONFIG.n_head), mix,
        )  # fmt: skip
        return model.logits(hidden)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("copies", [0, 4])
def test_the_checkpoint_computes_what_the_trainer_did(name: str, copies: int, tmp_path: Path) -> None:
    trainer = _trained(name, tmp_path)
    trainer.export()
    loaded = load_model(tmp_path)
    table = trainer.temperatures.at(trainer.step).detach()
    assert table.shape == (2, 6 if name == "an expert" else 1)
    one = loaded.config.temperature
    assert one == overall(table) == pytest.approx(math.exp(float(table.log().mean())))
    expected = _logits(trainer.model, table.float(), copies=copies)
    torch.testing.assert_close(_logits(loaded, one, copies=copies), expected, atol=1e-4, rtol=1e-4)
    # A request's private temperature scales all of them.
    colder = _logits(trainer.model, table.float() / 3, copies=copies)
    torch.testing.assert_close(_logits(loaded, one / 3, copies=copies), colder, atol=1e-4, rtol=1e-4)
    if table.min() < table.max():
        assert (_logits(trainer.model, one) - _logits(trainer.model, table.float())).abs().max() > 1e-2


@pytest.mark.parametrize("name", TABLES)
def test_folding_leaves_no_trace(name: str, tmp_path: Path) -> None:
    trainer = _trained(name, tmp_path)
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    table = trainer.temperatures.at(trainer.step).detach()
    with pytest.raises(RuntimeError, match="meanwhile"), folded(trainer.model, table):
        changed = [key for key, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[key])]
        assert changed == ([] if table.min() == table.max() else ["h.0.mlp.controller", "h.1.mlp.controller"])
        raise RuntimeError("meanwhile")
    assert trainer.model.config == trainer.config
    assert all(torch.equal(tensor, before[key]) for key, tensor in trainer.model.state_dict().items())


def test_a_temperature_by_layer_folds_with_a_softmax_over_experts_too(tmp_path: Path) -> None:
    config = CONFIG.replace(emit_softmax_over_experts=True)
    trainer = make_trainer(tmp_path, config, **TABLES["by layer"])
    list(trainer.run())
    with torch.no_grad():
        for bank in trainer.model.banks:
            bank.controller.mul_(20)
    trainer.export()
    loaded = load_model(tmp_path)
    table = trainer.temperatures.at(trainer.step)
    assert table.min() < table.max()
    torch.testing.assert_close(_logits(loaded, overall(table)), _logits(trainer.model, table.float()))


def test_temperatures_are_learnt_from_a_step_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **TABLES["an expert"], learn_from=0.5, temperature_rate=3.0)
    factors = trainer.temperatures.log_factors
    assert factors is not None and factors.shape == (2, 6)
    seen = [(step.temperature_min, step.temperature, step.temperature_max, factors.clone()) for step in trainer.run()]
    assert all(low == mean == high == 1 for low, mean, high, _ in seen[:5])  # step 5 is the first that moves them
    assert not seen[3][3].any() and seen[4][3].all()
    assert all(low < mean < high for low, mean, high, _ in seen[5:])
    # Adam's first step is the rate's size: theirs is three times that of the others.
    torch.testing.assert_close(seen[4][3].abs(), torch.full((2, 6), 3 * trainer.settings.rate(4)), rtol=0.1, atol=0)


def test_the_gradient_of_a_learnt_temperature(tmp_path: Path) -> None:
    """Against differences of the loss."""
    trainer = make_trainer(tmp_path, **TABLES["an expert"])
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.data = parameter.double()
            if parameter.dim() > 1:
                parameter.mul_(8)
    factors = trainer.temperatures.log_factors
    assert factors is not None
    factors.data = factors.double()

    def loss() -> Tensor:
        ids = trainer.sampler.batch(0)
        return trainer.objective(ids, trainer.temperatures.at(0)).minimised

    (gradient,) = torch.autograd.grad(loss(), factors)
    for place in ((0, 0), (1, 4)):
        around = []
        for change in (-1e-2, 1e-2):
            with torch.no_grad():
                factors[place] = change
                around.append(float(loss()))
        factors.data.zero_()
        assert float(gradient[place]) == pytest.approx((around[1] - around[0]) / 2e-2, rel=0.05, abs=1e-6)
