"""Logits to tokens, for all rows of a step at once. Knows no model and no cache.

Every operation works row by row, so a row's token and log probabilities depend on its own logits, its parameters and
its seed alone. Log probabilities are those of the model itself, before penalties, bias and temperature.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from model.native import Kernels
from server.engine.plan import Chunk
from server.engine.request import SamplingParams, Sequence, TokenLogprob

_GREEDY_BELOW = 1e-5  # dividing logits by less overflows


@dataclass(frozen=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprob | None  # where the request asked for log probabilities


class Sampler:
    """``end_of_text`` is what ``min_tokens`` keeps away. ``kernels`` None: the plain path."""

    def __init__(self, end_of_text: int | None, kernels: Kernels | None = None) -> None:
        self._end_of_text, self._kernels = end_of_text, kernels
        self._columns: _Columns | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, chunks: tuple[Chunk, ...]) -> list[SampledToken]:
        """``logits [rows, vocabulary]`` in float32, one row a chunk, to one token each."""
        if not chunks:
            return []
        sequences = [chunk.sequence for chunk in chunks]
        if self._columns is None or self._columns.sequences != sequences:  # they rarely change from step to step
            self._columns = _Columns.of(sequences)
        columns = self._columns
        changed = [row for row in columns.may_adjust if _adjusts(sequences[row])]
        adjusted = logits.clone() if changed else logits.contiguous()
        for row in changed:
            self._adjust(adjusted[row], sequences[row])
        if self._kernels is not None:
            ids = columns.draw(self._kernels, adjusted)
        else:
            ids = _plain_draw(adjusted, sequences).tolist()
        rows = list(columns.scored)
        scored = self.score(logits[rows], [ids[i] for i in rows], list(columns.scored.values())) if rows else []
        found = dict(zip(rows, scored, strict=True))
        return [SampledToken(token, found.get(i)) for i, token in enumerate(ids)]

    def score(self, logits: Tensor, tokens: list[int], alternatives: list[int]) -> list[TokenLogprob]:
        """Log probabilities of ``tokens`` and of the best alternatives, one row of ``logits [n, vocabulary]`` each."""
        most = min(max(alternatives), logits.shape[1])
        if self._kernels is None:
            found = _plain_scores(logits, torch.tensor(tokens, device=logits.device), most)
        else:
            found = self._kernels.score(logits, torch.tensor(tokens), most)
        chosen, best_ids, best_values = (column.tolist() for column in found)
        return [
            TokenLogprob(token, chosen[i], tuple(zip(best_ids[i][:count], best_values[i][:count], strict=True)))
            for i, (token, count) in enumerate(zip(tokens, alternatives, strict=True))
        ]

    @torch.inference_mode()
    def score_prompt(self, chunk: Chunk, logits: Tensor) -> list[TokenLogprob]:
        """Log probabilities of the prompt tokens that follow each row of ``logits [length, vocabulary]``; the row of
        the last prompt token predicts the completion and is left out."""
        following = chunk.sequence.prompt[chunk.start + 1 : chunk.end + 1]
        if not following:
            return []
        alternatives = chunk.sequence.sampling.prompt_logprobs or 0
        return self.score(logits[: len(following)], list(following), [alternatives] * len(following))

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
        return params.ends(self._end_of_text)


def _adjusts(sequence: Sequence) -> bool:
    """Whether the request changes the model's logits."""
    params = sequence.sampling
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or sequence.output_length < params.min_tokens
    )


def _draws(sequence: Sequence) -> bool:
    """Whether the request samples; otherwise it is greedy and takes no random number."""
    return sequence.sampling.temperature >= _GREEDY_BELOW


@dataclass(frozen=True)
class _Columns:
    """What the parameters of ``sequences`` say, row by row: the same at every step."""

    sequences: list[Sequence]
    may_adjust: list[int]  # rows whose logits are changed, now or at another step
    scored: dict[int, int]  # rows that want log probabilities, and of how many alternatives
    drawn: list[bool]
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def of(cls, sequences: list[Sequence]) -> _Columns:
        params, drawn = [s.sampling for s in sequences], [_draws(s) for s in sequences]
        temperatures = [p.temperature if draws else 0.0 for p, draws in zip(params, drawn, strict=True)]
        return cls(
            sequences,
            [row for row, s in enumerate(sequences) if _adjusts(s) or s.sampling.min_tokens],
            {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None},
            drawn,
            temperature=torch.tensor(temperatures),
            top_k=torch.tensor([p.top_k for p in params]),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32),
            min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32),
        )

    def draw(self, kernels: Kernels, logits: Tensor) -> list[int]:
        """One token a row by the compiled kernel, at each sequence's next random number."""
        uniform = [s.random.random() if d else 0.0 for s, d in zip(self.sequences, self.drawn, strict=True)]
        tokens: list[int] = kernels.draw(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            uniform=torch.tensor(uniform, dtype=torch.float64),
        ).tolist()  # fmt: skip
        return tokens


def _plain_draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """One token a row, drawn or the best: ``[rows]``."""
    drawn = [i for i, s in enumerate(sequences) if _draws(s)]
    if len(drawn) == len(sequences):
        return _draw(logits, sequences)
    tokens = _first_maximum(logits)
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [sequences[i] for i in drawn])
    return tokens


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
    if any(truncated):
        best_first, order = torch.sort(probabilities, dim=1, descending=True, stable=True)
        kept = torch.zeros_like(probabilities).scatter_(1, order, _truncate(best_first, sequences))
        # Rows that nothing truncates stay as they are, whatever rows stand beside them.
        probabilities = torch.where(torch.tensor(truncated, device=logits.device)[:, None], kept, probabilities)
    cumulative = probabilities.double().cumsum(1)
    place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(1)
    last = (probabilities > 0).double().mul(torch.arange(1, logits.shape[1] + 1, device=logits.device)).amax(1) - 1
    return torch.minimum(place, last.long())  # rounding must not reach a token of probability zero


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


def _plain_scores(logits: Tensor, tokens: Tensor, best: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of ``tokens [n]``, and ids and log probabilities ``[n, best]`` of the best."""
    logprobs = torch.log_softmax(logits, dim=1)
    values, ids = torch.sort(logprobs, dim=1, descending=True, stable=True) if best else (logprobs, logprobs)
    return logprobs.gather(1, tokens[:, None]).squeeze(1), ids[:, :best], values[:, :best]
