"""Corpora to windows: every window once an epoch, and a batch that depends on the step alone."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data import WindowSampler, documents, encode_corpus, read_text
from model.errors import TrainingError
from model.tokenizer import END_OF_TEXT, Tokenizer

CORPUS = f"One day.\n{END_OF_TEXT}\n\nTwo days, naïve.\n{END_OF_TEXT}\n \n{END_OF_TEXT}\n"


@given(batch=st.integers(1, 5), length=st.integers(1, 9), tokens=st.integers(2, 200), seed=st.integers(0, 10**9))
def test_every_window_once_an_epoch(batch: int, length: int, tokens: int, seed: int) -> None:
    stream = np.arange(tokens, dtype=np.int32)
    if (tokens - 1) // length - 1 < batch:
        with pytest.raises(TrainingError, match="data"):
            WindowSampler(stream, batch=batch, length=length, seed=seed)
        return
    sampler = WindowSampler(stream, batch=batch, length=length, seed=seed)
    steps = sampler.windows // batch
    for epoch in range(2):
        windows = torch.cat([sampler.batch(epoch * steps + step) for step in range(steps)])
        assert windows.shape == (steps * batch, length + 1)
        starts = windows[:, 0]
        assert torch.equal(windows, starts[:, None] + torch.arange(length + 1))  # consecutive ids of the stream
        assert len(set(starts.tolist())) == steps * batch  # none twice
        assert len(set((starts % length).tolist())) == 1  # on one grid, so that none overlap
        assert sampler.windows - steps * batch < batch  # what is left out would not fill a batch


def test_a_batch_is_a_function_of_the_step() -> None:
    stream = np.arange(1000, dtype=np.int32)
    sampler = WindowSampler(stream, batch=4, length=16, seed=7)
    expected = [sampler.batch(step) for step in range(40)]
    resumed = WindowSampler(stream, batch=4, length=16, seed=7)
    for step in (39, 0, 17, 17, 30, 1):
        assert torch.equal(resumed.batch(step), expected[step])
    per_epoch = sampler.windows // 4
    assert not torch.equal(expected[0], expected[per_epoch]), "epochs have different orders"
    other = WindowSampler(stream, batch=4, length=16, seed=8)
    assert not torch.equal(other.batch(0), expected[0]), "seeds have different orders"


def test_documents() -> None:
    assert list(documents(CORPUS)) == ["One day.\n", "Two days, naïve.\n"]
    assert list(documents("")) == []
    assert list(documents("No end")) == ["No end\n"]


def test_a_corpus_is_its_documents_with_an_end_after_each() -> None:
    tokenizer = Tokenizer.train(iter([CORPUS]), 300)
    end = tokenizer.id_of(END_OF_TEXT)
    stream = encode_corpus(tokenizer, CORPUS)
    assert stream.dtype == np.int32
    assert stream[-1] == end and (stream == end).sum() == 2
    assert tokenizer.decode(stream.tolist()) == "One day.\nTwo days, naïve.\n"
    assert encode_corpus(tokenizer, "").shape == (0,)


def test_read_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(CORPUS, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(CORPUS.encode()))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.xz") == CORPUS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", b"na\xefve"),
        ("latin.xz", lzma.compress(b"na\xefve")),
        ("plain.xz", b"not compressed"),
        ("truncated.xz", lzma.compress(CORPUS.encode())[:-20]),
    ],
)
def test_a_broken_text_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=name):
        read_text(tmp_path / name)


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    for name in ("none.txt", "none.xz"):
        with pytest.raises(TrainingError, match=name):
            read_text(tmp_path / name)
