"""What the server emits beside a request's own answer: nothing of the request is in it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.checkpoint import load_model
from server.auth import KeyEntry, add_key, hash_of
from server.loading import DEMO, load_tokenizer

MARKER = "Quzzifax the vermilion tapir"
KEY, OTHER_KEY = "mot-Quzzifax-key", "mot-other"


class Served:
    """``motserve serve --log-level debug`` as a process of its own: all that it writes ends in one file."""

    def __init__(self, folder: Path) -> None:
        keys = folder / "keys.toml"
        for name, key in (("mine", KEY), ("theirs", OTHER_KEY)):
            add_key(keys, KeyEntry(name=name, sha256=hash_of(key.encode())))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.output = folder / "output"
        command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", str(port)]
        command += ["--log-level", "debug", "--api-keys", str(keys), "--request-timeout", "20"]
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self.client = httpx.Client(base_url=self.url, timeout=60)
        end = time.monotonic() + 60
        while True:
            assert time.monotonic() < end and self.process.poll() is None, self.output.read_text()
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)

    def post(self, path: str, body: Any, key: str = KEY) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=content, headers={"authorization": f"Bearer {key}"})

    def stop(self) -> str:
        self.client.close()
        self.process.terminate()
        self.process.wait(30)
        return self.output.read_text()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    if served.process.poll() is None:
        served.stop()


def _traces() -> re.Pattern[str]:
    """The marker's text, its words, or its token ids in any notation."""
    model = load_model(DEMO)
    tokenizer = load_tokenizer(DEMO, model.config)
    assert tokenizer is not None
    ids = tokenizer.encode(MARKER)
    return re.compile("|".join(["quzzifax", "vermilion", "tapir", r"\D+".join(map(str, ids[:4]))]), re.IGNORECASE)


def _answers_with_the_marker(served: Served) -> list[httpx.Response]:
    """Every place of a request where a client may write, with answers that are that client's own."""
    asked: list[tuple[str, Any]] = []
    for private in (False, True):
        salt = {"cache_salt": MARKER} if private else {}
        body = {"prompt": MARKER * 4, "max_tokens": 4, "private": private, "echo": True, "logprobs": 3, **salt}
        asked.append(("/v1/completions", body))
        asked.append(("/v1/completions", {**body, "stream": True, "stop": [MARKER], "user": MARKER}))
        messages = [{"role": "user", "content": MARKER}]
        asked.append(("/v1/chat/completions", {"messages": messages, "max_tokens": 4, "private": private}))
    asked.append(("/tokenize", {"prompt": MARKER}))
    return [served.post(path, body) for path, body in asked]


def _refusals_with_the_marker(served: Served) -> list[httpx.Response]:
    """Mistakes whose error messages, and logs, might quote."""
    bodies: list[Any] = [
        MARKER.encode(),
        {"prompt": MARKER, "model": MARKER},
        {"prompt": MARKER, "temperature": MARKER},
        {"prompt": [MARKER, 3]},
        {"prompt": MARKER, "stop": {"a": MARKER}},
        {"prompt": MARKER * 400, "max_tokens": 4},
        {"prompt": MARKER, "max_tokens": 10_000},
        {"prompt": MARKER, "logit_bias": {MARKER: 1}},
        {"prompt": MARKER, "cache_salt": MARKER},
        {"prompt": MARKER, "private": MARKER},
        json.dumps({"prompt": MARKER}).encode() + b"}",
        b'{"prompt": "' + MARKER.encode() + b'\xff"}',
    ]
    answers = [served.post("/v1/completions", body) for body in bodies]
    answers.append(served.post("/v1/chat/completions", {"messages": [{"role": MARKER, "content": MARKER}]}))
    answers.append(served.post(f"/v1/{MARKER}", {"prompt": MARKER}))
    answers.append(served.post("/v1/completions", {"prompt": MARKER}, key=f"wrong-{MARKER.split()[0]}"))
    answers.append(served.client.get(f"/v1/models/{MARKER}", headers={"authorization": f"Bearer {KEY}"}))
    assert all(400 <= answer.status_code < 500 for answer in answers)
    return answers


def test_nothing_of_a_request_leaves_but_in_its_answer(served: Served) -> None:
    traces = _traces()
    own = _answers_with_the_marker(served)
    assert all(answer.status_code == 200 for answer in own)
    assert sum(traces.search(answer.text) is not None for answer in own) >= 5, "the test would see it"
    seen = {f"refusal {n}": answer for n, answer in enumerate(_refusals_with_the_marker(served))}
    # A client that goes away in the middle.
    body = json.dumps({"prompt": MARKER, "max_tokens": 200, "stream": True, "ignore_eos": True})
    headers = {"authorization": f"Bearer {KEY}"}
    with served.client.stream("POST", "/v1/completions", content=body, headers=headers) as answer:
        lines = answer.iter_lines()
        next(lines)
        # Another's answers, while it runs.
        other = {"prompt": "The sea was calm", "max_tokens": 4, "logprobs": 3, "temperature": 0}
        seen["another tenant's"] = served.post("/v1/completions", other, key=OTHER_KEY)
        seen["another's stream"] = served.post("/v1/completions", {**other, "stream": True}, key=OTHER_KEY)
    for path in ("/metrics", "/health", "/ready", "/version"):
        seen[path] = served.client.get(path)
    seen["models"] = served.client.get("/v1/models", headers=headers)
    log = served.stop()
    assert "motserve" in log
    for place, answer in seen.items():
        assert traces.search(answer.text) is None, place
        assert traces.search(str(answer.headers)) is None, place
    assert traces.search(log) is None, traces.search(log)
    assert KEY not in log and hash_of(KEY.encode()) not in log


def test_routing_and_weights_leave_as_means_only(served: Served) -> None:
    answer = served.post("/v1/completions", {"prompt": MARKER, "max_tokens": 8, "private": True}).json()
    receipt = {"private", "temperature", "live_members", "reference_members", "mixing_entropy", "group_fill"}
    assert set(answer["mot"]) == receipt
    assert all(not isinstance(value, (list, dict)) for value in answer["mot"].values())
    assert "expert" not in served.client.get("/metrics").text
