"""An engine that follows a script: what the HTTP side is tested against."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from model.tokenizer import END_OF_TEXT, TextStream, Tokenizer
from server.engine.async_engine import AsyncEngine, EngineInfo, EngineStats, EngineStopped, StepStats
from server.engine.request import Delta, EngineRequest, FinishReason, Privacy, Receipt, RequestError, TokenLogprob

STORY = "Once there was a café by the sea, and nobody came."


def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(iter([STORY] * 3), vocab_size=280)


def info_for(tokenizer: Tokenizer | None) -> EngineInfo:
    return EngineInfo(
        model_type="mot",
        vocab_size=tokenizer.vocab_size if tokenizer else 100,
        max_positions=64,
        group_size=4,
        temperature=0.5,
        default_privacy=Privacy(temperature=0.25, skip_below=0.01),
        group_fill="reference",
        reference_fingerprint="abc",
        device="cpu",
        dtype="float32",
        quantized=None,
        parameters=1000,
        end_of_text=tokenizer.id_of(END_OF_TEXT) if tokenizer else None,
    )


class FakeEngine(AsyncEngine):
    """Answers every sequence with ``script``, round and round, ``delay`` seconds a token. ``fail_after`` tokens it
    raises ``failure``; ``refuse`` is raised by ``submit``."""

    def __init__(self, tokenizer: Tokenizer | None, script: list[int]) -> None:
        self.tokenizer = tokenizer
        self.info = info_for(tokenizer)
        self.script = script
        self.delay = 0.0
        self.fail_after: int | None = None
        self.failure: Exception = EngineStopped()
        self.refuse: RequestError | None = None
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.running = False
        self._listeners: list[Callable[[StepStats], None]] = []

    def start(self) -> None:
        self.running = True

    async def stop(self) -> None:
        self.running = False

    @property
    def ready(self) -> bool:
        return self.running

    @property
    def stats(self) -> EngineStats:
        return EngineStats(running=2, waiting=1, kv_blocks_total=10, kv_blocks_used=4)

    def observe(self, listener: Callable[[StepStats], None]) -> None:
        self._listeners.append(listener)

    def submit(self, request: EngineRequest) -> AsyncIterator[list[Delta]]:  # type: ignore[override]  # no inbox here
        if self.refuse is not None:
            raise self.refuse
        longest = max(map(len, request.prompts))
        if longest + request.sampling.max_tokens > self.info.max_positions:
            raise RequestError("`prompt`: too long.", param="prompt", code="context_length_exceeded")
        if any(not 0 <= token < self.info.vocab_size for prompt in request.prompts for token in prompt):
            raise RequestError("`prompt`: not in the vocabulary.", param="prompt")
        self.requests.append(request)
        return self._play(request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def _play(self, request: EngineRequest) -> AsyncIterator[list[Delta]]:
        count = len(request.prompts) * request.n
        decoders = [self.tokenizer.stream() if self.tokenizer else None for _ in range(count)]
        for place in range(max(1, request.sampling.max_tokens)):
            if place == self.fail_after:
                raise self.failure
            await asyncio.sleep(self.delay)
            for listener in self._listeners:
                listener(StepStats(0.01, (), 0, count, 1, count, 0))
            for index, decoder in enumerate(decoders):
                yield [self._delta(request, index, place, decoder)]

    def _delta(self, request: EngineRequest, index: int, place: int, decoder: TextStream | None) -> Delta:
        sampling = request.sampling
        delta = Delta(index)
        if place == 0 and sampling.prompt_logprobs is not None:
            prompt = request.prompts[index // request.n]
            later = tuple(self._logprob(token, sampling.prompt_logprobs) for token in prompt[1:])
            delta = delta._replace(prompt_logprobs=(None, *later))
        if sampling.max_tokens == 0:
            return delta._replace(finish_reason="length", receipt=self._receipt(request, index))
        token = self.script[place % len(self.script)]
        text = decoder.push(token) if decoder else ""
        finish: FinishReason | None = None
        if place == sampling.max_tokens - 1:
            finish = "length"
        if any(stop == text.strip() for stop in sampling.stop):
            finish = "stop"
        if finish:
            text += decoder.flush() if decoder else ""
            delta = delta._replace(finish_reason=finish, receipt=self._receipt(request, index))
        logprobs = () if sampling.logprobs is None else (self._logprob(token, sampling.logprobs),)
        return delta._replace(text=text, token_ids=(token,), logprobs=logprobs)

    def _logprob(self, token: int, alternatives: int) -> TokenLogprob:
        """The chosen token is never the likeliest one."""
        others = [other for other in range(alternatives + 1) if other != token][:alternatives]
        return TokenLogprob(token, -3.0, tuple((other, -0.1 * (rank + 1)) for rank, other in enumerate(others)))

    def _receipt(self, request: EngineRequest, index: int) -> Receipt:
        private = request.privacy is not None
        temperature = request.privacy.temperature if request.privacy else self.info.temperature
        return Receipt(private, temperature, 1.0 if private else 2.0 + index, 3.0, 0.5, self.info.group_fill)
