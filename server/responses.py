"""From the engine's deltas to OpenAI's answers: choices, usage, receipt.

A plain answer is the concatenation of what would have been streamed, so the two cannot differ. Plain dictionaries:
one is made for every token. Knows nothing of sockets, deadlines or events.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from server.engine.request import Delta, Receipt, TokenLogprob
from server.logprobs import Json, TextOffsets, Vocabulary, chat_logprobs, completion_logprobs, prompt_logprobs
from server.preprocess import Job


class Answer:
    """One request's answer in the making. ``add`` every delta; each gives the choices that a stream would send."""

    def __init__(self, job: Job, vocabulary: Vocabulary, model: str, fingerprint: str) -> None:
        self._job = job
        self._vocabulary = vocabulary
        request = job.request
        self._head = {"id": request.request_id, "created": int(time.time()), "model": model}
        self._fingerprint = fingerprint
        self._open = set(range(len(request.prompts) * request.n))
        self._begun: set[int] = set()
        self._offsets: dict[int, TextOffsets] = {}
        self._receipts: list[Receipt] = []
        self._completion_tokens = 0

    @property
    def finished(self) -> bool:
        """Every sequence has its finish reason."""
        return not self._open

    def head(self, *, stream: bool) -> Json:
        """The members that every chunk, or the plain answer, begins with."""
        kind = ("chat.completion" + ".chunk" * stream) if self._job.chat else "text_completion"
        return {"object": kind, **self._head, "system_fingerprint": self._fingerprint}

    def add(self, delta: Delta) -> list[Json]:
        """The choices that ``delta`` has to show: none while text is held back, two where a role comes first."""
        self.count(delta)
        if delta.finish_reason is not None:
            self._open.discard(delta.sequence_index)
        if delta.receipt is not None:
            self._receipts.append(delta.receipt)
        choices = self._chat_choices(delta) if self._job.chat else self._completion_choices(delta)
        if choices:
            self._begun.add(delta.sequence_index)
        return choices

    def continues(self, delta: Delta) -> bool:
        """Whether ``delta`` shows as ``continuation`` and changes nothing but the count of tokens: most do."""
        return (
            delta.finish_reason is None
            and delta.sequence_index in self._begun
            and self._job.logprobs is None
            and (bool(delta.text) or (self._job.token_ids and not self._job.chat and bool(delta.token_ids)))
        )

    def continuation(self, index: int, text: str, token_ids: object) -> Json:
        """A choice that has begun, with more ``text`` and, where they are shown, ``token_ids``."""
        shown: Json = {"delta": {"content": text}} if self._job.chat else {"text": text}
        choice: Json = {"index": index, **shown, "logprobs": None, "finish_reason": None}
        if self._job.token_ids:
            choice["token_ids"] = token_ids
        return choice

    def count(self, delta: Delta) -> None:
        """Its tokens, for the usage."""
        self._completion_tokens += len(delta.token_ids)

    def usage(self) -> Json:
        """Tokens in and out; a prompt counts once however often it is completed."""
        prompt_tokens = sum(map(len, self._job.request.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
        }

    def receipt(self) -> Json | None:
        """What the request mixed with: means over its sequences."""
        if not self._receipts:
            return None
        count = len(self._receipts)
        return _receipt(
            Receipt(
                private=self._receipts[0].private,
                temperature=sum(receipt.temperature for receipt in self._receipts) / count,
                live_members=sum(receipt.live_members for receipt in self._receipts) / count,
                reference_members=sum(receipt.reference_members for receipt in self._receipts) / count,
                mixing_entropy=sum(receipt.mixing_entropy for receipt in self._receipts) / count,
                group_fill=self._receipts[0].group_fill,
            )
        )

    def whole(self, choices: Sequence[Json]) -> Json:
        """The plain answer, of all the choices that ``add`` gave."""
        by_index: dict[int, list[Json]] = {}
        for choice in choices:
            by_index.setdefault(choice["index"], []).append(choice)
        join = _join_chat if self._job.chat else _join_completion
        joined = [join(by_index[index]) for index in sorted(by_index)]
        return {**self.head(stream=False), "choices": joined, "usage": self.usage(), "mot": self.receipt()}

    def _prompt(self, index: int) -> tuple[int, ...]:
        return self._job.request.prompts[index // self._job.request.n]

    def _shows(self, delta: Delta) -> bool:
        """Whether there is anything to send."""
        tokens = bool(delta.token_ids) and self._job.token_ids
        return bool(delta.text) or tokens or bool(self._logprobs_of(delta)) or delta.finish_reason is not None

    def _logprobs_of(self, delta: Delta) -> Sequence[TokenLogprob]:
        return delta.logprobs if self._job.logprobs is not None else ()

    def _completion_choices(self, delta: Delta) -> list[Json]:
        first = delta.sequence_index not in self._begun
        text, logprobs = delta.text, None
        if first:
            self._offsets[delta.sequence_index] = TextOffsets()
        if first and self._job.echo_texts is not None:
            echo = self._job.echo_texts[delta.sequence_index // self._job.request.n]
            self._offsets[delta.sequence_index] = TextOffsets(len(echo))
            text = echo + text
            if delta.prompt_logprobs is not None:
                logprobs = prompt_logprobs(
                    self._vocabulary, self._prompt(delta.sequence_index), delta.prompt_logprobs, echo
                )
        if not text and logprobs is None and not self._shows(delta):
            return []
        if self._logprobs_of(delta):
            new = completion_logprobs(self._vocabulary, delta.logprobs, self._offsets[delta.sequence_index])
            logprobs = _join_logprobs([logprobs, new])
        choice: Json = {"index": delta.sequence_index, "text": text, "logprobs": logprobs}
        self._finish(choice, delta, first)
        return [choice]

    def _chat_choices(self, delta: Delta) -> list[Json]:
        choices: list[Json] = []
        first = delta.sequence_index not in self._begun
        if first:
            role = {"role": "assistant", "content": ""}
            choices.append({"index": delta.sequence_index, "delta": role, "logprobs": None, "finish_reason": None})
            if self._job.token_ids:
                choices[0]["prompt_token_ids"] = list(self._prompt(delta.sequence_index))
        if self._shows(delta):
            entries = self._logprobs_of(delta)
            logprobs = chat_logprobs(self._vocabulary, entries) if entries else None
            content = {"content": delta.text} if delta.text else {}
            choice: Json = {"index": delta.sequence_index, "delta": content, "logprobs": logprobs}
            self._finish(choice, delta, first=False)
            choices.append(choice)
        return choices

    def _finish(self, choice: Json, delta: Delta, first: bool) -> None:
        """What chat and completion choices have in common."""
        choice["finish_reason"] = delta.finish_reason
        if self._job.token_ids:
            choice["token_ids"] = list(delta.token_ids)
            if first:
                choice["prompt_token_ids"] = list(self._prompt(delta.sequence_index))
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
            choice["mot"] = _receipt(delta.receipt) if delta.receipt is not None else None


def _receipt(receipt: Receipt) -> Json:
    return {
        "private": receipt.private,
        "temperature": receipt.temperature,
        "live_members": receipt.live_members,
        "reference_members": receipt.reference_members,
        "mixing_entropy": receipt.mixing_entropy,
        "group_fill": receipt.group_fill,
    }


def _join_logprobs(parts: Sequence[Json | None]) -> Json | None:
    """One ``logprobs`` object of several: their lists, one after the other."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    joined: Json = {}
    for name, value in present[0].items():
        joined[name] = [item for part in present for item in part[name]] if isinstance(value, list) else value
    return joined


def _join_rest(pieces: Sequence[Json]) -> Json:
    """Everything of a choice but its text: from the pieces, the last of which finished it."""
    last = pieces[-1]
    rest = {name: last[name] for name in ("finish_reason", "stop_reason", "mot")}
    if "token_ids" in last:
        rest["token_ids"] = [token for piece in pieces for token in piece.get("token_ids", ())]
        rest["prompt_token_ids"] = pieces[0]["prompt_token_ids"]
    return {"logprobs": _join_logprobs([piece["logprobs"] for piece in pieces]), **rest}


def _join_completion(pieces: Sequence[Json]) -> Json:
    text = "".join(piece["text"] for piece in pieces)
    return {"index": pieces[0]["index"], "text": text, **_join_rest(pieces)}


def _join_chat(pieces: Sequence[Json]) -> Json:
    content = "".join(piece["delta"].get("content", "") for piece in pieces)
    message = {"role": "assistant", "content": content, "refusal": None}
    return {"index": pieces[0]["index"], "message": message, **_join_rest(pieces)}
