"""API keys: who a request comes from, which tenant's groups it may join, and how much it may ask.

The file holds hashes, never keys. Everything that is not listed as open needs a key, unknown paths included, before
anything of the body is read. Knows no endpoints beyond the open ones, and no engine.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine.request import RequestError
from server.errors import error_response

PrivateRule = Literal["default-off", "default-on", "force"]
OPEN = frozenset({"/health", "/ready", "/version", "/metrics"})  # nothing of any request is to be seen there
SCOPE_KEY = "motserve.caller"

_log = logging.getLogger("motserve.auth")
_BEARER = re.compile(rb"bearer +([^\s]{1,512})", re.IGNORECASE)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("should be printable text")
    return text


_Name = Annotated[
    str, StringConstraints(min_length=1, max_length=128, strip_whitespace=True), AfterValidator(_printable)
]


class KeyEntry(BaseModel):
    """One ``[[keys]]`` table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: _Name
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    tenant: _Name | None = None  # None: the name, so that a key mixes with nobody else's unless it is said
    private: PrivateRule | None = None  # None: the server's
    max_concurrent: int | None = Field(None, ge=1, description="sequences under way at once")
    requests_per_minute: int | None = Field(None, ge=1)


@dataclass
class Usage:
    """What one key has under way; it outlives reloads of the file."""

    running: int = 0
    tokens: float | None = None  # of the bucket that ``requests_per_minute`` fills; None: full
    filled: float = 0.0

    def spend(self, per_minute: int, now: float) -> float:
        """Take one request; returns 0, or the seconds until there is one."""
        left = per_minute if self.tokens is None else self.tokens
        left = min(float(per_minute), left + (now - self.filled) * per_minute / 60)
        self.filled = now
        self.tokens = left - 1 if left >= 1 else left
        return 0.0 if left >= 1 else (1 - left) * 60 / per_minute


@dataclass(frozen=True)
class Caller:
    """Who asks. Without a key file everybody is the same one, with no limits."""

    tenant: str = ""
    private: PrivateRule | None = None
    max_concurrent: int | None = None
    usage: Usage = field(default_factory=Usage)

    def enter(self, sequences: int) -> Place:
        """Room for so many sequences, until it is left. Raises RequestError (429)."""
        if self.max_concurrent is not None and self.usage.running + sequences > self.max_concurrent:
            raise RequestError(
                f"This API key may have {self.max_concurrent} completions under way at once.",
                param=None,
                code="rate_limit_exceeded",
                status=429,
            )
        self.usage.running += sequences
        return Place(self.usage, sequences)


class Place:
    """What a request holds of its key's concurrency."""

    def __init__(self, usage: Usage, sequences: int) -> None:
        self._usage, self._sequences = usage, sequences

    def leave(self) -> None:
        """Idempotent."""
        self._usage.running -= self._sequences
        self._sequences = 0


ANYBODY = Caller()


def hash_of(key: bytes) -> str:
    """What the file holds. Keys are long and random, so that one round of SHA-256 is enough."""
    return hashlib.sha256(key).hexdigest()


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """The file's entries. Raises ValueError that names the entry and field, and quotes no value."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"api_keys: {path} cannot be read ({type(error).__name__})") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"api_keys: {path}: {error}") from None
    listed = tables.pop("keys", [])
    if tables or not isinstance(listed, list):
        raise ValueError(f"api_keys: {path}: only [[keys]] tables are known")
    entries = []
    for number, table in enumerate(listed, 1):
        try:
            entries.append(KeyEntry.model_validate(table))
        except ValidationError as error:
            wrong = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, wrong["loc"]))
            raise ValueError(f"api_keys: {path}: [[keys]] number {number}: {place}: {wrong['msg']}") from None
    for attribute in ("name", "sha256"):
        values = [getattr(entry, attribute) for entry in entries]
        twice = next((n for n, value in enumerate(values, 1) if values.index(value) != n - 1), None)
        if twice is not None:
            raise ValueError(f"api_keys: {path}: [[keys]] number {twice}: {attribute} is another entry's too")
    return tuple(entries)


def add_key(path: Path, entry: KeyEntry) -> None:
    """Append an entry to the file, which is made, readable by its owner only, where there is none. Raises
    ValueError."""
    if path.exists() and any(entry.name == other.name for other in read_keys(path)):
        raise ValueError(f"api_keys: {path} has a key of that name already")
    lines = [
        f"{name} = {json.dumps(value, ensure_ascii=False)}"
        for name, value in entry.model_dump(exclude_none=True).items()
    ]
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
        file.write("\n".join(["[[keys]]", *lines, "", ""]))


def new_key() -> str:
    """256 random bits."""
    return f"mot-{secrets.token_urlsafe(32)}"


class KeyStore:
    """The keys of a file, read again whenever it changes. A file that cannot be read leaves the last ones in force."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._signature()
        self._entries = read_keys(path)
        self._usage: dict[str, Usage] = {}

    def find(self, key: bytes) -> KeyEntry | None:
        """The entry of ``key``. Every entry is compared, each in constant time, whatever is found."""
        self._reload()
        presented = hash_of(key)
        found = None
        for entry in self._entries:
            if hmac.compare_digest(presented, entry.sha256):
                found = entry
        return found

    def usage_of(self, entry: KeyEntry) -> Usage:
        return self._usage.setdefault(entry.name, Usage())

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _reload(self) -> None:
        seen = self._signature()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._entries = read_keys(self._path)
        except ValueError as error:
            _log.error("%s; the keys read before stay in force", error)
            return
        _log.info("%d API keys read again", len(self._entries))


class KeyGuard:
    """Outside every handler and limit: lets open paths and known keys through, and says who it is."""

    def __init__(self, app: ASGIApp, store: KeyStore) -> None:
        self._app, self._store = app, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # there are none here
            return
        try:
            caller = self._caller(scope)
        except RequestError as error:
            response = error_response(error)
            if error.status == 401:
                response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        await self._app({**scope, SCOPE_KEY: caller}, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        match = _BEARER.fullmatch(headers[0]) if len(headers) == 1 else None
        entry = self._store.find(match[1]) if match else None
        if entry is None:
            missing = "Incorrect API key." if headers else "An API key is needed: 'Authorization: Bearer KEY'."
            raise RequestError(missing, param=None, code="invalid_api_key", status=401)
        usage = self._store.usage_of(entry)
        if entry.requests_per_minute is not None:
            wait = usage.spend(entry.requests_per_minute, time.monotonic())
            if wait:
                message = f"This API key may send {entry.requests_per_minute} requests a minute."
                raise RequestError(message, param=None, code="rate_limit_exceeded", status=429)
        return Caller(entry.tenant or entry.name, entry.private, entry.max_concurrent, usage)


def caller_of(scope: Scope) -> Caller:
    """Who the guard found; without a guard, anybody."""
    found = scope.get(SCOPE_KEY, ANYBODY)
    assert isinstance(found, Caller)
    return found
