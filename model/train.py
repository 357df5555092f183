"""The trainer: one run's steps, its states and log as it goes, and the checkpoint at the end.

Knows text, models and one process's place among those that train together; nothing of serving. A run's folder holds
``tokenizer.json``, the newest ``state.pt`` (replaced whole, never half-written), ``log.jsonl`` and, at the end, the
checkpoint that the server loads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.data import WindowSampler, documents, encode_corpus, read_text
from model.errors import TrainingError
from model.evaluate import Evaluation, Evaluator, windows_of
from model.groups import Fill
from model.objective import Figures, Objective
from model.optimizer import build_optimizers, set_rates
from model.recipe import TrainSettings
from model.run_state import LOG, cut_log, log_line, read_state, write_state
from model.temperatures import Temperatures, folded, overall
from model.tokenizer import END_OF_TEXT, Tokenizer
from model.tokenizer import FILE as TOKENIZER_FILE
from model.transformer import Transformer
from model.workers import Workers


@dataclass(frozen=True)
class Progress:
    """One step's news. What the run has not, or the step did not measure, is None. Losses are means over the batch in
    nats per token."""

    step: int
    steps: int
    loss: float  # of mixed decoding (dense and token choice: of decoding)
    joint_loss: float | None  # what a joint run minimises: ``loss`` plus the weighted loss of the copies
    private_loss: float | None  # cross-entropy of the copies, which decode unmixed
    learning_rate: float
    gradient_norm: float  # before clipping
    temperature: float  # geometric mean over layers and experts: the checkpoint's
    temperature_min: float
    temperature_max: float
    mixing_entropy: float | None  # mean over groups, experts and layers, over log G
    balance: float  # token choice's balance loss, mean over layers: about 1 when even; 0 for other kinds
    tokens_per_second: float
    validation_bits_per_byte: float | None = None
    validation_perplexity: float | None = None  # both of mixed decoding, on the held-out windows

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Validation:
    """Held-out text: windows ``[n, length + 1]`` and the tokenizer, which counts their bytes."""

    windows: Tensor
    tokenizer: Tokenizer

    @classmethod
    def read(cls, file: Path, tokenizer: Tokenizer, settings: TrainSettings, config: ModelConfig) -> Validation:
        """Raises TrainingError when the text is shorter than one group of windows."""
        size = config.group_size if config.is_grouped else 1
        windows = windows_of(
            encode_corpus(tokenizer, read_text(file)), settings.length, -(-settings.eval_windows // size) * size
        )
        if len(windows) < size:
            raise TrainingError(f"validation: {len(windows)} windows are fewer than one group ({size}) needs")
        return cls(windows, tokenizer)


def prepare_corpus(
    folder: Path, files: list[Path], *, vocab_size: int, workers: Workers | None = None
) -> tuple[Tokenizer, np.ndarray]:
    """The run's tokenizer (already in the folder, or trained on the files, by the first of the workers) and the
    encoded stream. Raises TrainingError."""
    if not files:
        raise TrainingError("data: at least one text file is needed")
    workers = workers or Workers()
    text = f"\n{END_OF_TEXT}\n".join(read_text(file) for file in files)
    if workers.is_first and not (folder / TOKENIZER_FILE).exists():
        Tokenizer.train(documents(text), vocab_size).save(folder)
    workers.wait()
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None, "it was there or was just written"
    if tokenizer.vocab_size > vocab_size:
        raise TrainingError(f"vocab_size ({vocab_size}) is smaller than the tokenizer's {tokenizer.vocab_size}")
    return tokenizer, encode_corpus(tokenizer, text)


class Trainer:
    """Owns model, optimizers and step counter of one run, as one of the ``workers`` (default: alone, on the CPU)."""

    def __init__(
        self,
        config: ModelConfig,
        settings: TrainSettings,
        stream: np.ndarray,
        folder: Path,
        *,
        workers: Workers | None = None,
        validation: Validation | None = None,
    ) -> None:
        self.workers = workers or Workers()
        settings.check(config, self.workers.count)
        self.config, self.settings, self.folder = config, settings, folder
        self.validation = validation
        self.sampler = WindowSampler(stream, batch=settings.batch, length=settings.length, seed=settings.seed)
        self.model = Transformer(config)
        self.model.initialize(settings.seed)
        self.model.to(self.workers.device)
        self.temperatures = Temperatures(config, settings).to(self.workers.device)
        self.optimizers = build_optimizers(self.model, list(self.temperatures.parameters()), settings)
        parts = self.workers.count * settings.accumulate
        self.objective = Objective(
            self.model,
            settings,
            batch=settings.batch // parts,
            copies=settings.joint_copies // parts,
            device=self.workers.device,
        )
        self.step = 0

    @classmethod
    def prepare(
        cls,
        config: ModelConfig,
        settings: TrainSettings,
        files: list[Path],
        folder: Path,
        *,
        start: Path | None = None,
        workers: Workers | None = None,
        validation: Path | None = None,
    ) -> Trainer:
        """A trainer on text files, with the folder's tokenizer or a new one; ``start``: from this checkpoint's weights,
        sizes and tokenizer instead (group size and temperature are still ``config``'s); ``validation``: held-out text
        to evaluate on. Raises TrainingError or CheckpointError."""
        workers = workers or Workers()
        begun: Transformer | None = None
        if start is not None:
            begun = load_model(start, dtype=torch.float32)
            config = begun.config.replace(group_size=config.group_size, temperature=config.temperature)
            if not (start / TOKENIZER_FILE).exists():
                raise TrainingError(f"{start / TOKENIZER_FILE}: not found; training goes on with the same tokenizer")
            if workers.is_first:
                shutil.copyfile(start / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        settings.check(config, workers.count)
        tokenizer, stream = prepare_corpus(folder, files, vocab_size=config.vocab_size, workers=workers)
        end = tokenizer.id_of(END_OF_TEXT)
        config = config.replace(bos_token_id=end, eos_token_id=end)
        held_out = None if validation is None else Validation.read(validation, tokenizer, settings, config)
        trainer = cls(config, settings, stream, folder, workers=workers, validation=held_out)
        if begun is not None:
            trainer.model.load_state_dict(begun.state_dict())
        return trainer

    def train_step(self) -> Progress:
        """One optimizer step."""
        began = time.perf_counter()
        rate = self.settings.rate(self.step)
        set_rates(self.optimizers, rate, self.settings)
        figures, table = self._gradients()
        if not self.settings.learns_temperature(self.step):
            for parameter in self.temperatures.parameters():
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        minimised, loss, private, balance, entropy = figures.tolist()
        joint = self.settings.joint_copies > 0
        return Progress(
            step=self.step,
            steps=self.settings.steps,
            loss=loss,
            joint_loss=minimised if joint else None,
            private_loss=private if joint else None,
            learning_rate=rate,
            gradient_norm=float(norm),
            temperature=overall(table),
            temperature_min=float(table.min()),
            temperature_max=float(table.max()),
            mixing_entropy=entropy if self.config.is_mot else None,
            balance=balance,
            tokens_per_second=self.settings.batch * self.settings.length / (time.perf_counter() - began),
        )

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.model.parameters(), *self.temperatures.parameters()]

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """Leaves the batch's mean gradients on the parameters. Returns the means of ``Figures``, in their order, and
        the temperatures used ``[layers, 1 or E]``."""
        device, count = self.workers.device, self.settings.accumulate
        autocast = torch.autocast(device.type, torch.bfloat16) if self.settings.autocast else contextlib.nullcontext()
        parts = self.sampler.batch(self.step).chunk(self.workers.count * count)
        means = torch.zeros(len(Figures._fields), device=device)
        for ids in parts[self.workers.rank * count : (self.workers.rank + 1) * count]:
            table = self.temperatures.at(self.step)
            with autocast:
                # Temperatures are a tensor, so that a compiled graph is not compiled again at each of them.
                figures = self.objective(ids.to(device), table.float().to(device))
            (figures.minimised / count).backward()  # type: ignore[no-untyped-call]
            means += torch.stack([figure.detach().float() for figure in figures]) / count
        gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        self.workers.average([means, *gradients])
        return means, table.detach()

    def evaluate(self) -> Evaluation:
        """Mixed decoding of the held-out windows, as ``motserve eval`` would find it for the checkpoint in float32."""
        assert self.validation is not None
        with self.as_checkpoint():
            evaluator = Evaluator(self.model, self.validation.windows, Fill("none", None), self.validation.tokenizer)
            return evaluator.run("mixed", temperature=0, skip_below=0)

    def as_checkpoint(self) -> contextlib.AbstractContextManager[None]:
        """Meanwhile the model is as ``export`` writes it, at the temperatures that training has reached."""
        return folded(self.model, self.temperatures.at(self.step).detach())

    def run(self) -> Iterator[Progress]:
        """Train to the end, saving the state as it goes; ends with ``export``. Only the first of the workers evaluates
        and writes. Raises TrainingError when the loss is no longer a number."""
        if self.workers.is_first:
            cut_log(self.folder, self.step)
        with (self.folder / LOG).open("a") if self.workers.is_first else contextlib.nullcontext() as log:
            while self.step < self.settings.steps:
                progress = self.train_step()
                if not math.isfinite(progress.loss):
                    raise TrainingError(f"the loss became {progress.loss} at step {progress.step}; lower learning_rate")
                if log is not None:
                    if self.validation is not None and self._is_due(self.settings.eval_every):
                        found = self.evaluate()
                        progress = dataclasses.replace(
                            progress,
                            validation_bits_per_byte=found.bits_per_byte,
                            validation_perplexity=found.perplexity,
                        )
                    log.write(log_line(progress.as_dict()))
                    log.flush()
                    if self._is_due(self.settings.save_every):
                        self.save_state()
                yield progress
        if self.workers.is_first:
            self.export()
        self.workers.wait()

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.steps

    def save_state(self) -> None:
        """Everything that ``resume`` needs."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "temperatures": self.temperatures.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        write_state(self.folder, self.config, self.settings, state)

    def resume(self) -> bool:
        """Continue from the folder's state, if there is one. Raises TrainingError when it is of another run."""
        state = read_state(self.folder, self.config, self.settings)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.temperatures.load_state_dict(state.get("temperatures", {}))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        return True

    def export(self) -> None:
        """Write the checkpoint that the server loads."""
        with self.as_checkpoint():
            save_model(
                self.model,
                self.folder,
                dtype=getattr(torch, self.settings.export_dtype),
                shard_bytes=self.settings.shard_bytes,
            )
