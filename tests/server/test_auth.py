"""Keys: who is let in, into whose groups, and how often; and that nothing else gets near the engine."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import auth
from server.auth import KeyEntry, KeyStore, Usage, add_key, hash_of, new_key, read_keys
from server.metrics import ENDPOINTS
from tests.server.conftest import Live, wait_until

ALICE, BOB, CAROL = "mot-alice", "mot-bob", "mot-carol"


def _write(path: Path, *keys: tuple[str, dict[str, Any]]) -> None:
    """The file, with a change that its times show."""
    path.unlink(missing_ok=True)
    path.touch()
    for secret, values in keys:
        add_key(path, KeyEntry(name=values.pop("name", secret), sha256=hash_of(secret.encode()), **values))
    os.utime(path, ns=(time.time_ns(), time.time_ns()))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    _write(
        path,
        (ALICE, {"tenant": "acme"}),
        (BOB, {"tenant": "acme", "private": "force"}),
        (CAROL, {"private": "default-on", "max_concurrent": 2, "requests_per_minute": 100}),
    )
    return path


@pytest.fixture
def live(serve: Callable[..., Live], file: Path) -> Live:
    return serve(api_keys=file)


def _ask(live: Live, key: str | None, **body: Any) -> Any:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return live.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, **body}, headers=headers)


def _parameters(live: Live) -> tuple[str, bool]:
    request = live.engine.requests[-1]
    return request.tenant, request.privacy is not None


def test_a_key_brings_its_tenant_and_its_rule(live: Live) -> None:
    assert _ask(live, ALICE).status_code == 200
    assert _parameters(live) == ("acme", False)
    assert _ask(live, ALICE, private=True).status_code == 200
    assert _parameters(live) == ("acme", True)
    assert _ask(live, BOB).status_code == 200
    assert _parameters(live) == ("acme", True)
    assert _ask(live, CAROL).status_code == 200
    assert _parameters(live) == (CAROL, True)  # a tenant of its own
    assert _ask(live, CAROL, private=False).status_code == 200
    assert _parameters(live) == (CAROL, False)
    refused = _ask(live, BOB, private=False)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "private")


def test_the_servers_force_outranks_a_keys_rule(serve: Callable[..., Live], file: Path) -> None:
    live = serve(api_keys=file, private="force")
    assert _ask(live, ALICE).status_code == 200
    assert _parameters(live) == ("acme", True)
    assert _ask(live, CAROL, private=False).status_code == 400


WRONG = [
    [],
    [b"Authorization: Bearer wrong"],
    [b"Authorization: Bearer " + ALICE.upper().encode()],
    [b"Authorization: Bearer " + ALICE.encode() + b"x"],
    [b"Authorization: Bearer " + ALICE[:-1].encode()],
    [b"Authorization: Bearer"],
    [b"Authorization: Bearer  "],
    [b"Authorization: " + ALICE.encode()],
    [b"Authorization: Basic " + ALICE.encode()],
    [b"Authorization: Bearer " + ALICE.encode() + b" " + BOB.encode()],
    [b"Authorization: Bearer " + ALICE.encode(), b"Authorization: Bearer wrong"],
    [b"Authorization: Bearer wrong", b"Authorization: Bearer " + ALICE.encode()],
    [b"Authorization: Bearer \xff\xfe\x80"],
    [b"Authorization: Bearer " + hash_of(ALICE.encode()).encode()],
    [b"Authorization: Bearer " + b"a" * 5000],
    [b"Authorization: Bearer *"],
    [b"X-Api-Key: " + ALICE.encode()],
    [b"Cookie: key=" + ALICE.encode()],
]


def _raw(live: Live, request: bytes) -> bytes:
    """The first line of the answer to exactly these bytes; empty where the server just hangs up."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        return connection.makefile("rb").readline()


def _posted(path: bytes, headers: list[bytes], method: bytes = b"POST") -> bytes:
    body = b'{"prompt": "a", "max_tokens": 1}'
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


def test_wrong_keys_are_refused(live: Live) -> None:
    for headers in WRONG:
        assert b" 401 " in _raw(live, _posted(b"/v1/completions", headers)), headers
    assert live.engine.requests == []


def test_spelling_of_the_scheme_does_not_matter(live: Live) -> None:
    for scheme in (b"bearer", b"BEARER", b"Bearer "):
        header = b"Authorization: " + scheme + b" " + ALICE.encode()
        assert b" 200 " in _raw(live, _posted(b"/v1/completions", [header]))


PATHS = [
    b"/v1/completions", b"/v1/chat/completions", b"/v1/models", b"/v1/models/tiny", b"/tokenize", b"/detokenize",
    b"/", b"//v1/completions", b"/v1//completions", b"/v1/completions/", b"/V1/COMPLETIONS", b"/%76%31/completions",
    b"/health/../v1/completions", b"/health/", b"/HEALTH", b"//health", b"/health%2f..%2fv1/completions", b"/health;/x",
    b"/health%00", b"/health%20", b"/.%2e/health", b"/metrics/..", b"/docs", b"/openapi.json", b"*",
    b"http://x/v1/completions", b"/v1/completions?key=" + ALICE.encode(), b"/v1/completions?/health", b"/nothing",
    b"/v1/completions#/health", b"/\xe2\x80\xae/health",
]  # fmt: skip


@pytest.mark.parametrize("method", [b"POST", b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE", b"BREW"])
def test_nothing_else_is_open(live: Live, method: bytes) -> None:
    for path in PATHS:
        line = _raw(live, _posted(path, [], method))
        assert line == b"" or b" 401 " in line or b" 400 " in line, path  # 400, silence: what cannot be parsed
    assert live.engine.requests == []


def test_the_open_paths(live: Live) -> None:
    for path in sorted(auth.OPEN):
        assert live.client.get(path).status_code == 200
        assert path in ENDPOINTS
    for path in sorted(ENDPOINTS - auth.OPEN):
        assert live.client.get(path).status_code == 401


def test_a_refusal_reads_nothing_and_says_how(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        # The body is announced and never comes.
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert b" 401 " in connection.makefile("rb").readline()
    answer = _ask(live, "secret-guess")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "secret-guess" not in answer.text


def test_openais_client_knows_the_refusal(live: Live) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="nonsense").models.list()
    assert openai.OpenAI(base_url=f"{live.url}/v1", api_key=ALICE).models.list().data[0].id == "tiny"


def test_changes_of_the_file_take_effect_at_once(live: Live, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(file, (BOB, {}), ("mot-dora", {}))
    assert _ask(live, ALICE).status_code == 401  # revoked
    assert _ask(live, "mot-dora").status_code == 200
    file.write_text("[[keys]]\nname = 'mot-secret'")
    assert _ask(live, "mot-dora").status_code == 200  # what was read before stays in force
    file.unlink()
    assert _ask(live, "mot-dora").status_code == 200
    assert _ask(live, ALICE).status_code == 401
    _write(file)
    assert _ask(live, "mot-dora").status_code == 401
    assert "mot-secret" not in caplog.text


def test_a_keys_concurrency(live: Live) -> None:
    assert _ask(live, CAROL, n=3).status_code == 429
    live.engine.delay = 0.05
    body = {"prompt": "a", "max_tokens": 40, "n": 2, "stream": True}
    headers = {"authorization": f"Bearer {CAROL}"}
    with live.client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = _ask(live, CAROL)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert _ask(live, ALICE).status_code == 200  # others are not concerned
    live.engine.delay = 0.0
    wait_until(lambda: _ask(live, CAROL, n=2).status_code == 200)  # the client left, and its place with it
    assert _ask(live, CAROL, n=2).status_code == 200
    assert _ask(live, CAROL, max_tokens=10_000).status_code == 400  # refused by the engine: nothing is held
    assert _ask(live, CAROL, n=2).status_code == 200


def test_a_keys_rate(serve: Callable[..., Live], tmp_path: Path) -> None:
    _write(tmp_path / "k", (ALICE, {"requests_per_minute": 3}), (BOB, {}))
    live = serve(api_keys=tmp_path / "k")
    assert [_ask(live, ALICE).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    assert _ask(live, BOB).status_code == 200


@given(st.integers(1, 100), st.lists(st.floats(0, 50), min_size=1, max_size=200))
@settings(deadline=None)
def test_the_rate_over_any_minute(per_minute: int, pauses: list[float]) -> None:
    usage, now, granted = Usage(), 1000.0, []
    for pause in pauses:
        now += pause
        wait = usage.spend(per_minute, now)
        if wait == 0:
            granted.append(now)
        else:
            assert 0 < wait <= 60 / per_minute
    for first in granted:
        assert sum(first <= at < first + 60 for at in granted) <= 2 * per_minute + 1  # a full bucket and a refill
    assert len(granted) <= per_minute + (now - 1000 - pauses[0]) * per_minute / 60 + 1


def test_every_entry_is_compared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    compare = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    store = KeyStore(file)
    for key, name in ((ALICE, ALICE), (CAROL, CAROL), ("wrong", None), ("", None)):
        found = store.find(key.encode())
        assert (found.name if found else None) == name
    assert len(compared) == 4 * 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[keys]]\nname = 'a'", "number 1: sha256"),
        ("[[keys]]\nname = 'a'\nsha256 = 'XYZSECRET'", "number 1: sha256"),
        ("[[keys]]\nname = 'a'\nsha256 = '" + "a" * 64 + "'\nprivate = 'sometimes'", "number 1: private"),
        ("[[keys]]\nname = 'a'\nsha256 = '" + "a" * 64 + "'\nadmin = true", "number 1: admin"),
        ("[[keys]]\nname = 'a'\nsha256 = '" + "a" * 64 + "'\nmax_concurrent = 0", "number 1: max_concurrent"),
        (2 * ("[[keys]]\nname = 'a'\nsha256 = '" + "a" * 64 + "'\n"), "number 2: name"),
        ("[[keys]]\nname='a'\nsha256='" + "a" * 64 + "'\n[[keys]]\nname='b'\nsha256='" + "a" * 64 + "'", "sha256"),
        ("keys = 3", "[[keys]]"),
        ("[other]\na = 1", "[[keys]]"),
        ("[[keys]", "keys.toml"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match="api_keys") as caught:
        read_keys(path)
    assert named in str(caught.value)
    assert "XYZSECRET" not in str(caught.value)


def test_a_missing_file_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        KeyStore(tmp_path / "none.toml")


@given(st.text(min_size=1, max_size=40).filter(str.strip))
@settings(max_examples=50, deadline=None)
def test_any_name_can_be_written_and_read(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    try:
        entry = KeyEntry(name=name, sha256=hash_of(new_key().encode()), max_concurrent=3, private="force")
    except ValueError:
        return  # a lone surrogate
    add_key(path, entry)
    assert read_keys(path) == (entry,)
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="already"):
        add_key(path, entry)


def test_reloading_beside_requests_loses_none(live: Live, file: Path) -> None:
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            replacement = file.with_suffix(".new")
            _write(replacement, (ALICE, {"tenant": "acme"}))
            os.replace(replacement, file)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        assert [_ask(live, ALICE).status_code for _ in range(50)] == [200] * 50
    finally:
        stop.set()
        thread.join()
