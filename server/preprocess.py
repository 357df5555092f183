"""From a validated HTTP request to the engine's: token ids, sampling, privacy.

Here is checked what depends on the checkpoint and the server's settings. Knows nothing of sockets or answers.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from model.tokenizer import Tokenizer
from server.auth import Caller
from server.chat import ChatTemplate
from server.config import Settings
from server.engine.async_engine import EngineInfo
from server.engine.request import EngineRequest, Privacy, RequestError, SamplingParams
from server.schemas import ChatRequest, CompletionRequest, GenerationRequest, Prompt

_DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions
_PLAIN_INTERVAL = 32  # tokens that a plain answer's parts cross processes in; metrics count them as they come
_LONG_TEXT = 4096  # characters; tokenising more would hold up every stream's event loop


@dataclass(frozen=True)
class Job:
    """A request to the engine, and what its answer is to show."""

    request: EngineRequest
    chat: bool
    logprobs: int | None  # alternatives to show
    token_ids: bool
    echo_texts: tuple[str, ...] | None  # one a prompt, where the prompt is to be repeated


class Preprocessor:
    """Turns requests into jobs. Every method raises RequestError."""

    def __init__(
        self, info: EngineInfo, tokenizer: Tokenizer | None, settings: Settings, template: ChatTemplate
    ) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._private = settings.private
        self._stream_interval = settings.stream_interval
        self._template = template

    async def completion(self, body: CompletionRequest, caller: Caller) -> Job:
        """A job for /v1/completions."""
        prompts = [await self._prompt_ids(prompt) for prompt in body.prompt]
        left = self._left(prompts)
        max_tokens = body.max_tokens if body.max_tokens is not None else min(_DEFAULT_MAX_TOKENS, left)
        prompt_logprobs = body.logprobs if body.echo else None
        sampling = self._sampling(body, max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
        return Job(
            request=self._engine_request("cmpl", body, caller, prompts, sampling),
            chat=False,
            logprobs=body.logprobs,
            token_ids=body.return_token_ids or self._tokenizer is None,
            echo_texts=tuple(map(self._text, body.prompt)) if body.echo else None,
        )

    async def chat(self, body: ChatRequest, caller: Caller) -> Job:
        """A job for /v1/chat/completions."""
        if self._tokenizer is None:
            raise _refused("messages", "this checkpoint has no tokenizer; send token ids to /v1/completions")
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        try:
            prompt = await self._prompt_ids(self._template.render(messages))
            asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
            max_tokens = asked if asked is not None else self._left([prompt])
            sampling = self._sampling(body, max_tokens, logprobs=logprobs, prompt_logprobs=None)
        except RequestError as error:
            raise rename_prompt(error) from None
        return Job(
            request=self._engine_request("chatcmpl", body, caller, [prompt], sampling),
            chat=True,
            logprobs=logprobs,
            token_ids=body.return_token_ids,
            echo_texts=None,
        )

    async def encode(self, text: str) -> list[int]:
        """The text's token ids, in another thread when there are many."""
        if self._tokenizer is None:
            raise _refused("prompt", "this checkpoint has no tokenizer; send token ids")
        if len(text) > _LONG_TEXT:
            return await asyncio.to_thread(self._tokenizer.encode, text)
        return self._tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that ``tokens`` stand for, special ones included."""
        if self._tokenizer is None:
            raise _refused("tokens", "this checkpoint has no tokenizer")
        if any(token >= self._info.vocab_size for token in tokens):
            raise _refused("tokens", f"token ids should be below {self._info.vocab_size}")
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    async def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of one prompt. Nothing is asked of the model without a first token: an empty text starts where
        every text starts, after the end of another."""
        if not isinstance(prompt, str):
            return prompt
        ids = tuple(await self.encode(prompt))
        if ids:
            return ids
        if self._info.end_of_text is None:
            raise _refused("prompt", "should not be empty: this checkpoint has no end-of-text token to start from")
        return (self._info.end_of_text,)

    def _text(self, prompt: Prompt) -> str:
        """What ``echo`` repeats."""
        if isinstance(prompt, str):
            return prompt
        if self._tokenizer is None or not all(0 <= token < self._info.vocab_size for token in prompt):
            return ""  # with ids out of the vocabulary, the engine refuses the request
        return self._tokenizer.decode(prompt, skip_special_tokens=False)

    def _left(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Tokens that the longest prompt leaves for its completion; one at least, so that a prompt that is too long
        is refused as such."""
        return max(1, self._info.max_positions - max(map(len, prompts)))

    def _sampling(
        self, body: GenerationRequest, max_tokens: int, *, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        if body.min_tokens > max_tokens:
            raise _refused("min_tokens", f"should be at most the completion's {max_tokens} tokens")
        if body.stop and self._tokenizer is None:
            raise _refused("stop", "this checkpoint has no tokenizer; use stop_token_ids")
        for field, tokens in (("logit_bias", body.logit_bias), ("stop_token_ids", body.stop_token_ids)):
            if any(token >= self._info.vocab_size for token in tokens):
                raise _refused(field, f"token ids should be below {self._info.vocab_size}")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=min(max(body.top_k, 0), self._info.vocab_size),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=body.logit_bias,
            seed=body.seed,
            logprobs=_within_vocabulary(logprobs, self._info.vocab_size),
            prompt_logprobs=_within_vocabulary(prompt_logprobs, self._info.vocab_size),
            ignore_eos=body.ignore_eos,
            stop=tuple(body.stop),
            stop_token_ids=tuple(body.stop_token_ids),
        )

    def _privacy(self, body: GenerationRequest, caller: Caller) -> Privacy | None:
        """What this request's ``private`` comes to under the server's setting and its key's. None: public."""
        if self._private == "force" and body.private is False:
            raise _refused("private", "this server serves private requests only")
        if caller.private == "force" and body.private is False:
            raise _refused("private", "this API key is for private requests only")
        rule = "force" if self._private == "force" else caller.private or self._private
        private = body.private if body.private is not None else rule != "default-off"
        if not private:
            if body.private_temperature is not None:
                raise _refused("private_temperature", "is only for private requests")
            if body.cache_salt is not None:
                raise _refused("cache_salt", "is only for private requests: nothing of others is kept")
            return None
        default = self._info.default_privacy
        if body.private_temperature is None:
            return default
        if body.private_temperature > self._info.temperature:
            raise _refused("private_temperature", f"should be at most the checkpoint's {self._info.temperature:g}")
        return Privacy(temperature=body.private_temperature, skip_below=default.skip_below)

    def _engine_request(
        self,
        prefix: str,
        body: GenerationRequest,
        caller: Caller,
        prompts: Sequence[tuple[int, ...]],
        sampling: SamplingParams,
    ) -> EngineRequest:
        return EngineRequest(
            request_id=f"{prefix}-{uuid.uuid4().hex}",
            prompts=tuple(prompts),
            sampling=sampling,
            n=body.n,
            privacy=self._privacy(body, caller),
            tenant=caller.tenant,
            cache_salt=body.cache_salt,
            priority=body.priority,
            stream_interval=self._stream_interval if body.stream else _PLAIN_INTERVAL,
        )


def rename_prompt(error: RequestError) -> RequestError:
    """The same error for a chat, which has ``messages`` where the engine sees a prompt."""
    if error.param != "prompt":
        return error
    message = str(error).replace("`prompt`", "`messages`")
    return RequestError(message, param="messages", code=error.code, status=error.status)


def _refused(field: str, reason: str) -> RequestError:
    return RequestError(f"`{field}`: {reason}.", param=field, code="invalid_value")


def _within_vocabulary(count: int | None, vocab_size: int) -> int | None:
    """No more alternatives than there are tokens."""
    return None if count is None else min(count, vocab_size)
