"""The whole server on the bundled checkpoint: golden logits through HTTP, many streams at once, disconnects."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from safetensors.torch import load_file

from model.checkpoint import save_model
from server.config import Settings
from tests.model.kinds import KINDS, make, trainers_logits
from tests.server.conftest import served

GOLDEN = sorted(path for path in (Path(__file__).parents[1] / "golden").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(Settings()) as url:
        yield url


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_logits_through_http(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    with served(Settings(model=folder, group_fill="zeros", dtype="float32")) as url:
        for case in ("full_groups", "padded_group", "single"):
            ids = expected[f"{case}.input_ids"].tolist()
            wanted = torch.log_softmax(expected[f"{case}.logits"], -1)
            body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 20}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
            assert len(answer["choices"]) == len(ids)
            for choice in answer["choices"]:
                row, found = choice["index"], choice["logprobs"]
                assert found["token_logprobs"][0] is None
                for position, tops in enumerate(found["top_logprobs"][1:]):
                    for name, value in tops.items():
                        token = int(name.removeprefix("token_id:"))
                        assert abs(value - wanted[row, position, token].item()) < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_through_http(name: str, tmp_path: Path) -> None:
    """A saved checkpoint of each kind, served, gives the trainer's log probabilities of a full group of prompts."""
    model = make(KINDS[name])
    save_model(model, tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 61, (4, 13), generator=torch.Generator().manual_seed(2))
    wanted = trainers_logits(model, ids)
    with served(Settings(model=tmp_path, group_fill="zeros", dtype="float32", log_level="error")) as url:
        body = {"prompt": ids.tolist(), "max_tokens": 0, "echo": True, "logprobs": 20}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
        (listed,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert KINDS[name].model_type in str(listed)
    assert len(answer["choices"]) == 4
    for choice in answer["choices"]:
        for position, tops in enumerate(choice["logprobs"]["top_logprobs"][1:]):
            for token, value in tops.items():
                expected = wanted[choice["index"], position, int(token.removeprefix("token_id:"))].item()
                assert abs(value - expected) < 1e-4


async def _streams(url: str, count: int) -> list[tuple[str, str | None]]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=300, max_retries=0)

    async def one(number: int) -> tuple[str, str | None]:
        stream = await client.completions.create(
            model="motserve-demo", prompt=f"Chapter {number}. It was", max_tokens=12, seed=number, stream=True,
            extra_body={"private": number % 4 == 0, "ignore_eos": True},
        )  # fmt: skip
        text, reason = "", None
        async for event in stream:
            text += event.choices[0].text
            reason = event.choices[0].finish_reason or reason
        return text, reason

    try:
        return await asyncio.gather(*(one(number) for number in range(count)))
    finally:
        await client.close()


@pytest.mark.parametrize("count", [pytest.param(64), pytest.param(200, marks=pytest.mark.slow)])
def test_many_streams_are_whole_and_private_ones_equal_the_plain_answer(address: str, count: int) -> None:
    answers = asyncio.run(_streams(address, count))
    assert [reason for _, reason in answers] == ["length"] * count
    for number in (0, 4, count - 4):
        body = {"prompt": f"Chapter {number}. It was", "max_tokens": 12, "seed": number, "private": True}
        plain = httpx.post(f"{address}/v1/completions", json={**body, "ignore_eos": True}, timeout=60).json()
        assert plain["choices"][0]["text"] == answers[number][0]


def test_events_hold_as_many_tokens_as_the_operator_says() -> None:
    body = {"prompt": "It was", "max_tokens": 12, "private": True, "seed": 1}
    body |= {"ignore_eos": True, "return_token_ids": True}
    with served(Settings(stream_interval=4, log_level="error")) as url:
        plain = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    chunks = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    assert [len(chunk["token_ids"]) for chunk in chunks] == [1, 4, 4, 3]
    assert "".join(chunk["text"] for chunk in chunks) == plain["text"]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == plain["token_ids"]


def test_eight_prompts_of_one_request_share_groups(address: str) -> None:
    prompts = [[number + 300] * 12 for number in range(8)]
    body = {"prompt": prompts, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    first = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
    assert first["mot"]["live_members"] > 1.5
    others = [prompts[0], *[[number + 900] * 12 for number in range(7)]]
    second = httpx.post(f"{address}/v1/completions", json={**body, "prompt": others}, timeout=60).json()
    assert first["choices"][0]["logprobs"]["token_logprobs"] != second["choices"][0]["logprobs"]["token_logprobs"]


def test_a_client_that_goes_away_frees_its_blocks(address: str) -> None:
    body = {"prompt": "Once", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(100):
        metrics = httpx.get(f"{address}/metrics").text
        if "motserve_kv_blocks_used 0.0" in metrics:
            return
        time.sleep(0.05)
    pytest.fail("blocks are still held")
