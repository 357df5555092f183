"""The engine's nouns: what is asked for, what is under way, what comes back.

Everything here is plain data. The engine speaks token ids; text appears only in ``Delta.text``.
"""

from __future__ import annotations

import enum
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


class RequestError(Exception):
    """A request that cannot be served as it stands. ``param`` names the field; ``code`` is OpenAI's, where it has
    one; ``status`` is the HTTP status it deserves."""

    def __init__(self, message: str, *, param: str | None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Ranges are checked by the HTTP schemas; log probabilities are of the model's own
    distribution, before temperature, penalties and bias."""

    max_tokens: int = 16
    min_tokens: int = 0  # before this many, neither end of text nor a stop token can be chosen
    temperature: float = 1.0  # 0: greedy, ties to the lowest id
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None  # alternatives per output token; None: no log probabilities
    prompt_logprobs: int | None = None  # the same for the prompt (``echo``)
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def ends(self, end_of_text: int | None) -> set[int]:
        """The tokens that end a sequence."""
        ends = set(self.stop_token_ids)
        if end_of_text is not None and not self.ignore_eos:
            ends.add(end_of_text)
        return ends


@dataclass(frozen=True)
class Privacy:
    """How a private request decodes: scores are divided by ``temperature`` (0: unmixed), experts whose
    redistribution weight is below ``skip_below`` are skipped."""

    temperature: float
    skip_below: float


@dataclass(frozen=True)
class EngineRequest:
    """One admitted-together set of sequences: ``prompts`` times ``n``, in that order (prompt-major)."""

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    n: int = 1
    privacy: Privacy | None = None  # None: public
    tenant: str = ""
    cache_salt: str | None = None  # private prompt beginnings are shared among equal salts only
    priority: int = 0  # lower runs first, as in vLLM
    stream_interval: int | None = 1  # tokens a delta has, but for a sequence's first and last; None: by the load


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log probability and the ``top`` alternatives, best first (ties: lowest id first)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Receipt:
    """What a request mixed with: means over its tokens, the prompt's included."""

    private: bool
    temperature: float
    live_members: float
    reference_members: float
    mixing_entropy: float
    group_fill: str


class Delta(NamedTuple):
    """News of one sequence of a request. ``text`` and ``token_ids`` are what is new; text may lag
    behind ids while a character or a possible stop string is incomplete. ``prompt_logprobs`` comes once, with the
    first delta, and has None at its first place."""

    sequence_index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    receipt: Receipt | None = None  # with the finish reason


@dataclass(frozen=True)
class StepStats:
    """One engine step, for metrics: aggregates only."""

    seconds: float = 0.0
    parts: tuple[float, ...] = ()  # of those seconds: scheduling, grouping, model, sampling, results
    prefill_tokens: int = 0
    decode_tokens: int = 0
    public_groups: int = 0
    public_tokens: int = 0  # live members of those groups
    private_tokens: int = 0
    reused_tokens: int = 0  # prompt tokens found in the prefix cache
    swapped_out: int = 0  # sequences that made room


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"  # its keys and values are in host memory
    FINISHED = "finished"


class MixingPart(NamedTuple):
    """Sums over some of a sequence's tokens."""

    tokens: int
    live: float
    reference: float
    entropy: float


_NOTHING = MixingPart(0, 0.0, 0.0, 0.0)


@dataclass(slots=True)
class MixingTally:
    """What stands behind a receipt, added up part by part: the same parts in the same order are the same bits."""

    tokens: int = 0
    live: float = 0.0
    reference: float = 0.0
    entropy: float = 0.0
    last: MixingPart = _NOTHING

    def add(self, part: MixingPart) -> None:
        self.tokens += part.tokens
        self.live += part.live
        self.reference += part.reference
        self.entropy += part.entropy
        self.last = part


class Sequence:
    """One running completion: token ids, KV blocks and how far they are computed."""

    def __init__(self, request: EngineRequest, index: int, arrival: int) -> None:
        self.request, self.sampling, self.private = request, request.sampling, request.privacy is not None
        self.index = index
        self.arrival = arrival  # engine-wide admission order
        self.prompt = request.prompts[index // request.n]
        self.token_ids: list[int] = list(self.prompt)
        self.computed = 0  # tokens whose keys and values are in the cache
        self.block_table: list[int] = []
        self.prefix_keys: list[bytes] = []  # of the prompt's whole units, where they may be shared
        self.shared: list[bytes] = []  # those of them whose blocks are the prefix cache's
        self.status = Status.WAITING
        self.ready_since: float | None = None  # when it could first decode, by the clock of alignment
        self.tally = MixingTally()
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        seed = request.sampling.seed
        # One stream per sequence: what is drawn depends on the seed and the place in the request alone.
        digest = hashlib.sha256(f"{seed}:{index}".encode()).digest() if seed is not None else None
        self.random = random.Random(int.from_bytes(digest, "big")) if digest else random.Random()

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt) :]

    @property
    def output_length(self) -> int:
        return len(self.token_ids) - len(self.prompt)

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.prompt)

    @property
    def longest(self) -> int:
        """Positions that this sequence may come to need keys and values for."""
        return len(self.prompt) + self.sampling.max_tokens
