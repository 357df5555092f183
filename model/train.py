"""The trainer: AdamW or Muon, warm-up and cosine, gradient clipping, temperature annealing, exact resume.

Knows text, models and one process's time; nothing of serving. A run's folder holds ``tokenizer.json``, the newest
``state.pt`` (replaced whole, never half-written), ``log.jsonl`` and, at the end, the checkpoint that the server loads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attend_whole_sequences
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.data import WindowSampler, documents, encode_corpus, read_text
from model.errors import TrainingError
from model.joint import JointSequences, joint_loss
from model.mixing import WholeSequences
from model.optimizer import Muon
from model.tokenizer import END_OF_TEXT, Tokenizer
from model.tokenizer import FILE as TOKENIZER_FILE
from model.transformer import Mix, Transformer


@dataclass(frozen=True)
class TrainSettings:
    """One run. Lengths are in tokens; the batch is ``batch`` windows of ``length`` tokens a step.

    The temperature stays at the configuration's until ``anneal_from`` of the steps are done, then falls
    geometrically to ``final_temperature`` (DESIGN of the layer: a sharper softmax is cheaper to decode privately).
    """

    steps: int = 3000
    batch: int = 16
    length: int = 256
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: weight matrices by Muon, the rest by AdamW
    learning_rate: float = 2e-3
    matrix_rate: float = 2.0  # Muon's rate over AdamW's
    final_rate_fraction: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    final_temperature: float = 0.1
    anneal_from: float = 0.6
    joint_copies: int = 0  # sequences of a step that also decode unmixed, see model/joint.py
    joint_weight: float = 0.35  # of the copies' loss
    joint_distill: float = 0.5  # share of the mixed mode's prediction in the copies' target
    seed: int = 0
    save_every: int = 200
    autocast: bool = False
    compile: bool = False

    def check(self, config: ModelConfig) -> None:
        """Raises TrainingError naming the setting and the reason."""
        for name in ("steps", "batch", "length", "save_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.length > config.n_positions:
            raise TrainingError(f"length ({self.length}) exceeds the model's n_positions ({config.n_positions})")
        if config.is_mot and self.batch % config.group_size:
            raise TrainingError(
                f"batch ({self.batch}) must be a multiple of group_size ({config.group_size}): "
                "a group is filled with sequences of the batch"
            )
        for name in ("learning_rate", "matrix_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.optimizer not in ("adamw", "muon"):
            raise TrainingError(f"optimizer must be adamw or muon, not {self.optimizer}")
        if not 0 <= self.warmup <= self.steps:
            raise TrainingError(f"warmup ({self.warmup}) must lie between 0 and steps ({self.steps})")
        if not 0 <= self.anneal_from <= 1:
            raise TrainingError(f"anneal_from ({self.anneal_from}) must lie between 0 and 1")
        if not 0 <= self.joint_copies <= self.batch:
            raise TrainingError(f"joint_copies ({self.joint_copies}) must lie between 0 and batch ({self.batch})")
        if self.joint_copies and (not config.is_mot or config.emit_softmax_over_experts or config.use_discrete_routing):
            raise TrainingError("joint_copies: only for a mot model with one softmax over tokens")
        if not (0 <= self.joint_weight < float("inf") and 0 <= self.joint_distill <= 1):
            raise TrainingError("joint_weight must not be negative and joint_distill must lie between 0 and 1")
        if config.is_mot and not 0 < self.final_temperature <= config.temperature:
            raise TrainingError(
                f"final_temperature ({self.final_temperature}) must lie above 0 and not above the starting "
                f"temperature ({config.temperature})"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 0: linear warm-up, then cosine to the final fraction."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = self.final_rate_fraction
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    def temperature(self, step: int, start: float) -> float:
        done = (step / self.steps - self.anneal_from) / max(1e-9, 1 - self.anneal_from)
        if done <= 0 or self.anneal_from >= 1:
            return start
        return float(
            start * (self.final_temperature / start) ** min(1.0, done * 1.1)
        )  # the last tenth stays at the end


@dataclass(frozen=True)
class Progress:
    """One step's news."""

    step: int
    steps: int
    loss: float  # nats per token
    learning_rate: float
    temperature: float
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def preset_named(name: str, changes: dict[str, Any]) -> tuple[ModelConfig, TrainSettings]:
    """A model and how to train it, with some settings changed. ``demo`` is the bundled checkpoint's recipe: 16 times
    the feed-forward parameters of the dense model with the same FLOPs; ``tiny`` is done in seconds. Raises
    TrainingError for another name."""
    if name == "demo":
        config = ModelConfig(
            vocab_size=4096,
            n_positions=256,
            n_embd=256,
            n_layer=4,
            n_head=8,
            group_size=16,
            n_expert=64,
            expert_size=72,
        )
        settings = TrainSettings(
            steps=1900, optimizer="muon", learning_rate=3e-3, matrix_rate=1.5, warmup=60, final_rate_fraction=0.03,
            save_every=100, compile=True,
        )  # fmt: skip
    elif name == "tiny":
        config = ModelConfig(
            vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=4, group_size=4, n_expert=8, expert_size=32
        )
        settings = TrainSettings(steps=50, batch=8, length=64, warmup=10, save_every=25)
    else:
        raise TrainingError(f"preset must be demo or tiny, not {name!r}")
    settings = dataclasses.replace(settings, **changes)
    return config, dataclasses.replace(settings, warmup=min(settings.warmup, settings.steps))


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
        self._loss: Callable[[Tensor, Tensor], Tensor] = (
            torch.compile(self._plain_loss) if settings.compile else self._plain_loss
        )

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

    def _plain_loss(self, ids: Tensor, temperature: Tensor) -> Tensor:
        """``ids [batch, length + 1]`` to the mean cross-entropy in nats per token."""
        batch, copies = ids.shape[0], self.settings.joint_copies
        inputs, targets = ids[:, :-1], ids[:, 1:]
        mix: Mix = WholeSequences(self.config, batch, temperature=temperature)
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
            return joint_loss(
                logits.view(rows, self.settings.length, -1), targets, copies,
                weight=self.settings.joint_weight, distill=self.settings.joint_distill,
            )  # fmt: skip
        return F.cross_entropy(logits.float(), targets.reshape(-1))

    def train_step(self) -> Progress:
        """One optimizer step."""
        began = time.perf_counter()
        settings = self.settings
        rate = settings.rate(self.step)
        temperature = settings.temperature(self.step, self.config.temperature)
        for optimizer in self.optimizers:
            factor = settings.matrix_rate if isinstance(optimizer, Muon) else 1.0
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        autocast = torch.autocast("cpu", torch.bfloat16) if settings.autocast else contextlib.nullcontext()
        with autocast:
            # A tensor, so that a compiled graph is not compiled again at each temperature.
            loss = self._loss(self.sampler.batch(self.step), torch.tensor(temperature))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        speed = settings.batch * settings.length / (time.perf_counter() - began)
        return Progress(self.step, settings.steps, float(loss.detach()), rate, temperature, speed)

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
        for name, mine in (
            ("config", dataclasses.asdict(self.config)),
            ("settings", dataclasses.asdict(self.settings)),
        ):
            changed = [key for key, value in mine.items() if state[name].get(key) != value]
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
        final = self.config
        if final.is_mot:
            final = final.replace(temperature=self.settings.temperature(self.step, final.temperature))
        self.model.config = final
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
