"""The only place of the engine that touches the model's tensors: a plan and its groups in, logits out.

How a step is computed depends on where it runs: in one pass by the compiled kernels, in passes of fixed shapes on a
GPU, and elsewhere by torch alone. What they share is the promise: a private row's bits depend on that row alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.groups import Fill
from model.kv_cache import PagedKVCache
from model.mixing import ExpertBank
from model.native import Kernels, measurable_part
from model.transformer import Transformer
from server.engine.batch import Wanted
from server.engine.fixed_passes import FixedPasses
from server.engine.native_pass import NativePass
from server.engine.plain_passes import PlainPasses
from server.engine.plan import Chunk, Group, Plan
from server.engine.tallies import Tallies


@dataclass(frozen=True)
class StepLogits:
    """Float32 logits: one row for each of ``plan.sampling``, in order, and all rows of chunks that score prompts."""

    sampling: Tensor  # [rows, vocabulary]
    prompts: tuple[tuple[Chunk, Tensor], ...]


def _of_step(wanted: Wanted, logits: Tensor) -> StepLogits:
    """``logits`` of the wanted rows, one chunk's after the other's, as a step hands them on."""
    scored: list[tuple[Chunk, Tensor]] = []
    sampling, end = [], 0
    for chunk, count in wanted:
        end += count
        if chunk.scores_prompt:
            scored.append((chunk, logits[end - count : end]))
        if chunk.samples:
            sampling.append(end - 1)
    return StepLogits(logits if len(sampling) == end else logits[sampling], tuple(scored))


class ModelRunner:
    """``kernels`` None: fixed shapes (``fixed``, by default on a GPU) or the plain path. With kernels, the model's
    weights are put in the order that they want."""

    def __init__(
        self,
        model: Transformer,
        fill: Fill,
        *,
        blocks: int,
        block_size: int,
        kernels: Kernels | None = None,
        fixed: bool | None = None,
    ) -> None:
        self.model, self.fill, self.kernels = model, fill, kernels
        self.config = model.config
        self.cache = PagedKVCache(
            model.config, blocks=blocks, block_size=block_size, dtype=model.dtype, device=model.device
        )
        self.tallies = Tallies(model.config, filled=fill.kind == "reference")
        parts = (model, fill, self.cache, self.tallies)
        self._compute: Callable[[Plan, tuple[Group, ...]], tuple[Wanted, Tensor]]
        if kernels is not None:
            kernels.arrange(model)
            self._compute = NativePass(*parts, kernels)
        elif model.device.type == "cuda" if fixed is None else fixed:
            self._compute = FixedPasses(*parts)
        else:
            self._compute = PlainPasses(*parts)
        self._swapped: dict[int, Tensor] = {}  # by arrival: keys and values of sequences that had to make room

    @torch.inference_mode()
    def forward(self, plan: Plan, groups: tuple[Group, ...]) -> StepLogits:
        """Compute the plan's rows, write their keys and values; ``tallies`` hears what mixed with what."""
        self._prepare_blocks(plan)
        return _of_step(*self._compute(plan, groups))

    def _prepare_blocks(self, plan: Plan) -> None:
        for swap in plan.swap_out:
            self._swapped[swap.arrival] = self.cache.copy_out(list(swap.blocks))
        self.cache.zero(list(plan.zero_blocks))
        for swap in plan.swap_in:
            self.cache.copy_in(list(swap.blocks), self._swapped.pop(swap.arrival))
        for arrival in plan.swap_drop:
            self._swapped.pop(arrival, None)


def measure_balance(bank: ExpertBank, *, many: int = 32, repeats: int = 5, kernels: Kernels | None = None) -> int:
    """How many groups a step can take until computing costs as much as reading the expert weights: the time of one
    group over what each further one adds. The fastest of several runs counts: a busy moment only ever adds."""

    def seconds(groups: int) -> float:
        mixes = bank.controller.new_zeros(bank.lin1.shape[0], groups, bank.lin1.shape[1])
        began = time.perf_counter()
        if kernels is not None and kernels.prefers(groups, bank):
            kernels.bank(mixes, bank)
        else:
            bank.experts(mixes)
        if mixes.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    bank = measurable_part(bank)
    with torch.inference_mode():
        taken = [(seconds(1), seconds(many)) for _ in range(repeats + 1)][1:]
    one, several = min(first for first, _ in taken), min(second for _, second in taken)
    return max(1, min(256, round(one / max((several - one) / (many - 1), 1e-9))))
