"""The trainer: AdamW or Muon, warm-up and cosine, gradient clipping, temperature annealing, exact resume.

Knows text, models and one process's time; nothing of serving. A run's folder holds ``tokenizer.json``, the newest
``state.pt`` (replaced whole, never half-written), ``log.jsonl`` and, at the end, the checkpoint that the server loads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attend_whole_sequences
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.data import WindowSampler, documents, encode_corpus, read_text
from model.errors import TrainingError
from model.joint import JointSequences, joint_loss
from model.mixing import ExpertBank, WholeSequences
from model.optimizer import Muon
from model.recipe import TrainSettings
from model.token_choice import TrainedTokenChoice
from model.tokenizer import END_OF_TEXT, Tokenizer
from model.tokenizer import FILE as TOKENIZER_FILE
from model.transformer import Mix, Transformer


@dataclass(frozen=True)
class Progress:
    """One step's news."""

    step: int
    steps: int
    loss: float  # nats per token
    learning_rate: float
    temperature: float
    balance: float  # token choice's balance loss, mean over layers: about 1 when even; 0 for other kinds
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def prepare_corpus(folder: Path, files: list[Path], *, vocab_size: int) -> tuple[Tokenizer, Any]:
    """The run's tokenizer (already in the folder, or trained on the files) and the encoded stream."""
    if not files:
        raise TrainingError("data: at least one text file is needed")
    text = f"\n{END_OF_TEXT}\n".join(read_text(file) for file in files)
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        tokenizer = Tokenizer.train(documents(text), vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise TrainingError(f"vocab_size ({vocab_size}) is smaller than the tokenizer's {tokenizer.vocab_size}")
    tokenizer.save(folder)
    return tokenizer, encode_corpus(tokenizer, text)


def _apply(choice: TrainedTokenChoice, layer: int, bank: ExpertBank, x: Tensor) -> Tensor:
    return choice(layer, bank, x)


class Trainer:
    """Owns model, optimizer and step counter of one run."""

    def __init__(self, config: ModelConfig, settings: TrainSettings, stream: Any, folder: Path) -> None:
        settings.check(config)
        self.config, self.settings, self.folder = config, settings, folder
        self.sampler = WindowSampler(stream, batch=settings.batch, length=settings.length, seed=settings.seed)
        self.model = Transformer(config)
        self.model.initialize(settings.seed)
        self.optimizers = self._optimizers()
        self.positions = torch.arange(settings.length).repeat(settings.batch + settings.joint_copies)
        self.step = 0
        self._loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = (
            torch.compile(self._plain_loss) if settings.compile else self._plain_loss
        )
        # How many rows an expert has is data, which no compiled graph may depend on.
        self._choose: Callable[..., Tensor] = _apply
        if settings.compile:
            self._choose = torch.compiler.disable(_apply)  # type: ignore[no-untyped-call]

    @classmethod
    def prepare(
        cls,
        config: ModelConfig,
        settings: TrainSettings,
        files: list[Path],
        folder: Path,
        *,
        start: Path | None = None,
    ) -> Trainer:
        """A trainer on text files, with the folder's tokenizer or a new one; ``start``: from this checkpoint's weights,
        configuration and tokenizer instead. Raises TrainingError or CheckpointError."""
        begun: Transformer | None = None
        if start is not None:
            begun = load_model(start, dtype=torch.float32)
            config = begun.config
            if not (start / TOKENIZER_FILE).exists():
                raise TrainingError(f"{start / TOKENIZER_FILE}: not found; training goes on with the same tokenizer")
            shutil.copyfile(start / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        settings.check(config)
        tokenizer, stream = prepare_corpus(folder, files, vocab_size=config.vocab_size)
        end = tokenizer.id_of(END_OF_TEXT)
        trainer = cls(config.replace(bos_token_id=end, eos_token_id=end), settings, stream, folder)
        if begun is not None:
            trainer.model.load_state_dict(begun.state_dict())
        return trainer

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Weight decay on matrices only: not on norms, biases, embeddings or controllers (whose scale is the
        temperature's business)."""
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            is_matrix = parameter.dim() >= 2 and not name.startswith(("wte", "wpe", "lm_head"))
            (matrices if is_matrix and not name.endswith("controller") else rest).append(parameter)
        decay = self.settings.weight_decay
        if self.settings.optimizer == "muon":
            return [
                Muon(matrices, lr=self.settings.learning_rate, weight_decay=decay),
                torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0),
            ]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95))]

    def _plain_loss(self, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``ids [batch, length + 1]`` to what is minimised, the loss to report (the mean cross-entropy in nats per
        token), and token choice's balance loss."""
        batch, copies = ids.shape[0], self.settings.joint_copies
        inputs, targets = ids[:, :-1], ids[:, 1:]
        weight, capacity_factor = self.settings.token_choice(self.config)
        choice = TrainedTokenChoice(capacity_factor)
        mix: Mix = functools.partial(self._choose, choice)
        if self.config.is_grouped:
            mix = WholeSequences(self.config, batch, temperature=temperature)
        if copies:
            inputs = torch.cat((inputs, inputs[:copies]))
            mix = JointSequences(self.config, batch, copies, temperature=temperature)
        rows = batch + copies
        hidden = self.model(
            inputs.reshape(-1),
            self.positions,
            lambda layer, qkv: attend_whole_sequences(qkv, rows, self.config.n_head),
            mix,
        )
        logits = self.model.logits(hidden)
        if copies:
            loss = joint_loss(
                logits.view(rows, self.settings.length, -1), targets, copies,
                weight=self.settings.joint_weight, distill=self.settings.joint_distill,
            )  # fmt: skip
        else:
            loss = F.cross_entropy(logits.float(), targets.reshape(-1))
        if not choice.balance:
            return loss, loss, torch.zeros(())
        balance = torch.stack(choice.balance)
        return loss + weight * balance.sum(), loss, balance.mean()

    def train_step(self) -> Progress:
        """One optimizer step."""
        began = time.perf_counter()
        settings = self.settings
        rate = settings.rate(self.step)
        temperature = self._temperature()
        for optimizer in self.optimizers:
            factor = settings.matrix_rate if isinstance(optimizer, Muon) else 1.0
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        autocast = torch.autocast("cpu", torch.bfloat16) if settings.autocast else contextlib.nullcontext()
        with autocast:
            # A tensor, so that a compiled graph is not compiled again at each temperature.
            minimised, loss, balance = self._loss(self.sampler.batch(self.step), torch.tensor(temperature))
        minimised.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        speed = settings.batch * settings.length / (time.perf_counter() - began)
        even = float(balance.detach())
        return Progress(self.step, settings.steps, float(loss.detach()), rate, temperature, even, speed)

    def _temperature(self) -> float:
        """The mixing temperature of the step at hand: annealed for MoT only."""
        start = self.config.temperature
        return self.settings.temperature(self.step, start) if self.config.is_mot else start

    def run(self) -> Iterator[Progress]:
        """Train to the end, saving the state as it goes; ends with ``export``. Raises TrainingError when the loss is
        no longer a number."""
        path = self.folder / "log.jsonl"
        _cut_log(path, self.step)
        with path.open("a") as log:
            while self.step < self.settings.steps:
                progress = self.train_step()
                if not math.isfinite(progress.loss):
                    raise TrainingError(f"the loss became {progress.loss} at step {progress.step}; lower learning_rate")
                log.write(json.dumps(dataclasses.asdict(progress)) + "\n")
                log.flush()
                if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
                    self.save_state()
                yield progress
        self.export(torch.bfloat16)

    def save_state(self) -> None:
        """Everything that ``resume`` needs, in one file that appears whole or not at all."""
        state = {
            "config": dataclasses.asdict(self.config),
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.folder / "state.pt.partial"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / "state.pt")

    def resume(self) -> bool:
        """Continue from the folder's state, if there is one. Raises TrainingError when it is of another run."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        for name, mine, defaults in (
            ("config", dataclasses.asdict(self.config), dataclasses.asdict(ModelConfig())),
            ("settings", dataclasses.asdict(self.settings), dataclasses.asdict(TrainSettings())),
        ):
            saved = defaults | state[name]  # what a state of an older version does not name had its default
            changed = [key for key, value in mine.items() if saved[key] != value]
            if changed:
                raise TrainingError(
                    f"{path}: belongs to a run with another {', '.join(changed)}; choose another folder"
                )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        return True

    def export(self, dtype: torch.dtype) -> None:
        """Write the checkpoint that the server loads, at the temperature that training has reached."""
        self.model.config = self.config.replace(temperature=self._temperature())
        save_model(self.model, self.folder, dtype=dtype)
        self.model.config = self.config


def _cut_log(path: Path, step: int) -> None:
    """Drop what was logged after ``step``, or half a line, before a run that ended early is taken up again there."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
