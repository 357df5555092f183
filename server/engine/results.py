"""What a step's tokens mean for their sequences: appended, turned to text, ended, reported.

Knows sequences and text, no tensors beyond handing prompt logits to the sampler's scoring.
"""

from __future__ import annotations

from collections.abc import Iterator

from model.tokenizer import Tokenizer
from server.engine.detokenizer import Detokenizer
from server.engine.model_runner import StepLogits
from server.engine.plan import Plan
from server.engine.request import Delta, FinishReason, Receipt, Sequence
from server.engine.sampler import SampledToken, Sampler
from server.engine.scheduler import Scheduler


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
        self._texts: dict[Sequence, tuple[set[int], Detokenizer | None]] = {}  # and the tokens that end them

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
                yield sequence, self._append(sequence, next(sampled))
            elif sequence.sampling.max_tokens == 0 and not sequence.prefilling:
                yield sequence, self._delta(sequence, reason="length")

    def forget(self, sequence: Sequence) -> None:
        """Drop the text state of a sequence that was aborted."""
        self._texts.pop(sequence, None)

    def _append(self, sequence: Sequence, sampled: SampledToken) -> Delta:
        params, token_id = sequence.sampling, sampled.token_id
        sequence.token_ids.append(token_id)
        length = sequence.output_length
        ends, detokenizer = self._open(sequence)
        settled = length >= params.min_tokens
        text = ""
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if settled and token_id in ends:
            reason = "stop"
            stop_reason = token_id if token_id in params.stop_token_ids else None
        else:
            if detokenizer is not None:
                text, stop_reason = detokenizer.push(token_id, may_stop=settled), detokenizer.stopped
            if stop_reason is not None:
                reason = "stop"
            elif length >= params.max_tokens:
                reason = "length"
        return self._delta(sequence, sampled, text=text, reason=reason, stop_reason=stop_reason)

    def _open(self, sequence: Sequence) -> tuple[set[int], Detokenizer | None]:
        """The tokens that end a sequence that has tokens to come, and its text so far."""
        found = self._texts.get(sequence)
        if found is None:
            params, tokenizer = sequence.sampling, self._tokenizer
            text = Detokenizer(tokenizer, params.stop) if tokenizer is not None else None
            found = self._texts[sequence] = (self._sampler.ends(params), text)
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
            _, detokenizer = self._texts.pop(sequence, (None, None))
            text += detokenizer.finish() if detokenizer is not None else ""
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
