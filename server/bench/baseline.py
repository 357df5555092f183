"""What an engine is measured against: a plain loop over the same model in torch, as one writes it for a fixed batch.

All sequences advance together, keys and values lie in one tensor a layer, groups are filled up with zeros as in the
public ``mot`` model. No scheduler, no pages, no crowd, no kernels.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers import Projection
from model.mixing import ExpertBank, WholeSequences
from model.native import computes_in_bfloat16
from model.transformer import Transformer


class PlainLoop:
    """``batch`` sequences of a MoT or dense model. Raises ValueError for another kind."""

    def __init__(self, model: Transformer, batch: int, longest: int) -> None:
        config = model.config
        if config.has_experts and not config.is_mot:
            raise ValueError(f"baseline: is for MoT and dense models, not for {config.model_type}")
        self._model, self._batch = model, batch
        shape = (config.n_layer, 2, batch, config.n_head, longest, config.head_size)
        self._cache = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._mix = WholeSequences(config, batch)
        self._length = 0

    def step(self, ids: Tensor) -> Tensor:
        """``ids [batch, n]`` after those of earlier steps to the next ones ``[batch, 1]``, drawn at temperature 0.8."""
        count, start = ids.shape[1], self._length
        positions = torch.arange(start, start + count, device=ids.device).repeat(self._batch)
        self._length += count
        hidden = self._model(ids.flatten(), positions, self._attend, self._mix)
        logits = self._model.logits(hidden.view(self._batch, count, -1)[:, -1])
        return torch.multinomial(torch.softmax(logits.float() / 0.8, 1), 1)

    def _attend(self, layer: int, qkv: Tensor) -> Tensor:
        rows, heads, size = qkv.shape[0], self._cache.shape[3], self._cache.shape[5]
        queries, keys, values = qkv.view(self._batch, -1, 3, heads, size).permute(2, 0, 3, 1, 4)
        start = self._length - queries.shape[2]
        for side, new in enumerate((keys, values)):
            self._cache[layer, side, :, :, start : self._length] = new
        k, v = self._cache[layer, :, :, :, : self._length]
        return F.scaled_dot_product_attention(queries, k, v, is_causal=start == 0).transpose(1, 2).reshape(rows, -1)


def native_types(device: torch.device) -> tuple[torch.dtype, ...]:
    """Those that the device computes in: elsewhere bfloat16 would take minutes a token."""
    return (torch.float32, torch.bfloat16) if device.type != "cpu" or computes_in_bfloat16() else (torch.float32,)


def plain_rates(
    model: Transformer, engine: dict[int, float], prompt_tokens: int, output_tokens: int, repeats: int
) -> Iterator[dict[str, object]]:
    """The loop in each native type, for each number of requests of which ``engine`` says the decode tokens a second.
    Experts in int8 are the same numbers in that type."""
    for dtype in native_types(model.device):
        plain = copy.deepcopy(model)
        for module in plain.modules():
            if isinstance(module, (Projection, ExpertBank)):
                module.put_in_order()
            if isinstance(module, ExpertBank):
                module.widen(dtype)
        plain.to(dtype)
        for count, rate in engine.items():
            slow = plain_rate(plain, count, prompt_tokens, output_tokens, repeats)
            yield {
                "baseline": "plain torch loop, zero padding",
                "dtype": str(dtype).removeprefix("torch."),
                "concurrency": count,
                "output_tokens_per_second": slow,
                "engine_speedup": rate / slow,
            }


@torch.inference_mode()
def plain_rate(model: Transformer, batch: int, prompt_tokens: int, output_tokens: int, repeats: int) -> float:
    """Decode tokens a second, the median over repeats. The first of the output tokens comes with the prompt."""
    return statistics.median(_rates(model, batch, prompt_tokens, output_tokens, repeats))


def _rates(model: Transformer, batch: int, prompt_tokens: int, output_tokens: int, repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        loop = PlainLoop(model, batch, prompt_tokens + output_tokens)
        prompts = torch.randint(model.config.vocab_size, (batch, prompt_tokens), device=model.device)
        ids = loop.step(prompts)
        began = time.perf_counter()
        for _ in range(output_tokens - 1):
            ids = loop.step(ids)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        yield batch * (output_tokens - 1) / (time.perf_counter() - began)
