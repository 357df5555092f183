"""Evaluation against the server's own forward pass, calibration against the list of what was tried."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from model import calibrate, reference
from model.checkpoint import save_model
from model.config import ModelConfig
from model.errors import CheckpointError, TrainingError
from model.evaluate import MODES, Evaluator, Mode, open_for_scoring, windows_of
from model.groups import Fill
from model.native import NativeUnavailable, open_kernels
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from server.engine.request import EngineRequest, Privacy, SamplingParams
from server.engine.scheduler import SchedulerLimits
from tests.server.engine.conftest import _engine, drive

CONFIG = ModelConfig(
    vocab_size=300, n_positions=24, n_embd=16, n_layer=2, n_head=2, group_size=4, n_expert=6, expert_size=8,
    temperature=0.5,
)  # fmt: skip
TEXT = "\n\n".join(f"The {n} boats went out at {n * 7 % 11} and came home in the rain." for n in range(300))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, a crowd and weights that matter."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = Transformer(CONFIG)
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    save_model(model, folder, dtype=torch.float32)
    Tokenizer.train(iter([TEXT]), CONFIG.vocab_size).save(folder)
    (folder / "text.txt").write_text(TEXT)
    opened = open_for_scoring(folder, folder / "text.txt", windows=8)
    calibrate.record_crowd(opened.model, opened.encode(folder / "text.txt"), folder, seed=0)
    return folder


def _evaluator(folder: Path) -> Evaluator:
    opened = open_for_scoring(folder, folder / "text.txt", windows=8)
    return opened.evaluator(reference.load(folder, opened.model))


@pytest.mark.parametrize("mode", ["mixed", "private", "private_unmixed"])
def test_evaluation_agrees_with_the_engine(mode: Mode, folder: Path) -> None:
    """The engine's prompt log probabilities of the same windows give the same perplexity."""
    opened = open_for_scoring(folder, folder / "text.txt", windows=8)
    fill = Fill.build("reference", CONFIG, opened.model.banks, reference.load(folder, opened.model))
    prompts = opened.windows[:, : CONFIG.n_positions]  # the engine has no place for one token more
    found = Evaluator(opened.model, prompts, fill, None).run(mode, temperature=0.3, skip_below=0.02)
    engine = _engine(opened.model, fill, SchedulerLimits(64, 1000), None, 200)
    privacy = {"mixed": None, "private": Privacy(0.3, 0.02), "private_unmixed": Privacy(0.0, 0.0)}[mode]
    size = CONFIG.group_size
    requests = [
        EngineRequest(
            f"{n}",
            tuple(map(tuple, group.tolist())),
            SamplingParams(max_tokens=0, prompt_logprobs=0),
            privacy=privacy,
            tenant=f"{n}",
        )
        for n, group in enumerate(torch.split(prompts, size))
    ]
    news = drive(engine, requests)
    scores = [e.logprob for deltas in news.values() for d in deltas for e in d.prompt_logprobs or () if e is not None]
    assert len(scores) == found.tokens == prompts[:, 1:].numel()
    assert -sum(scores) / len(scores) == pytest.approx(math.log(found.perplexity), abs=1e-4)
    assert found.bits_per_byte is None
    if mode == "mixed":
        assert found.temperature == CONFIG.temperature and found.experts_per_token == CONFIG.n_expert


def test_modes_and_bits_per_byte(folder: Path) -> None:
    evaluator = _evaluator(folder)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    seen: list[float] = []
    results = {mode: evaluator.run(mode, temperature=0.5, skip_below=0.0, progress=seen.append) for mode in MODES}
    assert seen[-1] == 1.0
    targets = evaluator.windows[:, 1:]
    size = len(b"".join(tokenizer.token_bytes(token) for token in targets.flatten().tolist() if token != 0))
    for found in results.values():
        assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity) * found.tokens / size)
    assert len({round(found.perplexity, 6) for found in results.values()}) == len(MODES)
    assert results["private_unmixed"].experts_per_token < results["private"].experts_per_token <= CONFIG.n_expert


@given(st.integers(2, 300), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 30)))
def test_windows_are_stretches_of_the_stream(tokens: int, length: int, most: int | None) -> None:
    stream = np.arange(tokens).astype(np.uint16)
    if tokens - 1 < length:
        with pytest.raises(TrainingError, match="window"):
            windows_of(stream, length, most)
        return
    windows = windows_of(stream, length, most)
    count = (tokens - 1) // length
    assert windows.shape == (min(count, most or count), length + 1)
    assert (windows[:, 1:] - windows[:, :-1] == 1).all()
    assert len(set(windows[:, 0].tolist())) == windows.shape[0]


def test_a_folder_without_a_tokenizer_cannot_be_scored(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_for_scoring(tmp_path, folder / "text.txt", windows=4)


def test_too_little_text_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The rain. " * 8)
    opened = open_for_scoring(folder, tmp_path / "short.txt", windows=None)
    with pytest.raises(TrainingError, match="group"):
        opened.evaluator(None)
    with pytest.raises(TrainingError, match="windows"):
        calibrate.record_crowd(opened.model, opened.encode(tmp_path / "short.txt"), tmp_path, seed=0)


CANDIDATES = st.lists(
    st.builds(
        calibrate.Candidate,
        temperature=st.floats(0, 1),
        skip_below=st.floats(0, 0.1),
        ratio=st.floats(0.98, 1.05),
        experts_per_token=st.floats(1, 64),
    ),
    min_size=1,
)


@given(CANDIDATES)
def test_the_chosen_pair(tried: list[calibrate.Candidate]) -> None:
    chosen = calibrate.choose(tried)
    within = [candidate for candidate in tried if candidate.ratio <= calibrate.TOLERANCE]
    if within:
        assert chosen in within
        assert all(chosen.experts_per_token <= candidate.experts_per_token for candidate in within)
    else:
        assert all(chosen.ratio <= candidate.ratio for candidate in tried)


def test_the_crowd_is_what_the_layers_saw(folder: Path) -> None:
    """Its members, mixed as a group, give the recorded windows' own perplexity: nothing is lost in storing."""
    opened = open_for_scoring(folder, folder / "text.txt", windows=8)
    crowd = reference.load(folder, opened.model)
    assert crowd is not None
    again = calibrate.record_crowd(opened.model, opened.encode(folder / "text.txt"), folder, seed=0)
    other = calibrate.record_crowd(opened.model, opened.encode(folder / "text.txt"), folder, seed=1)
    assert again.fingerprint == crowd.fingerprint != other.fingerprint
    calibrate.record_crowd(opened.model, opened.encode(folder / "text.txt"), folder, seed=0)
    assert crowd.at(0, torch.tensor([3])).shape == (1, CONFIG.group_size, CONFIG.n_embd)
    assert Fill.build("reference", CONFIG, opened.model.banks, None).kind == "zeros"


def test_the_pair_is_written_whole(tmp_path: Path) -> None:
    calibrate.save_pair(calibrate.Candidate(0.1, 0.02, 1.0012345, 12.345), tmp_path)
    values = json.loads((tmp_path / calibrate.PRIVATE_FILE).read_text())
    assert values["private_temperature"] == 0.1 and values["private_skip_below"] == 0.02
    assert list(tmp_path.iterdir()) == [tmp_path / calibrate.PRIVATE_FILE]


def test_perplexity_of_a_known_distribution(folder: Path) -> None:
    """A model whose logits are all equal has a perplexity of the vocabulary's size."""
    evaluator = _evaluator(folder)
    with torch.no_grad():
        evaluator.model.wte.weight.zero_()
    found = evaluator.run("mixed", temperature=0, skip_below=0)
    assert found.perplexity == pytest.approx(CONFIG.vocab_size, rel=1e-4)


def test_the_best_crowd_stays(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    opened = open_for_scoring(copy, copy / "text.txt", windows=8)
    stream = opened.encode(copy / "text.txt")
    found = dict(calibrate.best_crowd(opened, stream, copy, range(3), None))
    kept = reference.load(copy, opened.model)
    again = calibrate.record_crowd(opened.model, stream, copy, seed=min(found, key=lambda seed: found[seed]))
    assert len(found) == 3 and kept is not None and kept.fingerprint == again.fingerprint


@pytest.mark.parametrize("mode", ["private", "private_unmixed"])
def test_kernels_judge_as_the_plain_path_does(mode: Mode, folder: Path) -> None:
    try:
        kernels = open_kernels()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    opened = open_for_scoring(folder, folder / "text.txt", windows=8)
    crowd = reference.load(folder, opened.model)
    plain, native = (
        opened.evaluator(crowd, chosen).run(mode, temperature=0.5, skip_below=0.02) for chosen in (None, kernels)
    )
    assert math.isclose(plain.perplexity, native.perplexity, rel_tol=1e-5)
    assert math.isclose(plain.experts_per_token, native.experts_per_token, rel_tol=1e-2)


def test_the_best_number_of_rivals_stays(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    opened = open_for_scoring(copy, copy / "text.txt", windows=8)
    before = reference.load(copy, opened.model)
    assert before is not None and before.rivals == 3
    few = dict(calibrate.best_rivals(opened, copy, None, most_experts=0.1))
    assert list(few) == [3]  # all of them, when even those leave too many
    found = dict(calibrate.best_rivals(opened, copy, None, most_experts=6))
    kept = reference.load(copy, opened.model)
    assert list(found) == [3, 2, 1] and kept is not None and torch.equal(kept.places, before.places)
    assert kept.rivals == min(found, key=lambda rivals: found[rivals].perplexity)
    assert opened.evaluator(kept).run("private_unmixed", temperature=0, skip_below=0) == found[kept.rivals]
    # Whoever has fewer to beat has more experts.
    assert found[3].experts_per_token < found[2].experts_per_token < found[1].experts_per_token


@pytest.mark.parametrize("rivals", ["0", "4", "many"])
def test_an_impossible_number_of_rivals_is_refused(rivals: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = open_for_scoring(copy, copy / "text.txt", windows=4).model
    crowd = reference.load(copy, model)
    assert crowd is not None
    save_file({reference.TENSOR: crowd.places.flip(2).contiguous()}, copy / reference.FILE, metadata={"rivals": rivals})
    with pytest.raises(CheckpointError, match="rivals"):
        reference.load(copy, model)


def test_a_crowd_keeps_what_tells_its_members_apart(folder: Path, tmp_path: Path) -> None:
    """Beside a common part a thousand times as large; and the mean of another model is refused."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model = open_for_scoring(tmp_path, tmp_path / "text.txt", windows=8).model
    shape = (CONFIG.n_layer, CONFIG.n_positions, CONFIG.group_size, CONFIG.n_embd)
    apart = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    activations = apart + 1000 * torch.randn(CONFIG.n_layer, 1, 1, CONFIG.n_embd)
    reference.save(activations, tmp_path, torch.bfloat16)
    found = reference.load(tmp_path, model)
    assert found is not None
    lost = found.places.flip(2) - activations
    assert lost.abs().max() < 0.02
    exact = reference.ReferenceCrowd(activations, model.banks, fingerprint=None)
    assert (found.scores - exact.scores).abs().max() < 0.02 * exact.scores.std(-1).mean()
    save_file({reference.TENSOR: activations, reference.MEAN: torch.zeros(1, 3)}, tmp_path / reference.FILE)
    with pytest.raises(CheckpointError, match=r"mean has shape \(1, 3\)"):
        reference.load(tmp_path, model)
