"""Logits to tokens, for all rows of a step at once. Knows no model and no cache.

Every operation works row by row, so a row's token and log probabilities depend on its own logits, its parameters and
its seed alone. Log probabilities are those of the model itself, before penalties, bias and temperature.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.plan import Chunk
from server.engine.request import SamplingParams, Sequence, TokenLogprob

_GREEDY_BELOW = 1e-5  # dividing logits by less overflows


@dataclass(frozen=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprob | None  # where the request asked for log probabilities


class Sampler:
    """``end_of_text`` is what ``min_tokens`` keeps away."""

    def __init__(self, end_of_text: int | None) -> None:
        self._end_of_text = end_of_text

    @torch.inference_mode()
    def sample(self, logits: Tensor, chunks: tuple[Chunk, ...]) -> list[SampledToken]:
        """``logits [rows, vocabulary]`` in float32, one row a chunk, to one token each."""
        if not chunks:
            return []
        sequences = [chunk.sequence for chunk in chunks]
        adjusted = logits.clone()
        for row, sequence in enumerate(sequences):
            self._adjust(adjusted[row], sequence)
        tokens = _first_maximum(adjusted)
        drawn = [i for i, s in enumerate(sequences) if s.sampling.temperature >= _GREEDY_BELOW]
        if drawn:
            tokens[drawn] = _draw(adjusted[drawn], [sequences[i] for i in drawn])
        ids = tokens.tolist()
        wanted = {i: s.sampling.logprobs for i, s in enumerate(sequences) if s.sampling.logprobs is not None}
        rows = list(wanted)
        scored = _score(logits[rows], [ids[i] for i in rows], list(wanted.values())) if rows else []
        found = dict(zip(rows, scored, strict=True))
        return [SampledToken(token, found.get(i)) for i, token in enumerate(ids)]

    def _adjust(self, row: Tensor, sequence: Sequence) -> None:
        """Penalties, bias and banned tokens, in place; ``row [vocabulary]``."""
        params = sequence.sampling
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if (params.presence_penalty or params.frequency_penalty) and sequence.output_length:
            counts = Counter(sequence.output_ids)
            ids = torch.tensor(list(counts), device=row.device)
            times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
            row[ids] -= params.presence_penalty + params.frequency_penalty * times
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
        if sequence.output_length < params.min_tokens:
            row[sorted(self.ends(params))] = float("-inf")

    def ends(self, params: SamplingParams) -> set[int]:
        """The tokens that end a sequence."""
        ends = set(params.stop_token_ids)
        if self._end_of_text is not None and not params.ignore_eos:
            ends.add(self._end_of_text)
        return ends


def _first_maximum(logits: Tensor) -> Tensor:
    """``[rows, vocabulary]`` to the lowest id with the highest logit: ``[rows]``."""
    highest = logits.amax(1, keepdim=True)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == highest, ids, logits.shape[1]).amin(1).clamp_(max=logits.shape[1] - 1)


def _column(sequences: list[Sequence], name: str, like: Tensor) -> Tensor:
    return torch.tensor([getattr(s.sampling, name) for s in sequences], dtype=like.dtype, device=like.device)[:, None]


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """One token a row by inverting the cumulative distribution at the sequence's next random number: ``[rows]``."""
    uniform = torch.tensor([s.random.random() for s in sequences], dtype=torch.float64, device=logits.device)
    probabilities = torch.softmax(logits / _column(sequences, "temperature", logits), dim=1)
    truncated = [_truncates(s.sampling, logits.shape[1]) for s in sequences]
    order: Tensor | None = None
    if any(truncated):
        probabilities, order = torch.sort(probabilities, dim=1, descending=True, stable=True)
        probabilities = _truncate(probabilities, sequences)
    # Rows that nothing truncates are drawn in order of id, with or without companions that are sorted.
    if order is not None and not all(truncated):
        straight = torch.tensor(truncated, device=logits.device).logical_not()[:, None]
        unsorted = torch.zeros_like(probabilities).scatter_(1, order, probabilities)
        probabilities = torch.where(straight, unsorted, probabilities)
        order = torch.where(straight, torch.arange(logits.shape[1], device=logits.device), order)
    cumulative = probabilities.double().cumsum(1)
    target = uniform[:, None] * cumulative[:, -1:]
    place = (cumulative <= target).sum(1, keepdim=True)
    last = (probabilities > 0).double().mul(torch.arange(1, logits.shape[1] + 1, device=logits.device)).amax(1) - 1
    place = torch.minimum(place, last.long()[:, None])  # rounding must not reach a token of probability zero
    return (place if order is None else order.gather(1, place)).squeeze(1)


def _truncates(params: SamplingParams, vocabulary: int) -> bool:
    return 0 < params.top_k < vocabulary or params.top_p < 1 or params.min_p > 0


def _truncate(probabilities: Tensor, sequences: list[Sequence]) -> Tensor:
    """Zero what top_k and min_p cut off, then what top_p cuts off of the rest. ``probabilities`` sorted, best first."""
    size = probabilities.shape[1]
    rank = torch.arange(size, device=probabilities.device)
    top_k = torch.tensor([s.sampling.top_k or size for s in sequences], device=probabilities.device)[:, None]
    kept = probabilities * (rank < top_k)
    kept = kept * (probabilities >= _column(sequences, "min_p", probabilities) * probabilities[:, :1])
    before = kept.double().cumsum(1) - kept
    # A token stays while those before it do not make up top_p; the first one always does.
    within = before < _column(sequences, "top_p", probabilities).double() * kept.double().sum(1, keepdim=True)
    within[:, 0] = True
    whole = torch.tensor([s.sampling.top_p >= 1 for s in sequences], device=probabilities.device)[:, None]
    return kept * (within | whole)


def _score(logits: Tensor, tokens: list[int], alternatives: list[int]) -> list[TokenLogprob]:
    """Log probabilities of ``tokens`` and of the best alternatives, one row of ``logits`` each."""
    logprobs = torch.log_softmax(logits, dim=1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()
    most = min(max(alternatives), logits.shape[1])
    if most == 0:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen, strict=True)]
    values, ids = torch.sort(logprobs, dim=1, descending=True, stable=True)
    best_values, best_ids = values[:, :most].tolist(), ids[:, :most].tolist()
    return [
        TokenLogprob(token, chosen[i], tuple(zip(best_ids[i][:count], best_values[i][:count], strict=True)))
        for i, (token, count) in enumerate(zip(tokens, alternatives, strict=True))
    ]


@torch.inference_mode()
def score_prompt(chunk: Chunk, logits: Tensor) -> list[TokenLogprob]:
    """Log probabilities of the prompt tokens that follow each row of ``logits [length, vocabulary]``; the row of the
    last prompt token predicts the completion and is left out."""
    following = chunk.sequence.prompt[chunk.start + 1 : chunk.end + 1]
    if not following:
        return []
    alternatives = chunk.sequence.sampling.prompt_logprobs or 0
    return _score(logits[: len(following)], list(following), [alternatives] * len(following))
