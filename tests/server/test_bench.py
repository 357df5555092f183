"""``motserve bench``: the keys that stay, sane figures, and mistakes told in one line."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from model.attention import attend_whole_sequences
from model.checkpoint import load_model
from model.mixing import WholeSequences
from model.native import computes_in_bfloat16
from server.bench.baseline import PlainLoop
from server.bench.machine import Machine, seconds_of
from server.cli import app
from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import Delta
from tests.server.conftest import Live, served, wait_until

GOLDEN = Path(__file__).parents[1] / "golden" / "mot-tiny"
SERVE_KEYS = {
    "concurrency", "private_share", "output_tokens_per_second", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "errors",
}  # fmt: skip


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def objects(found: Result) -> list[dict[str, Any]]:
    assert found.exit_code == 0, found.output
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A small model without a tokenizer: 97 tokens, 32 positions."""
    with served(Settings(model=GOLDEN)) as url:
        yield url


def test_serve_prints_an_object_a_setting(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    step = Engine.step

    def slow(engine: Engine) -> list[tuple[str, Delta]]:
        """So small a model may be done before a busy machine has read its first token: then no time lies between."""
        time.sleep(0.005)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow)
    picture = tmp_path / "serve.png"
    results = objects(
        bench(
            "serve", "--url", address, "--concurrency", "1,3", "--private-share", "0,1", "--requests", 6,
            "--prompt-tokens", "2:5", "--shared-prefix", 4, "--cache-salt", "s", "--output-tokens", 9,
            "--plot", picture, "--json",
        )
    )  # fmt: skip
    assert [(each["concurrency"], each["private_share"]) for each in results] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    for result in results:
        assert set(result) >= SERVE_KEYS
        assert (result["requests"], result["errors"], result["output_tokens"]) == (6, 0, 9)
        assert 6 <= result["prompt_tokens"] <= 9
        assert result["output_tokens_per_second"] == pytest.approx(6 * 9 / result["seconds"])
        assert 0 < result["itl_p50"] <= result["itl_p99"] < result["ttft_p99"] + result["seconds"]
        assert 0 < result["ttft_p50"] <= result["ttft_p99"] < result["seconds"]
        assert result["goodput"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_receipts_tell_the_share_where_requests_did_not(address: str) -> None:
    (result,) = objects(
        bench("serve", "--url", address, "--rate", 50, "--requests", 5, "--prompt-tokens", 3, "--output-tokens", 4,
              "--ttft-limit", 1e-6, "--json")
    )  # fmt: skip
    assert (result["rate"], result["private_share"], result["errors"], result["goodput"]) == (50, 0, 0, 0)
    assert result["concurrency"] > 0


def test_what_the_server_refuses_is_counted(address: str) -> None:
    found = bench("serve", "--url", address, "--concurrency", 2, "--requests", 4, "--prompt-tokens", 40, "--json")
    assert found.exit_code == 1
    result = json.loads(found.stdout)
    assert (result["errors"], result["errors_by_kind"], result["itl_p50"]) == (4, {"400": 4}, None)
    assert "4 of 4 failed (400: 4); the first: " in found.stderr and result["first_error"] in found.stderr


def test_text_prompts_and_lines_for_people(live: Live, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once\n\nThere was\n")
    found = bench(
        "serve", "--url", live.url, "--prompt-file", prompts, "--concurrency", 1, "--requests", 3, "--warmup", 0,
        "--output-tokens", 5, "--no-ignore-eos",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith("concurrency 1  ") and "  ttft_p50 " in found.stdout
    assert "errors_by_kind" not in found.stdout
    assert [request.sampling.ignore_eos for request in live.engine.requests] == [False] * 3
    assert live.engine.tokenizer is not None
    texts = {live.engine.tokenizer.decode(request.prompts[0]) for request in live.engine.requests}
    assert texts <= {"Once", "There was"}


def test_an_interrupt_prints_what_has_been_measured(live: Live) -> None:
    live.engine.delay = 0.02

    def interrupt() -> None:
        wait_until(lambda: len(live.engine.requests) > 4)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    thread = threading.Thread(target=interrupt)
    thread.start()
    found = bench(
        "serve", "--url", live.url, "--concurrency", "1,2", "--prompt-tokens", 4, "--output-tokens", 5, "--warmup", 1,
        "--requests", 100, "--json",
    )  # fmt: skip
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert found.exit_code == 130
    (result,) = map(json.loads, found.stdout.splitlines())
    assert 2 <= result["requests"] < 100 and result["errors"] == 0 and result["output_tokens"] == 5
    assert "interrupted" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--url", "http://127.0.0.1:1"), "--url"),
        (("--url", "http://[::1"), "url"),
        (("--concurrency", "1", "--rate", "2"), "rate"),
        (("--concurrency", "0"), "concurrency"),
        (("--rate", "-1"), "rate"),
        (("--private-share", "1.5"), "private_share"),
        (("--prompt-tokens", "9:3"), "prompt_tokens"),
        (("--output-tokens", "many"), "output_tokens"),
        (("--prompt-file", "/nowhere.txt"), "/nowhere.txt"),
        (("--prompt-file", "/dev/null"), "prompt_file"),
        (("--prompt-file", "/dev/null", "--vocab", "9"), "prompt_file"),
        (("--cache-salt", "s", "--private-share", "0"), "cache_salt"),
        (("--requests", "4", "--concurrency", "8"), "requests"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: tuple[str, ...], named: str) -> None:
    found = bench("serve", *arguments)
    assert found.exit_code == 2
    lines = [line for line in found.stderr.splitlines() if line.startswith("motserve: ")]
    assert len(lines) == 1 and named in lines[0], found.output
    assert "Traceback" not in found.output


def test_engine_prints_an_object_a_setting() -> None:
    results = objects(
        bench(
            "engine", "--model", GOLDEN, "--concurrency", "1,4", "--private-share", "0,1", "--prompt-tokens", 4,
            "--output-tokens", 6, "--repeats", 5, "--json",
        )
    )  # fmt: skip
    assert [(each["concurrency"], each["private_share"]) for each in results] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    for result in results:
        assert result["output_tokens_per_second"] > 0 and result["prefill_tokens_per_second"] > 0
        assert result["whole_tokens_per_second"] > 0
        parts = [result[f"{part}_share"] for part in ("scheduling", "grouping", "model", "sampling", "results")]
        assert 0.5 < sum(parts) < 1.01
        tokens_a_step = result["step_seconds"] * result["output_tokens_per_second"]
        assert result["concurrency"] / 5 < tokens_a_step < result["concurrency"] * 5  # a median and a mean


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_engine_beside_a_plain_loop(quantize: str) -> None:
    engine, *plain = objects(
        bench(
            "engine", "--model", GOLDEN, "--concurrency", 3, "--private-share", "0", "--prompt-tokens", 4,
            "--output-tokens", 6, "--repeats", 1, "--baseline", "--quantize", quantize, "--json",
        )
    )  # fmt: skip
    assert [each["dtype"] for each in plain] == ["float32", "bfloat16"][: 1 + computes_in_bfloat16()]
    for each in plain:
        assert each["concurrency"] == 3
        times = engine["output_tokens_per_second"] / each["output_tokens_per_second"]
        assert each["engine_speedup"] == pytest.approx(times)


def test_the_plain_loop_decodes_as_whole_sequences_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values kept, and groups filled with zeros, give the logits of the public model's layer."""
    model = load_model(GOLDEN)
    loop, ids = PlainLoop(model, 3, 9), torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    logits = model.logits

    def noted(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(logits(hidden))
        return seen[-1]

    monkeypatch.setattr(model, "logits", noted)
    with torch.inference_mode():
        for place in (slice(0, 4), *(slice(i, i + 1) for i in range(4, 9))):
            loop.step(ids[:, place])
        hidden = model(
            ids.flatten(), torch.arange(9).repeat(3),
            lambda _, qkv: attend_whole_sequences(qkv, 3, model.config.n_head), WholeSequences(model.config, 3),
        )  # fmt: skip
    wanted = logits(hidden).view(3, 9, -1)
    for found, last in zip(seen, (3, 4, 5, 6, 7, 8), strict=True):
        torch.testing.assert_close(found, wanted[:, last], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_limit_of_products_is_of_the_faster_type(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, dtype: str
) -> None:
    """Not by measuring: other work on the machine would decide."""
    monkeypatch.setattr("server.bench.machine.computes_in_bfloat16", lambda: has_bfloat16)
    assert Machine(torch.device("cpu"), torch.bfloat16).limits(repeats=1).matmul_dtype == dtype
    assert Machine(torch.device("cpu"), torch.float32).limits(repeats=1).matmul_dtype == "float32"


def test_long_work_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    monkeypatch.setattr("server.bench.machine._LONG", 0.0)
    assert seconds_of(lambda: runs.append(1)) > 0 and runs == [1]


def test_economy_prints_an_object_a_concurrency() -> None:
    (result,) = objects(
        bench("economy", "--concurrency", 2, "--prompt-tokens", 1, "--output-tokens", 3, "--repeats", 1, "--json")
    )
    assert result["concurrency"] == 2 and result["groups_per_step"] == 1
    assert result["ratio"] == pytest.approx(result["mot_tokens_per_second"] / result["dense_tokens_per_second"])
    assert 0 < result["limit"] < 1, "experts are read besides"


def test_kernel_prints_an_object_a_size_and_mode() -> None:
    results = objects(bench("kernel", "--groups", "1,2", "--mode", "public", "--mode", "private", "--json"))
    assert [(each["mode"], each["groups"]) for each in results] == [
        ("public", 1), ("public", 2), ("private", 1), ("private", 2),
    ]  # fmt: skip
    for result in results:
        assert result["shape"] == "demo" and result["dtype"] in ("float32", "bfloat16")
        assert result["seconds"] > 0
        assert {"kernel", "fraction_of_bandwidth", "fraction_of_matmul"} <= set(result)
        assert {"bmm_fraction_of_bandwidth", "bmm_fraction_of_matmul"} <= set(result)
    assert results[0]["fraction_of_bandwidth"] > 0 and results[0]["bmm_fraction_of_bandwidth"] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("engine", "--shape", "huge"), "shape"),
        (("engine", "--concurrency", "1,x"), "concurrency"),
        (("engine", "--model", GOLDEN, "--prompt-tokens", 40), "prompt"),
        (("kernel", "--mode", "sideways"), "sideways"),
        (("kernel", "--shape", "gpt2-small"), "gpt2-small"),
    ],
)
def test_a_mistake_of_the_others_too(arguments: tuple[object, ...], named: str) -> None:
    found = bench(*arguments)
    assert found.exit_code == 2
    lines = [line for line in found.stderr.splitlines() if line.startswith("motserve: ")]
    assert len(lines) == 1 and named in lines[0], found.output
