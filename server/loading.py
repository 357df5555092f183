"""From settings to a running engine: checkpoint, crowd, tokenizer, devices and memory.

The one place where settings, model and engine meet.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from model import reference
from model.calibrate import PRIVATE_FILE
from model.checkpoint import load_model
from model.config import ModelConfig
from model.errors import CheckpointError
from model.groups import Fill
from model.kv_cache import bytes_per_block
from model.native import Kernels, NativeUnavailable, computes_in_bfloat16, open_kernels
from model.spread import load_curve
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from server.config import Settings
from server.engine.admission import Admission
from server.engine.async_engine import AsyncEngine, EngineInfo
from server.engine.engine import Engine
from server.engine.grouping import GroupingPolicy
from server.engine.loop import EngineThread
from server.engine.model_runner import ModelRunner, measure_balance
from server.engine.request import Privacy
from server.engine.scheduler import SchedulerLimits
from server.engine.spread import SpreadLoss, loss_at

DEMO = Path(__file__).parent / "demo"  # the bundled demonstration checkpoint
BLOCK_SIZE = 16  # tokens of one KV block
FEW_PREFILL_TOKENS, MANY_PREFILL_TOKENS = 192, 512  # a step, unless set


_log = logging.getLogger("motserve")


@dataclass(frozen=True)
class Loaded:
    """An engine and what the server must know to talk about it."""

    engine: AsyncEngine
    admission: Admission
    name: str
    folder: Path


def resolve_device(name: str) -> torch.device:
    """Raises ValueError naming ``device`` when it is not there or unknown."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: {name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is not available on this machine")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the machine computes in it, float32 elsewhere (CPUs without AMX or AVX512-BF16 are
    many times slower in bfloat16). Raises ValueError naming ``dtype`` for another name."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name != "auto":
        if name not in known:
            raise ValueError(f"dtype: {name!r} is not one of auto, float32, bfloat16")
        return known[name]
    return torch.bfloat16 if device.type == "cuda" or computes_in_bfloat16() else torch.float32


def resolve_kernels(name: str, device: torch.device) -> Kernels | None:
    """The compiled kernels, or None for the plain path; the log says which and why. Raises ValueError naming
    ``kernels`` when native ones were asked for and cannot be had, or for another name."""
    if name not in ("auto", "native", "plain"):
        raise ValueError(f"kernels: {name!r} is not one of auto, native, plain")
    try:
        if name == "plain":
            raise NativeUnavailable("as asked for")
        if device.type != "cpu":
            raise NativeUnavailable("they are for CPUs")
        kernels = open_kernels()
    except NativeUnavailable as error:
        if name == "native":
            raise ValueError(f"kernels: native ones are not available: {error}") from None
        _log.info("plain kernels (torch): %s", error)
        return None
    _log.info("native kernels (compiled for this processor)")
    return kernels


def load_privacy(folder: Path, config: ModelConfig) -> Privacy:
    """The checkpoint's default pair from ``private.json``; without one, its temperature and every expert. Raises
    CheckpointError."""
    path = folder / PRIVATE_FILE
    if not path.exists():
        return Privacy(config.temperature, 0.0)
    try:
        values = json.loads(path.read_text())
        privacy = Privacy(float(values["private_temperature"]), float(values["private_skip_below"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: {error!r}") from None
    if not 0 <= privacy.temperature <= config.temperature:
        raise CheckpointError(f"{path}: private_temperature must lie between 0 and {config.temperature}")
    if not 0 <= privacy.skip_below < 1:
        raise CheckpointError(f"{path}: private_skip_below must lie between 0 and 1")
    return privacy


def load_spread(folder: Path, config: ModelConfig) -> SpreadLoss:
    """What distance costs the checkpoint, as ``motserve calibrate`` measured it; else the table of a small model that
    was trained to about its temperature. Raises CheckpointError."""
    curve = load_curve(folder)
    if curve is None:
        return loss_at(config.temperature)
    return SpreadLoss("own", tuple(spread for spread, _ in curve), tuple(nats for _, nats in curve))


def build_fill(settings: Settings, folder: Path, model: Transformer) -> Fill:
    """The fill that the settings ask for, with a warning where the checkpoint has no crowd."""
    if not model.config.is_grouped:
        return Fill("none", None)
    crowd = reference.load(folder, model) if settings.group_fill == "reference" else None
    if settings.group_fill == "reference" and crowd is None:
        _log.warning(
            "%s has no %s: groups are filled with zeros, which costs quality; record a crowd with `motserve calibrate`",
            folder,
            reference.FILE,
        )
    return Fill.build(settings.group_fill, model.config, model.banks, crowd)


def quantize_experts(model: Transformer) -> None:
    """Experts to int8, layer by layer. Raises ValueError for a model that has none."""
    if not model.banks:
        raise ValueError("quantize: int8 is for experts, and a dense model has none")
    for block, bank in zip(model.blocks, model.banks, strict=True):
        bank.quantize(block.ln_2.bias)


def load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    """Raises CheckpointError when the tokenizer has ids that the model lacks."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size} tokens, but the model's vocab_size is "
            f"{config.vocab_size}"
        )
    return tokenizer


def load(settings: Settings) -> Loaded:
    """Raises CheckpointError or ValueError, before any port opens."""
    folder = settings.model or DEMO
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = resolve_device(settings.device)
    model = load_model(folder, device=device, dtype=resolve_dtype(settings.dtype, device), large_pages=True)
    config = model.config
    if settings.quantize == "int8":
        quantize_experts(model)
    fill = build_fill(settings, folder, model)
    engine = build_engine(settings, model, fill, load_tokenizer(folder, config), load_spread(folder, config))
    info = EngineInfo(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        max_positions=config.n_positions,
        group_size=config.group_size if config.is_grouped else 1,
        temperature=config.temperature,
        default_privacy=load_privacy(folder, config),
        group_fill=fill.kind,
        reference_fingerprint=fill.crowd.fingerprint if fill.crowd is not None else None,
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        quantized=None if settings.quantize == "none" else settings.quantize,
        parameters=model.parameter_count,
        end_of_text=config.eos_token_id,
    )
    groups = engine.grouping.max_groups
    experts = "" if settings.quantize == "none" else f", experts in {settings.quantize}"
    _log.info("%s: %s%s, %s, %d decode groups before merging", folder.name, info.dtype, experts, info.device, groups)
    name = settings.served_model_name or (folder.resolve().name if settings.model else "motserve-demo")
    served = AsyncEngine(
        EngineThread(engine), info, engine.admission, engine.tokenizer, max_waiting=settings.max_waiting
    )
    return Loaded(served, engine.admission, name, folder)


def build_engine(
    settings: Settings, model: Transformer, fill: Fill, tokenizer: Tokenizer | None, spread: SpreadLoss | None = None
) -> Engine:
    """An engine around a model that is in memory; ``spread`` None: the table for its temperature. Raises ValueError
    naming the setting that does not fit."""
    config = model.config
    loss = loss_at(config.temperature) if spread is None else spread
    block_bytes = bytes_per_block(config, BLOCK_SIZE, model.dtype)
    blocks = settings.kv_cache_memory // block_bytes
    if blocks < 2:
        raise ValueError(f"kv_cache_memory: {settings.kv_cache_memory} bytes are less than two blocks of KV cache")
    # More than every running sequence at full length could use would only cost memory.
    blocks = min(blocks, settings.max_concurrent * -(-config.n_positions // BLOCK_SIZE) + 1)
    kernels = resolve_kernels(settings.kernels, model.device)
    runner = ModelRunner(model, fill, blocks=blocks, block_size=BLOCK_SIZE, kernels=kernels)
    projection = model.blocks[0].attn.c_attn
    if kernels is not None and not projection.in_tiles:
        kernels.measure_rows(projection.weight, projection.bias)
    if kernels is not None and config.is_grouped:
        kernels.measure(model.banks[0])
    balance = measure_balance(model.banks[0], kernels=kernels) if config.is_grouped else 1
    policy = GroupingPolicy(config.group_size, settings.position_window, settings.max_groups or balance, loss)
    swap_blocks = settings.swap_memory // block_bytes
    cohort = config.group_size if config.is_grouped else 1  # those who do not mix need not wait for each other
    public, private = _prefill_tokens(settings, balance * cohort)
    limits = SchedulerLimits(settings.max_concurrent, public, swap_blocks, cohort, private)
    return Engine(
        runner, policy, limits, tokenizer, blocks=blocks, align_wait=settings.max_align_wait / 1000,
        prompt_wait=settings.max_prompt_wait / 1000,
    )  # fmt: skip


def _prefill_tokens(settings: Settings, balanced: int) -> tuple[int, int]:
    """Of public and of private prompts, a step. As many public ones as ``balanced``, which a step has room for while
    it reads the weights, within bounds; private ones, which share nothing, and those of other models few, so that
    nobody waits long for his next token."""
    if settings.prefill_tokens is not None:
        return settings.prefill_tokens, settings.prefill_tokens
    return min(max(balanced, FEW_PREFILL_TOKENS), MANY_PREFILL_TOKENS), FEW_PREFILL_TOKENS
