"""Experiments on a tiny model: what they write, that they take up where they stopped, and their arrangements of rows
against the plain forms."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.attention import attend_whole_sequences
from model.errors import TrainingError
from model.evaluate import Evaluator
from model.experiments import experiments as catalogue_of
from model.experiments.catalogue import Catalogue
from model.experiments.experiments import EXPERIMENTS, experiments_named
from model.experiments.runs import Run
from model.experiments.scales import scale_named
from model.experiments.steps import reaches, spread
from model.experiments.suite import Suite
from model.groups import Fill
from model.mixing import WholeSequences
from model.native import Kernels, NativeUnavailable, open_kernels
from model.scoring import grouped_by, private_score, token_losses
from model.spread import decode_keys, full_steps, head_starts

TEXT = "\n\n".join(f"The {n} boats went out at {n * 7 % 11} and came home in the rain." for n in range(900))
SCALE = scale_named("tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text(TEXT)
    (folder / "validation.txt").write_text(TEXT[9000:40000])
    return folder / "train.txt", folder / "validation.txt"


def _open(folder: Path, texts: tuple[Path, Path], heard: list[tuple[str, float]] | None = None) -> Suite:
    def tell(doing: str, done: float) -> None:
        if heard is not None:
            heard.append((doing, done))

    return Suite.open(folder, SCALE, *texts, seeds=2, tell=tell, kernels=_kernels())


def _kernels() -> Kernels | None:
    """The plain path gives the same figures many times more slowly."""
    try:
        return open_kernels()
    except NativeUnavailable:
        return None


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Suite:
    return _open(tmp_path_factory.mktemp("suite"), texts)


KEYS = {
    "steps": {"kind", "seed", "steps", "learning_rate", "parameters", "loss", "curve"},
    "kinds": {"kind", "seed", "steps", "learning_rate", "parameters", "loss", "curve"},
    "learnable": {"temperature", "mixed", "private_over_mixed", "private_experts", "unmixed_over_mixed",
                  "unmixed_experts", "entropy", "temperatures", "curve"},
    "group-size": {"live", "fill", "loss", "over_training"},
    "distance": {"temperature", "distance", "loss", "loss_at_equal"},
    "private-temperature": {"checkpoint", "temperature", "skip_below", "over_mixed", "experts_per_token"},
    "crowds": {"crowd", "members", "temperature", "over_mixed", "experts_per_token"},
}  # fmt: skip


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_what_an_experiment_writes(experiment: catalogue_of.Experiment, suite: Suite) -> None:
    result = catalogue_of.run(experiment, suite)
    stored = json.loads((suite.folder / f"{experiment.name}.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert set(stored) == {"experiment", "question", "scale", "seeds", "machine", "rows", "summary"}
    assert stored["rows"] and all(set(row) == KEYS[experiment.name] for row in stored["rows"])
    # Nothing is measured or trained a second time.
    heard: list[tuple[str, float]] = []
    suite.tell = lambda doing, done: heard.append((doing, done))
    assert json.loads(json.dumps(catalogue_of.run(experiment, suite))) == stored
    assert heard == []


def test_a_stopped_suite_goes_on_where_it_stopped(texts: tuple[Path, Path], tmp_path: Path) -> None:
    whole, parts = _open(tmp_path / "whole", texts), _open(tmp_path / "parts", texts)
    run = Catalogue(SCALE).kind("mot")

    class Stopped(Exception):
        pass

    def stop(doing: str, done: float) -> None:
        if done > 0.6:
            raise Stopped

    parts.tell = stop
    with pytest.raises(Stopped):
        parts.train(run)
    heard: list[tuple[str, float]] = []
    again = _open(tmp_path / "parts", texts, heard)
    assert again.train(run).curve() == whole.train(run).curve()
    assert heard[0] == (f"training {run.name}", 6 / 12)  # it had stopped at step 8, and the last state is of step 5
    assert again.train(run).score("mixed") == whole.train(run).score("mixed")
    before = len(heard)
    again.train(run).score("mixed")
    assert len(heard) == before


def test_a_transition_goes_on_from_where_its_start_ended(suite: Suite) -> None:
    run = Catalogue(SCALE).transitions()["control"]
    assert run.start is not None
    start, control = suite.train(run.start), suite.train(run)
    assert start.config.temperature != SCALE.config.temperature  # it was learnt
    assert control.log()[0]["temperature"] == pytest.approx(start.config.temperature, rel=0.05)
    assert control.curve()[0][1] < 1.1 * start.curve()[-1][1]


def test_other_text_or_scale_is_refused(suite: Suite, texts: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT + "more")
    tell = suite.tell
    with pytest.raises(TrainingError, match="another data"):
        Suite.open(suite.folder, SCALE, other, texts[1], seeds=1, tell=tell)
    with pytest.raises(TrainingError, match="another scale"):
        Suite.open(suite.folder, dataclasses.replace(SCALE, name="x"), *texts, seeds=1, tell=tell)
    with pytest.raises(TrainingError, match="nowhere"):
        Suite.open(tmp_path, SCALE, Path("/nowhere"), texts[1], seeds=1, tell=tell)
    with pytest.raises(TrainingError, match="seeds"):
        Suite.open(tmp_path, SCALE, *texts, seeds=0, tell=tell)
    with pytest.raises(TrainingError, match="scale"):
        scale_named("huge")
    with pytest.raises(TrainingError, match="experiment"):
        experiments_named("everything")


def test_a_runs_folder_follows_from_what_it_trains() -> None:
    run = Catalogue(SCALE).kind("mot")
    assert run.folder == Catalogue(SCALE).kind("mot").folder
    changed = [
        run.but("mot-0", seed=5),
        Run("mot-0", run.config.replace(n_expert=4), run.settings),
        Run("mot-0", run.config, run.settings, start=run),
    ]
    assert len({run.folder, *(other.folder for other in changed)}) == 4
    assert experiments_named("all") == EXPERIMENTS and len(experiments_named("steps")) == 1


def test_where_a_curve_reaches_a_loss() -> None:
    curve = [(10, 5.0), (20, 4.0), (30, 4.2), (40, 3.0)]
    assert reaches(curve, 4.5) == 15 and reaches(curve, 4.0) == 20 and reaches(curve, 3.6) == 35
    assert reaches(curve, 6.0) == 10 and reaches(curve, 2.9) is None
    assert spread([0.5, None, 0.7]) == {
        "values": [0.5, None, 0.7], "missing": 1, "mean": 0.6, "least": 0.5, "greatest": 0.7
    }  # fmt: skip
    assert spread([None])["mean"] is None


def _weighty(suite: Suite) -> Any:
    """A model whose groups matter: weights far larger than training leaves them in a dozen steps."""
    trained = suite.train(Catalogue(SCALE).kind("mot"))
    with torch.no_grad():
        for parameter in trained.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return trained


def test_groups_at_equal_positions_are_whole_sequences(suite: Suite) -> None:
    trained = _weighty(suite)
    config, ids = trained.config, suite.windows()[:8]
    positions = torch.arange(16).repeat(8)
    keys = torch.arange(8).repeat_interleave(16) // 4 * 16 + positions
    found = token_losses(trained.model, ids, grouped_by(keys, positions, Fill("none", None), config))
    assert torch.allclose(found, token_losses(trained.model, ids, WholeSequences(config, 8)), atol=1e-5)
    zeros = Fill.build("zeros", config, trained.model.banks, None)
    found = token_losses(trained.model, ids[:2], grouped_by(positions[:32], positions[:32], zeros, config))
    assert torch.allclose(found, token_losses(trained.model, ids[:2], WholeSequences(config, 2)), atol=1e-5)


def test_private_rows_are_evaluated_as_the_evaluator_does(suite: Suite) -> None:
    trained = suite.train(Catalogue(SCALE).kind("mot"))
    fill = trained.fill()
    assert fill.crowd is not None
    for temperature, mode in ((0.1, "private"), (0.0, "private_unmixed")):
        expected = Evaluator(trained.model, suite.windows(), fill, None).run(
            mode, temperature=temperature, skip_below=0.0
        )
        found = private_score(trained.model, suite.windows(), fill.crowd, temperature=temperature)
        assert found.loss == pytest.approx(torch.tensor(expected.perplexity).log().item(), rel=1e-5)
        assert found.experts_per_token == pytest.approx(expected.experts_per_token)


def test_members_far_apart_meet_as_in_decoding(suite: Suite) -> None:
    """Row by row, by hand: what one sequence's token sees of another is never ahead of the common step; a future token
    changes nothing before it, in its own sequence or in the others."""
    trained = _weighty(suite)
    ahead, length = head_starts(4, 6), 16
    assert ahead.tolist() == [0, 2, 4, 6]
    keys, counted = decode_keys(ahead, length).view(4, length), full_steps(ahead, length)
    assert counted.sum(1).tolist() == [10] * 4
    for member in range(4):
        assert (keys[member][counted[member]] == length + torch.arange(10)).all()
    ids, positions = suite.windows()[:4].clone(), torch.arange(length).repeat(4)

    def losses() -> torch.Tensor:
        mix = grouped_by(keys.flatten(), positions, trained.fill(), trained.config)
        return token_losses(trained.model, ids, mix)

    before = losses()
    ids[3, 6 + 5] = (ids[3, 6 + 5] + 1) % 300  # decoded in step 5
    changed = (losses() - before).abs() > 1e-6
    changed[3, 6 + 4] = False  # the token that predicts the changed one
    step = torch.arange(length)[None] - ahead[:, None]
    assert not changed[step < 5].any() and changed[:3][step[:3] == 5].any()


def test_kept_equal_positions_are_the_distance_of_none(suite: Suite) -> None:
    trained = _weighty(suite)
    ids = suite.windows()[:4]
    positions = torch.arange(16).repeat(4)
    keys = decode_keys(head_starts(4, 0), 16)
    found = token_losses(trained.model, ids, grouped_by(keys, positions, trained.fill(), trained.config))
    model = trained.model
    hidden = model(
        ids[:, :-1].flatten(), positions,
        lambda _, qkv: attend_whole_sequences(qkv, 4, 2), WholeSequences(trained.config, 4),
    )  # fmt: skip
    expected = torch.nn.functional.cross_entropy(model.logits(hidden), ids[:, 1:].flatten(), reduction="none")
    assert torch.allclose(found.flatten(), expected, atol=1e-5)


def test_what_the_catalogue_trains_is_valid() -> None:
    """Every run of both scales passes the trainer's checks, and equal work has equal names."""
    for scale in (SCALE, scale_named("small")):
        catalogue = Catalogue(scale)
        runs = [catalogue.kind(kind, seed) for kind in ("dense", "mot", "switch", "expert-choice") for seed in (0, 1)]
        runs += [
            catalogue.kind("mot", share=0.5),
            catalogue.unannealed(),
            catalogue.private(),
            catalogue.private_annealed(),
            *catalogue.transitions().values(),
        ]
        for run in runs:
            run.settings.check(run.config)
        assert len({run.digest for run in runs}) == len(runs)
        assert scale.windows % (4 * scale.config.group_size) == 0
