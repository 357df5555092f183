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
        self._texts: dict[Sequence, Detokenizer] = {}

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
        params = sequence.sampling
        sequence.token_ids.append(sampled.token_id)
        settled = sequence.output_length >= params.min_tokens
        ended = settled and sampled.token_id in self._sampler.ends(params)
        text, stopped = ("", None) if ended else self._push(sequence, sampled.token_id, may_stop=settled)
        reason: FinishReason | None = None
        stop_reason: str | int | None = stopped
        if ended:
            reason = "stop"
            stop_reason = sampled.token_id if sampled.token_id in params.stop_token_ids else None
        elif stopped is not None:
            reason = "stop"
        elif sequence.output_length >= params.max_tokens:
            reason = "length"
        return self._delta(sequence, sampled, text=text, reason=reason, stop_reason=stop_reason)

    def _push(self, sequence: Sequence, token_id: int, *, may_stop: bool) -> tuple[str, str | None]:
        """New text, and the stop string that it completed."""
        if self._tokenizer is None:
            return "", None
        if sequence not in self._texts:
            self._texts[sequence] = Detokenizer(self._tokenizer, sequence.sampling.stop)
        detokenizer = self._texts[sequence]
        return detokenizer.push(token_id, may_stop=may_stop), detokenizer.stopped

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
            detokenizer = self._texts.pop(sequence, None)
            text += detokenizer.finish() if detokenizer is not None else ""
            self._scheduler.finish(sequence)
            receipt = self._receipt(sequence)
        first = sequence.output_length <= 1 and sequence.sampling.prompt_logprobs is not None
        return Delta(
            sequence=sequence.index,
            text=text,
            token_ids=(sampled.token_id,) if sampled else (),
            logprobs=(sampled.logprob,) if sampled and sampled.logprob else (),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first else None,
            finish_reason=reason,
            stop_reason=stop_reason,
            receipt=receipt,
        )

    def _receipt(self, sequence: Sequence) -> Receipt:
        tally, privacy = sequence.tally.total(), sequence.request.privacy
        mean = 1 / tally.tokens if tally.tokens else 0.0  # a dense model tallies nothing
        return Receipt(
            private=privacy is not None,
            temperature=self._temperature if privacy is None else privacy.temperature,
            live_members=round(tally.live * mean, 4) if mean else 1.0,
            reference_members=round(tally.reference * mean, 4),
            mixing_entropy=round(tally.entropy * mean, 4),
            group_fill=self._group_fill,
        )
