"""Settings of a run: schedules, presets, and that what is accepted can be trained."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.errors import TrainingError
from model.recipe import PRESETS, SHAPE, TrainSettings, preset_named
from server.bench.shapes import SHAPES
from tests.model.runs import CONFIG, SETTINGS, make_trainer

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch": 6}, "group_size"),
        ({"length": 17}, "n_positions"),
        ({"steps": 0}, "steps"),
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": 3}, r"batch \(8\) must be a multiple of accumulate \(3\)"),
        ({"accumulate": 4}, r"group_size \(4\) times accumulate \(4\)"),
        ({"accumulate": 2, "joint_copies": 3}, r"joint_copies \(3\) must be a multiple"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": NAN}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": NAN}, "weight_decay"),
        ({"clip": 0.0}, "clip"),
        ({"warmup": 9}, "warmup"),
        ({"anneal_from": 1.5}, "anneal_from"),
        ({"learn_from": NAN}, "learn_from"),
        ({"final_rate_fraction": -1.0}, "final_rate_fraction"),
        ({"temperature_rate": 0.0}, "temperature_rate"),
        ({"temperature_mode": "cold"}, "fixed or scheduled or learnable"),
        ({"learn_temperature": "token"}, "layer or expert"),
        ({"final_temperature": 2.0}, "final_temperature"),
        ({"final_temperature": (0.5, 2.0)}, "final_temperature"),
        ({"final_temperature": (0.5, 0.2, 0.1)}, "3 values for 2 layers"),
        ({"joint_copies": 9}, "joint_copies"),
        ({"joint_distill": 2.0}, "joint_distill"),
        ({"joint_rivals": 4}, "joint_rivals"),
        ({"joint_rivals": 0}, "joint_rivals"),
        ({"optimizer": "sgd"}, "adamw or muon"),
        ({"export_dtype": "int8"}, "bfloat16 or float32"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"save_every": 0}, "save_every"),
        ({"eval_every": 0}, "eval_every"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=named):
        make_trainer(tmp_path, **changes)


def test_several_processes_need_a_group_each() -> None:
    SETTINGS.check(CONFIG, processes=2)
    with pytest.raises(TrainingError, match=r"times accumulate \(1\) times processes \(4\)"):
        SETTINGS.check(CONFIG, processes=4)
    with pytest.raises(TrainingError, match=r"number of processes \(2\)"):
        dataclasses.replace(SETTINGS, joint_copies=1).check(CONFIG, processes=2)
    dense = CONFIG.replace(model_type="gpt2")
    SETTINGS.check(dense, processes=8)
    with pytest.raises(TrainingError, match=r"number of processes \(3\)"):
        SETTINGS.check(dense, processes=3)


@pytest.mark.parametrize("softmax", [{"emit_softmax_over_experts": True}, {"use_discrete_routing": True}])
def test_temperatures_are_learnt_with_one_softmax_over_tokens_only(softmax: dict[str, bool]) -> None:
    with pytest.raises(TrainingError, match=r"temperature_mode.*emit_softmax_over_experts"):
        dataclasses.replace(SETTINGS, temperature_mode="learnable").check(CONFIG.replace(**softmax))
    with pytest.raises(TrainingError, match="joint_copies"):
        dataclasses.replace(SETTINGS, joint_copies=2).check(CONFIG.replace(**softmax))
    with pytest.raises(TrainingError, match="temperature"):
        SETTINGS.check(CONFIG.replace(temperature=0.0))


FRACTIONS = st.one_of(st.floats(-0.1, 1.1), st.sampled_from([0.0, 1.0, NAN, INF]))
POSITIVE = st.one_of(st.floats(1e-5, 2), st.sampled_from([0.0, -1.0, NAN, INF]))
ANY_SETTINGS = st.builds(
    TrainSettings,
    steps=st.integers(0, 5),
    batch=st.sampled_from([0, 4, 8, 12, 16, 24]),
    length=st.integers(0, 17),
    accumulate=st.integers(0, 4),
    optimizer=st.sampled_from(["adamw", "muon"]),
    learning_rate=POSITIVE,
    matrix_rate=POSITIVE,
    final_rate_fraction=FRACTIONS,
    warmup=st.integers(-1, 4),
    weight_decay=POSITIVE,
    clip=POSITIVE,
    temperature_mode=st.sampled_from(["fixed", "scheduled", "learnable"]),
    final_temperature=st.one_of(POSITIVE, st.lists(POSITIVE, min_size=1, max_size=3).map(tuple)),
    anneal_from=FRACTIONS,
    learn_temperature=st.sampled_from(["layer", "expert"]),
    learn_from=FRACTIONS,
    temperature_rate=POSITIVE,
    joint_copies=st.integers(-1, 9),
    joint_weight=POSITIVE,
    joint_distill=FRACTIONS,
    seed=st.integers(-1, 10),
)
SENSIBLE = st.builds(
    TrainSettings,
    steps=st.integers(1, 3),
    batch=st.sampled_from([8, 16, 24]),
    length=st.integers(1, 16),
    accumulate=st.integers(1, 2),
    optimizer=st.sampled_from(["adamw", "muon"]),
    warmup=st.just(1),
    temperature_mode=st.sampled_from(["fixed", "scheduled", "learnable"]),
    final_temperature=st.one_of(st.floats(0.01, 1), st.tuples(st.floats(0.01, 1), st.floats(0.01, 1))),
    anneal_from=st.floats(0, 1),
    learn_temperature=st.sampled_from(["layer", "expert"]),
    learn_from=st.floats(0, 1),
    joint_copies=st.integers(0, 8),
)


@settings(max_examples=60)
@given(st.one_of(ANY_SETTINGS, SENSIBLE))
def test_what_is_accepted_can_be_trained(chosen: TrainSettings) -> None:
    """And what is refused is refused with a setting's name, before anything is built."""
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            chosen.check(CONFIG)
        except TrainingError as error:
            assert str(error).split()[0].rstrip(":") in names
            return
        trainer = make_trainer(Path(folder), **dataclasses.asdict(chosen))
        steps = list(trainer.run())
        assert len(steps) == chosen.steps and math.isfinite(steps[0].loss)


@given(st.integers(1, 500), st.integers(0, 100), st.floats(0, 1), st.floats(0.01, 1), st.floats(0, 1))
def test_schedules(steps: int, warmup: int, anneal_from: float, final: float, floor: float) -> None:
    chosen = TrainSettings(
        steps=steps, warmup=min(warmup, steps), anneal_from=anneal_from, final_temperature=(final, 1.0), batch=4,
        length=8, final_rate_fraction=floor,
    )  # fmt: skip
    rates = [chosen.rate(step) for step in range(steps)]
    temperatures = [chosen.temperatures(step, 1.0, 2)[0] for step in range(steps + 1)]
    assert all(0 <= rate <= chosen.learning_rate * (1 + 1e-9) for rate in rates)
    after = rates[chosen.warmup :]
    assert all(one >= other for one, other in itertools.pairwise(after))
    assert all(rate >= floor * chosen.learning_rate * (1 - 1e-9) for rate in after)
    assert all(one >= other for one, other in itertools.pairwise(temperatures))
    assert temperatures[0] == 1.0 and all(final * (1 - 1e-9) <= t <= 1 for t in temperatures)
    assert all(chosen.temperatures(step, 1.0, 2)[1] == 1.0 for step in range(steps + 1))
    if anneal_from < 0.999:
        assert temperatures[-1] == pytest.approx(final)
    fixed = dataclasses.replace(chosen, temperature_mode="fixed")
    assert {fixed.temperatures(step, 0.7, 1) for step in range(steps + 1)} == {(0.7,)}


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_trained(name: str) -> None:
    config, chosen = preset_named(name, {})
    chosen.check(config)
    assert config.is_mot and (name == "tiny" or config.replace(temperature=SHAPES[name].temperature) == SHAPES[name])


def test_the_papers_small_model() -> None:
    config, chosen = preset_named("paper", {})
    assert (config.n_layer, config.n_embd, config.n_head, config.group_size, config.n_expert) == (4, 256, 4, 32, 512)
    assert config.expansion == 32 and config.active_hidden == 4 * 256
    assert (chosen.length, chosen.learning_rate) == (256, 2e-3)
    dense, other = preset_named("paper", {}, feed_forward="dense")
    assert other.learning_rate == 4e-3 and dense.hidden_size == SHAPES["paper-dense"].hidden_size == 1024
    assert preset_named("paper", {"learning_rate": 1e-3}, feed_forward="dense")[1].learning_rate == 1e-3


def test_presets() -> None:
    assert preset_named("tiny", {"steps": 5})[1].steps == 5
    assert preset_named("tiny", {"steps": 5})[1].warmup == 5
    with pytest.raises(TrainingError, match=r"preset.*tiny"):
        preset_named("huge", {})


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"final_temperature": 0.1, "temperature_mode": "fixed"}, "mot", "final_temperature: only with"),
        ({"anneal_from": 0.1, "temperature_mode": "learnable"}, "mot", "anneal_from: only with"),
        ({"learn_temperature": "expert"}, "mot", "learn_temperature: only with"),
        ({"learn_from": 0.5}, "mot", "learn_from: only with"),
        ({"temperature_mode": "fixed"}, "dense", "temperature_mode: a gpt2 model"),
        ({"matrix_rate": 1.0}, "mot", "matrix_rate: only with"),
        ({"joint_weight": 1.0}, "mot", "joint_weight: only with"),
    ],
)
def test_a_setting_without_effect_is_refused(changes: dict[str, Any], kind: str, named: str) -> None:
    with pytest.raises(TrainingError, match=named):
        preset_named("tiny", changes, feed_forward=kind)


# The model's sizes


@given(st.fixed_dictionaries({}, optional={field: st.integers(1, 24) for field in SHAPE if field != "temperature"}))
def test_sizes_make_a_model_or_are_refused_by_name(shape: dict[str, int]) -> None:
    try:
        config, _ = preset_named("tiny", {}, shape=shape)
    except TrainingError as error:
        assert "n_head" in str(error) and any(name in shape for name in ("n_embd", "n_head"))
        return
    assert {name: getattr(config, name) for name in shape} == shape


@pytest.mark.parametrize(
    ("shape", "kind", "start", "named"),
    [
        ({"n_head": 5}, "mot", None, r"n_embd \(64\) must be a multiple of n_head \(5\)"),
        ({"expert_size": 0}, "mot", None, "expert_size must be at least 1"),
        ({"n_layer": 0}, "mot", None, "n_layer must be a positive"),
        ({"temperature": -1.0}, "mot", None, "temperature must be"),
        ({"temperature": 0.5}, "dense", None, "temperature: a dense model"),
        ({"group_size": 3}, "dense", None, r"multiple of group_size \(3\)"),
        ({"n_layer": 3}, "mot", ModelConfig(), "n_layer: start_from's checkpoint has its own"),
        ({"group_size": 4}, "mot", ModelConfig(model_type="gpt2"), "group_size: a gpt2 model has no groups"),
    ],
)
def test_refused_sizes(shape: dict[str, Any], kind: str, start: ModelConfig | None, named: str) -> None:
    with pytest.raises(TrainingError, match=named):
        preset_named("tiny", {}, shape=shape, feed_forward=kind, start=start)


def test_sizes_are_matched_by_other_kinds() -> None:
    config, _ = preset_named(
        "tiny", {}, shape={"n_expert": 16, "expert_size": 8, "group_size": 2}, feed_forward="dense"
    )
    assert config.hidden_size == 64
