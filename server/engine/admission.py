"""What an engine can serve at all, in numbers: a copy of it can say so anywhere. Knows no queue and no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.request import EngineRequest, RequestError


@dataclass(frozen=True)
class Capacity:
    """Of the scheduler: sequences that may run at once, blocks of the KV cache and tokens of a block."""

    max_running: int
    blocks: int
    block_size: int

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError when the request could never be admitted."""
        count = len(request.prompts) * request.n
        if count > self.max_running:
            raise RequestError(
                f"a request may ask for at most {self.max_running} completions (prompts times n), not {count}",
                param="n",
            )
        longest = request.sampling.max_tokens
        if request.n * sum(self.blocks_for(len(prompt) + longest) for prompt in request.prompts) > self.blocks:
            raise RequestError(
                "the prompts and max_tokens together need more KV cache than the server has", param="max_tokens"
            )


@dataclass(frozen=True)
class Admission:
    """Of the whole engine. ``temperature``: the checkpoint's T; ``stop_strings``: there is a tokenizer for them."""

    capacity: Capacity
    positions: int
    vocabulary: int
    temperature: float
    end_of_text: int | None
    stop_strings: bool

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError naming the field when the request cannot be served."""
        params = request.sampling
        for prompt in request.prompts:
            self._check_prompt(prompt, params.max_tokens)
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if not all(0 <= token < self.vocabulary for token in ids):
                raise RequestError(f"{name} has a token id outside 0 to {self.vocabulary - 1}", param=name)
        if params.min_tokens and len(params.ends(self.end_of_text)) >= self.vocabulary:
            raise RequestError("min_tokens leaves no token: stop_token_ids names them all", param="stop_token_ids")
        if params.stop and not self.stop_strings:
            raise RequestError("stop needs a tokenizer, which this checkpoint lacks; use stop_token_ids", param="stop")
        if request.privacy is not None and not 0 <= request.privacy.temperature <= self.temperature:
            raise RequestError(
                f"private_temperature must lie between 0 and {self.temperature}", param="private_temperature"
            )
        self.capacity.check(request)

    def _check_prompt(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        if not prompt:
            raise RequestError("prompt must not be empty", param="prompt")
        if len(prompt) + max_tokens > self.positions:
            raise RequestError(
                f"the model has {self.positions} positions, but the prompt has {len(prompt)} tokens and "
                f"max_tokens is {max_tokens}",
                param="prompt" if len(prompt) >= self.positions else "max_tokens",
                code="context_length_exceeded",
            )
        if not 0 <= min(prompt) <= max(prompt) < self.vocabulary:
            raise RequestError(f"prompt has a token id outside 0 to {self.vocabulary - 1}", param="prompt")
