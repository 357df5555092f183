"""What a step's tokens mean for their sequences: appended, turned to text, ended, reported.

Knows sequences and text, no tensors beyond handing prompt logits to the sampler's scoring.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from model.tokenizer import Tokenizer
from server.engine.detokenizer import Detokenizer
from server.engine.model_runner import StepLogits
from server.engine.plan import Plan
from server.engine.request import Delta, FinishReason, Receipt, Sequence, Status
from server.engine.sampler import SampledToken, Sampler
from server.engine.scheduler import Scheduler

# Pieces of news a second that a server and its clients can take beside an engine on the same cores, for each of these;
# and that one event loop can take at all beside its other work.
_NEWS_A_CORE, _MOST_NEWS = 500.0, 4000.0
_TOO_MANY = 1.5  # times that, above which any are held back: a load about the limit shall not go to and fro
_LONGEST_WAIT = 0.1  # seconds: less is not seen as a wait (Miller 1968, Nielsen 1993)
_SMOOTHING = 0.1  # weight of the newest step's time


class Pace:
    """Tokens a piece of news where requests leave that open: one, and where that makes many more than ``most`` pieces a
    second as many as keep to it, but never so many that a token waits longer than ``longest`` seconds at the speed of
    late."""

    def __init__(self, most: float | None = None, longest: float = _LONGEST_WAIT) -> None:
        """``most`` by default as many as the cores that this process may use can take."""
        self._most = most or min(_MOST_NEWS, _NEWS_A_CORE * _cores())
        self._longest, self._seconds = longest, 0.0
        self.interval = 1

    def on_step(self, sequences: int, seconds: float) -> None:
        """So many ``sequences`` had a token each in a step of ``seconds``, which is above zero."""
        new = _SMOOTHING if self._seconds else 1.0
        self._seconds += new * (seconds - self._seconds)
        excess = sequences / (self._most * self._seconds)
        wanted = math.ceil(excess) if excess > _TOO_MANY else 1
        self.interval = max(1, min(wanted, math.floor(self._longest / self._seconds)))


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(slots=True)
class _UnderWay:
    """A sequence that has tokens to come: which of them end it, its text so far, news that it has not told yet."""

    ends: set[int]
    text: Detokenizer | None
    held: Delta | None = None


class Results:
    def __init__(
        self,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: Tokenizer | None,
        *,
        temperature: float,
        group_fill: str,
    ) -> None:
        self._scheduler, self._sampler, self._tokenizer = scheduler, sampler, tokenizer
        self._temperature, self._group_fill = temperature, group_fill
        self._under_way: dict[Sequence, _UnderWay] = {}
        self.pace = Pace()

    def update(self, plan: Plan, logits: StepLogits, tokens: list[SampledToken]) -> Iterator[tuple[Sequence, Delta]]:
        """Append ``tokens`` (one for each of ``plan.sampling``), finish what ended, and say what is new."""
        assert len(plan.sampling) == len(tokens), "a token for each chunk that samples"
        sampled = iter(tokens)
        self._scheduler.advance(plan)
        for chunk, rows in logits.prompts:
            chunk.sequence.prompt_logprobs.extend(self._sampler.score_prompt(chunk, rows))
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if chunk.samples:
                delta = self._append(sequence, next(sampled))
                if delta is not None:
                    yield sequence, delta
            elif sequence.sampling.max_tokens == 0 and not sequence.prefilling:
                yield sequence, self._delta(sequence, reason="length")
        if plan.swap_out:
            yield from self._held_by_the_swapped()

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a sequence that was aborted."""
        self._under_way.pop(sequence, None)

    def _append(self, sequence: Sequence, sampled: SampledToken) -> Delta | None:
        """News of one more token and of those held back before it. None: it is held back, too."""
        params, token_id = sequence.sampling, sampled.token_id
        sequence.token_ids.append(token_id)
        length = sequence.output_length
        state = self._open(sequence)
        settled = length >= params.min_tokens
        text = ""
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if settled and token_id in state.ends:
            reason = "stop"
            stop_reason = token_id if token_id in params.stop_token_ids else None
        else:
            if state.text is not None:
                text, stop_reason = state.text.push(token_id, may_stop=settled), state.text.stopped
            if stop_reason is not None:
                reason = "stop"
            elif length >= params.max_tokens:
                reason = "length"
        delta = self._delta(sequence, sampled, text=text, reason=reason, stop_reason=stop_reason)
        if state.held is not None:
            delta, state.held = _joined(state.held, delta), None
        if reason is None and length > 1 and not self._due(sequence, len(delta.token_ids)):
            state.held = delta
            return None
        return delta

    def _held_by_the_swapped(self) -> Iterator[tuple[Sequence, Delta]]:
        """News held back of sequences that have made room: they may have no more for long."""
        for sequence, state in self._under_way.items():
            if sequence.status is Status.SWAPPED and state.held is not None:
                held, state.held = state.held, None
                yield sequence, held

    def _due(self, sequence: Sequence, tokens: int) -> bool:
        """Whether so many tokens of a sequence are told."""
        fixed = sequence.request.stream_interval
        if fixed is not None:
            return tokens >= fixed
        # Sequences take turns, so that each step tells of a few: server and clients are at it while the engine prepares
        # its next step and leaves a core to them, and not of all at once, which it then has to wait for.
        return (sequence.output_length + sequence.arrival) % self.pace.interval == 0

    def _open(self, sequence: Sequence) -> _UnderWay:
        found = self._under_way.get(sequence)
        if found is None:
            params, tokenizer = sequence.sampling, self._tokenizer
            text = Detokenizer(tokenizer, params.stop) if tokenizer is not None else None
            found = self._under_way[sequence] = _UnderWay(self._sampler.ends(params), text)
        return found

    def _delta(
        self,
        sequence: Sequence,
        sampled: SampledToken | None = None,
        *,
        text: str = "",
        reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> Delta:
        receipt = None
        if reason is not None:
            state = self._under_way.pop(sequence, None)
            text += state.text.finish() if state is not None and state.text is not None else ""
            self._scheduler.finish(sequence)
            receipt = self._receipt(sequence)
        first = sequence.sampling.prompt_logprobs is not None and sequence.output_length <= 1
        return Delta(
            sequence.index,
            text,
            (sampled.token_id,) if sampled else (),
            (sampled.logprob,) if sampled and sampled.logprob else (),
            tuple(sequence.prompt_logprobs) if first else None,
            reason,
            stop_reason,
            receipt,
        )

    def _receipt(self, sequence: Sequence) -> Receipt:
        tally, privacy = sequence.tally, sequence.request.privacy
        mean = 1 / tally.tokens if tally.tokens else 0.0  # a dense model tallies nothing
        return Receipt(
            private=privacy is not None,
            temperature=self._temperature if privacy is None else privacy.temperature,
            live_members=round(tally.live * mean, 4) if mean else 1.0,
            reference_members=round(tally.reference * mean, 4),
            mixing_entropy=round(tally.entropy * mean, 4),
            group_fill=self._group_fill,
        )


def _joined(first: Delta, then: Delta) -> Delta:
    """Two pieces of news of a sequence, one after the other, as one."""
    return then._replace(
        text=first.text + then.text, token_ids=first.token_ids + then.token_ids, logprobs=first.logprobs + then.logprobs
    )
