"""``motserve bench serve``: a running server under load."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.bench import _list_of
from server.cli.terminal import JsonOption, print_result, progress, told


def _texts_of(file: Path) -> list[str]:
    """Its lines that are not blank. Raises ValueError and OSError naming the file."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"prompt_file: {file} is not UTF-8 text") from None
    if not lines:
        raise ValueError(f"prompt_file: {file} holds no prompts")
    return lines


def _run_loop(work: Coroutine[Any, Any, bool]) -> bool:
    """On uvloop where it is, which reads many small pieces in less time."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def serve(
    url: Annotated[str, typer.Option(help="Any server with OpenAI's completions.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Its name there. [the first in /v1/models]")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MOTSERVE_API_KEY")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests under way; comma-separated. [1,8,32]")] = None,
    rate: Annotated[str | None, typer.Option(help="Instead: random arrivals a second; comma-separated.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="A setting. [8 for each at once, at least 64]")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before each setting that are not measured.")] = 2,
    prompt_tokens: Annotated[str | None, typer.Option(help="A number, or a range such as 16:200. [64]")] = None,
    output_tokens: Annotated[str, typer.Option(help="A number, or a range such as 16:200.")] = "128",
    vocab: Annotated[int | None, typer.Option(min=1, help="Prompts are ids below it. [what motserve says]")] = None,
    shared_prefix: Annotated[int, typer.Option(min=0, help="Further prompt tokens, the same in all prompts.")] = 0,
    prompt_file: Annotated[Path | None, typer.Option(help="Text prompts, one a line, instead of token ids.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0: greedy. [not sent; the server's]")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for all output tokens; some servers refuse the field.")] = True,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Ask for token ids (motserve, vLLM): exact counts for each chunk.")
    ] = False,
    private_share: Annotated[str | None, typer.Option(help="Comma-separated. [the field is not sent]")] = None,
    cache_salt: Annotated[str | None, typer.Option(help="Sent with all requests that are not public.")] = None,
    ttft_limit: Annotated[float | None, typer.Option(min=0, help="Seconds to the first token, for goodput.")] = None,
    itl_limit: Annotated[float | None, typer.Option(min=0, help="Mean seconds between tokens, for goodput.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that the server may be silent.")] = 600,
    seed: int = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG of rate and times; needs matplotlib.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tokens a second and latency percentiles of a running server under load. Ctrl-C prints what has been measured.
    Exit status 1: no request was answered."""
    from clients.benchmark import Lengths, Limits, Load, LoadResult, Target, Traffic, bench_serve
    from server.plots import check_plotting, plot_serve

    results: list[LoadResult] = []

    def report(result: LoadResult) -> None:
        results.append(result)
        values = result.as_dict()
        kinds, first = values["errors_by_kind"], values["first_error"]
        if first is not None:
            named = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
            typer.echo(f"{result.errors} of {result.requests} failed ({named}); the first: {first}", err=True)
        if not as_json:
            del values["errors_by_kind"], values["first_error"]
        print_result(values, as_json=as_json)

    with told(), progress("measuring") as (bar, task):
        if plot is not None:
            check_plotting()
        if rate is not None and concurrency is not None:
            raise ValueError("rate: not with concurrency; requests either wait for one another or they do not")
        if prompt_file is not None and (prompt_tokens is not None or vocab is not None or shared_prefix):
            raise ValueError("prompt_file: not with prompt_tokens, vocab or shared_prefix, which are for token ids")
        rates = [] if rate is None else _list_of("rate", rate, float, 0.001, 100_000)
        counts = [] if rates else _list_of("concurrency", concurrency or "1,8,32", int, 1, 4096)
        shares = [None] if private_share is None else _list_of("private_share", private_share, float, 0, 1)
        if cache_salt is not None and not any(share is None or share > 0 for share in shares):
            raise ValueError("cache_salt: is for private requests, and there are none")
        if requests is not None and requests < max(counts, default=0):
            raise ValueError(f"requests: {requests} are too few for {max(counts)} at once")
        traffic = Traffic(
            prompt_tokens=Lengths.parse("prompt_tokens", prompt_tokens or "64"),
            output_tokens=Lengths.parse("output_tokens", output_tokens),
            model=model,
            vocabulary=vocab,
            shared_prefix=shared_prefix,
            texts=() if prompt_file is None else _texts_of(prompt_file),
            temperature=temperature,
            ignore_eos=ignore_eos,
            token_ids=token_ids,
            cache_salt=cache_salt,
            seed=seed,
        )
        loads = [
            Load(requests or max(64, 8 * (count or 0)), count, per_second, share, warmup)
            for count, per_second in [*((count, None) for count in counts), *((None, each) for each in rates)]
            for share in shares
        ]
        whole = _run_loop(
            bench_serve(
                Target(url, api_key, timeout), traffic, loads, Limits(ttft_limit, itl_limit), report,
                lambda done, speed: bar.update(task, completed=done, note=f"{speed:.1f} requests/s"),
            )
        )  # fmt: skip
        if plot is not None and results:
            plot_serve([result.as_dict() for result in results], plot)
    if not whole:
        typer.echo("interrupted: the last result is of what had ended", err=True)
        raise SystemExit(130)
    if all(result.errors == result.requests for result in results):
        raise SystemExit(1)
