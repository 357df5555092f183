"""Kernels by themselves: time against what reading their bytes, or multiplying so often, must take on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.groups import PrivateRows
from model.memory import Workspace
from model.mixing import ExpertBank
from model.native import Kernels
from model.transformer import Transformer
from server.bench.machine import Limits, Machine, seconds_of
from server.bench.shapes import random_model
from server.engine.plan import Chunk
from server.engine.request import EngineRequest, SamplingParams, Sequence
from server.engine.sampler import Sampler
from server.loading import quantize_experts

_LAYERS = 4  # banks that take turns, so that none is still in a cache
_CONTEXT = 128  # tokens that attention looks back on


@dataclass(frozen=True)
class KernelResult:
    """``groups``: groups, rows or sequences at once. Fractions are of the machine's limits as measured just before, of
    the bytes and operations that this mode must read and do at least (``limits.matmul_dtype`` says in which type the
    machine multiplies fastest); ``bmm_`` is torch's batched product on the same
    experts, where it is the plain alternative. ``experts``: used by a row, where that varies."""

    kernel: str
    shape: str
    dtype: str
    mode: str
    groups: int
    limits: Limits
    seconds: float
    fraction_of_bandwidth: float
    fraction_of_matmul: float
    bmm_seconds: float | None = None
    bmm_fraction_of_bandwidth: float | None = None
    bmm_fraction_of_matmul: float | None = None
    experts: float | None = None

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["limits"]
        return values | self.limits.as_dict()


class KernelBench:
    """Measures one shape in one type. ``kernels`` None: the plain path, whose figures are torch's."""

    def __init__(
        self,
        shape: str,
        config: ModelConfig,
        dtype: torch.dtype,
        machine: Machine,
        kernels: Kernels | None,
        *,
        quantized: bool = False,
    ) -> None:
        self._named: dict[str, Any] = {"shape": shape, "dtype": "int8" if quantized else str(dtype).split(".")[1]}
        self._config = config.replace(n_layer=min(config.n_layer, _LAYERS), vocab_size=min(config.vocab_size, 8192))
        self._vocabulary, self._machine, self._kernels = config.vocab_size, machine, kernels
        self._limits = machine.limits()
        self._model, self._fill = random_model(self._config, dtype=dtype, device=machine.device)
        self._banks = self._model.banks
        self._turn = 0
        if quantized:
            quantize_experts(self._model)
        self._arranged = self._banks
        if kernels is not None:
            self._arranged = _as_wanted(kernels, self._model)
            kernels.measure(self._arranged[0])

    @torch.inference_mode()
    def run(self, groups: list[int], modes: list[str]) -> Iterator[KernelResult]:
        for mode in modes:
            for count in groups:
                yield getattr(self, f"_{mode}")(count)

    def _next(self) -> int:
        self._turn = (self._turn + 1) % len(self._banks)
        return self._turn

    def _public(self, count: int) -> KernelResult:
        """Mixes through all experts."""
        bank = self._banks[0]
        mixes = torch.randn(bank.lin1.shape[0], count, bank.lin1.shape[1], device=bank.lin1.device)
        cast = mixes.to(bank.controller.dtype)
        read, operations = _bytes(bank.lin1, bank.lin2), 2 * count * (bank.lin1.numel() + bank.lin2.numel())
        plain = taken = self._time(lambda: self._banks[self._next()].experts(cast))
        fractions = least = self._fractions(plain, read, operations)
        if self._kernels is not None and self._kernels.prefers(count, self._arranged[0]):
            kernels, workspace = self._kernels, Workspace()

            def native() -> Tensor:
                return kernels.bank(mixes, self._arranged[self._next()], workspace)

            taken = self._time(native)
            fractions = self._fractions(taken, read, operations)
        return KernelResult(
            "bank", **self._named, mode="public", groups=count, limits=self._limits, seconds=taken, **fractions,
            bmm_seconds=plain, **{f"bmm_{name}": value for name, value in least.items()},
        )  # fmt: skip

    def _private(self, count: int) -> KernelResult:
        return self._private_rows(count, "private", self._config.temperature, 0.01)

    def _private_unmixed(self, count: int) -> KernelResult:
        return self._private_rows(count, "private_unmixed", 0.0, 0.0)

    def _private_rows(self, count: int, mode: str, temperature: float, skip_below: float) -> KernelResult:
        """The whole private layer: weights, mixes, the experts in use, redistribution."""
        device = self._model.device
        rows = PrivateRows(
            self._config, self._fill,
            positions=torch.arange(count, device=device) % self._config.n_positions,
            temperatures=torch.full((count,), temperature, device=device),
            skip_below=torch.full((count,), skip_below, device=device),
            live=torch.ones(count, dtype=torch.bool, device=device),
            kernels=self._kernels,
        )  # fmt: skip
        # Rows like the crowd's own: about E/G experts are won at T = 0.
        x = torch.randn(count, self._config.n_embd, device=device).to(self._model.dtype)
        calls = 0

        def layer() -> Tensor:
            nonlocal calls
            calls += 1
            turn = self._next()
            return rows(turn, self._arranged[turn], x)

        seconds = self._time(layer)
        used = float(rows.experts_used.sum()) / calls
        bank = self._banks[0]
        one = _bytes(bank.lin1[0], bank.lin2[0])
        return KernelResult(
            "private_layer", **self._named, mode=mode, groups=count, limits=self._limits, seconds=seconds,
            **self._fractions(seconds, min(used, len(bank.lin1)) * one, 4 * used * bank.lin1[0].numel()),
            experts=used / count,
        )  # fmt: skip

    def _attention(self, count: int) -> KernelResult:
        """Decoding: one query a sequence over its paged keys and values."""
        config, device, dtype = self._config, self._model.device, self._model.dtype
        blocks = -(-_CONTEXT // 16)
        shape = (count * blocks + 1, 16, config.n_head, config.head_size)
        keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        queries = torch.randn(count, config.n_head, config.head_size, device=device)
        tables = torch.randperm(count * blocks, device=device).view(count, blocks) + 1
        lengths = torch.full((count,), _CONTEXT, device=device)
        read = 2 * count * _CONTEXT * config.n_embd * dtype.itemsize
        operations = 4 * count * _CONTEXT * config.n_embd

        def gathered() -> Tensor:
            k, v = (side[tables].flatten(1, 2).transpose(1, 2) for side in (keys, values))
            return torch.nn.functional.scaled_dot_product_attention(queries.to(dtype)[:, :, None], k, v)

        plain = self._time(gathered)
        taken = plain
        if self._kernels is not None:
            kernels = self._kernels
            taken = self._time(lambda: kernels.attend(queries, keys, values, tables, lengths))
        return KernelResult(
            "attention", **self._named, mode="decode", groups=count, limits=self._limits, seconds=taken,
            **self._fractions(taken, read, operations), bmm_seconds=plain,
        )  # fmt: skip

    def _sampling(self, count: int) -> KernelResult:
        """Temperature and top_p over the whole vocabulary, for so many sequences."""
        logits = torch.randn(count, self._vocabulary, device=self._model.device)
        request = EngineRequest("bench", ((1,),), SamplingParams(temperature=0.8, top_p=0.95, seed=1))
        sampler = Sampler(None, self._kernels)
        chunks = tuple(Chunk(Sequence(request, 0, number), 0, 1) for number in range(count))
        seconds = self._time(lambda: sampler.sample(logits, chunks))
        return KernelResult(
            "sampling", **self._named, mode="top_p", groups=count, limits=self._limits, seconds=seconds,
            **self._fractions(seconds, _bytes(logits), 0),
        )  # fmt: skip

    def _time(self, work: Callable[[], object]) -> float:
        self._limits = self._machine.limits()
        return seconds_of(work, repeats=9, device=self._model.device)

    def _fractions(self, seconds: float, read: float, operations: float) -> dict[str, Any]:
        return {
            "fraction_of_bandwidth": read / seconds / self._limits.bandwidth,
            "fraction_of_matmul": operations / seconds / self._limits.matmul,
        }


MODES = ("public", "private", "private_unmixed", "attention", "sampling")


def _as_wanted(kernels: Kernels, model: Transformer) -> list[ExpertBank]:
    """The experts in the kernels' order; a copy, as torch is measured on the others."""
    if not kernels.tiles or model.dtype is not torch.bfloat16:
        return model.banks
    arranged = copy.deepcopy(model)
    kernels.arrange(arranged)
    return arranged.banks


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
