"""The folder that experiments share: one corpus, runs that are trained at most once, and what was measured on them.

Everything in it is resumable: a run goes on from its last state, and a measurement is stored as soon as it is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model import reference
from model.calibrate import record_crowd
from model.checkpoint import load_model
from model.config import ModelConfig
from model.data import encode_corpus, read_text
from model.errors import TrainingError
from model.evaluate import Evaluation, Evaluator, Mode, windows_of
from model.experiments.runs import Run
from model.experiments.scales import Scale
from model.files import whole, write_json
from model.groups import Fill
from model.native import Kernels
from model.reference import ReferenceCrowd
from model.run_state import LOG, STATE
from model.tokenizer import END_OF_TEXT, Tokenizer
from model.train import Trainer, Validation, prepare_corpus
from model.transformer import Transformer

_MEASURED, _FINISHED = "measured.json", "finished"


class Tell(Protocol):
    """Hears what is going on, and how much of it is done, from 0 to 1."""

    def __call__(self, doing: str, done: float) -> None: ...


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: np.ndarray  # [tokens]
    validation: np.ndarray


class Suite:
    """``folder`` holds ``suite.json`` (what it was begun with), the corpus, and ``runs/``. ``kernels`` None: the
    plain path, which gives the same figures more slowly."""

    def __init__(self, folder: Path, scale: Scale, seeds: int, tell: Tell, *, kernels: Kernels | None = None) -> None:
        if seeds < 1:
            raise TrainingError(f"seeds must be at least 1, not {seeds}")
        self.folder, self.scale, self.seeds, self.tell, self.kernels = folder, scale, seeds, tell, kernels
        self._corpus: Corpus | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        scale: Scale,
        data: Path,
        validation: Path,
        *,
        seeds: int,
        tell: Tell,
        kernels: Kernels | None = None,
    ) -> Suite:
        """Begins the folder, or goes on with it. Raises TrainingError when it was begun with other text or another
        scale."""
        suite = cls(folder, scale, seeds, tell, kernels=kernels)
        begun = {"scale": scale.name, "data": _digest(data), "validation": _digest(validation)}
        path = folder / "suite.json"
        if path.exists():
            changed = [name for name, value in json.loads(path.read_text()).items() if begun.get(name) != value]
            if changed:
                raise TrainingError(f"{path}: begun with another {', '.join(changed)}; choose another folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, begun)
        suite._corpus = suite._encode(data, validation)
        return suite

    @property
    def corpus(self) -> Corpus:
        assert self._corpus is not None, "opened by Suite.open"
        return self._corpus

    def _encode(self, data: Path, validation: Path) -> Corpus:
        """The text as tokens, kept in the folder: encoding takes longer than some runs."""
        train, held_out = self.folder / "train.npy", self.folder / "validation.npy"
        if not (train.exists() and held_out.exists()):
            self.tell("encoding the text", 0.0)
            tokenizer, stream = prepare_corpus(self.folder, [data], vocab_size=self.scale.config.vocab_size)
            _save(train, stream)
            _save(held_out, encode_corpus(tokenizer, read_text(validation)))
        found = Tokenizer.load(self.folder)
        if found is None:
            raise TrainingError(f"{self.folder / 'tokenizer.json'}: not found; the folder is damaged, choose another")
        return Corpus(found, np.load(train), np.load(held_out))

    def windows(self, count: int | None = None) -> Tensor:
        """The validation windows on which everything is judged: ``[scale.windows or count, length + 1]``."""
        return windows_of(self.corpus.validation, self.scale.settings.length, count or self.scale.windows)

    def train(self, run: Run) -> Trained:
        """The finished run, trained now if it was not yet."""
        folder = self.folder / "runs" / run.folder
        if not (folder / _FINISHED).exists():
            start = self.train(run.start) if run.start else None
            self._train(run, folder, start)
        return Trained(self, run, folder)

    def _train(self, run: Run, folder: Path, start: Trained | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.corpus.tokenizer.save(folder)
        end = self.corpus.tokenizer.id_of(END_OF_TEXT)
        begun = run.config if start is None else start.config  # whose temperature is the one that training reached
        config = begun.replace(bos_token_id=end, eos_token_id=end)
        half = self.windows(self.scale.windows // 2)  # enough for a curve
        settings = dataclasses.replace(run.settings, eval_every=self.scale.curve_every)
        trainer = Trainer(
            config, settings, self.corpus.train, folder, validation=Validation(half, self.corpus.tokenizer)
        )
        if start is not None:
            trainer.model.load_state_dict(start.model.state_dict())
        trainer.resume()
        for progress in trainer.run():
            self.tell(f"training {run.name}", progress.step / progress.steps)
        (folder / STATE).unlink()
        (folder / _FINISHED).touch()


class Trained:
    """A finished run: its checkpoint, its validation curve, and what was measured on it before."""

    def __init__(self, suite: Suite, run: Run, folder: Path) -> None:
        self.suite, self.run, self.folder = suite, run, folder
        self._model: Transformer | None = None

    @property
    def model(self) -> Transformer:
        if self._model is None:
            self._model = load_model(self.folder, dtype=torch.float32)
        return self._model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def log(self) -> list[dict[str, Any]]:
        """What the trainer logged, a dictionary a step."""
        return [json.loads(line) for line in (self.folder / LOG).read_text().splitlines()]

    def curve(self) -> list[tuple[int, float]]:
        """Steps and the validation loss there, in nats per token."""
        return [
            (line["step"], math.log(line["validation_perplexity"]))
            for line in self.log()
            if line["validation_perplexity"] is not None
        ]

    def measured(self, key: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` returned (plain JSON) the first time that this key was asked for."""
        path = self.folder / _MEASURED
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if key not in known:
            self.suite.tell(f"{self.run.name}: {key}", 1.0)
            known[key] = measure()
            write_json(path, known)
        return known[key]

    def crowd(self, seed: int = 0) -> ReferenceCrowd:
        """The reference crowd of G training windows drawn by ``seed``."""
        folder = self.folder / f"crowd-{seed}"
        if not folder.exists():
            aside = folder.with_suffix(".partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            shutil.copyfile(self.folder / "config.json", aside / "config.json")
            record_crowd(self.model, self.suite.corpus.train, aside, seed=seed)
            os.replace(aside, folder)
        found = reference.load(folder, self.model)
        assert found is not None, "the crowd was recorded"
        return found

    def fill(self, seed: int = 0) -> Fill:
        return Fill("reference", self.crowd(seed))

    def score(
        self,
        mode: Mode,
        *,
        temperature: float = 0.0,
        skip_below: float = 0.0,
        crowd: int = 0,
        rivals: int | None = None,
    ) -> Evaluation:
        """The mode's perplexity and experts a token, beside the crowd of that seed, of whom a row at temperature 0 must
        beat ``rivals`` (None: all)."""
        key = f"{mode} T={temperature:g} skip={skip_below:g} crowd={crowd}" if mode.startswith("private") else mode
        if rivals is not None:
            key += f" rivals={rivals}"

        def measure() -> dict[str, Any]:
            fill = self.fill(crowd) if self.config.is_grouped else Fill("none", None)
            if rivals is not None and fill.crowd is not None:
                fill.crowd.rivals = rivals
            evaluator = Evaluator(
                self.model, self.suite.windows(), fill, self.suite.corpus.tokenizer, self.suite.kernels
            )
            return evaluator.run(mode, temperature=temperature, skip_below=skip_below).as_dict()

        return Evaluation(**self.measured(key, measure))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from None


def _save(path: Path, stream: np.ndarray) -> None:
    with whole(path) as partial, partial.open("wb") as file:
        np.save(file, stream)
