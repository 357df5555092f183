"""``motserve bench``: how fast the parts are, beside the machine's limits."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.cli.terminal import JsonOption, ModelOption, print_result, progress, told

app = typer.Typer()
bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure kernels, engine, server and grouping.")
app.add_typer(bench)

_Numbers = Annotated[str, typer.Option(help="Comma-separated.")]


def _list_of(name: str, text: str, kind: type[int] | type[float], low: float, high: float) -> list[Any]:
    """Raises ValueError naming the flag."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(low <= value <= high for value in values):
        raise ValueError(f"{name}: {text!r} is not a comma-separated list of numbers from {low:g} to {high:g}")
    return values


@bench.command("engine")
def engine(
    model: ModelOption = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead of a checkpoint.")] = None,
    concurrency: _Numbers = "1,8,32",
    private_share: _Numbers = "0,0.5,1",
    private_temperature: Annotated[float | None, typer.Option(help="Default: the checkpoint's pair.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 32,
    output_tokens: Annotated[int, typer.Option(min=2)] = 64,
    spread: Annotated[int, typer.Option(min=0, help="Prompts are up to so many tokens shorter.")] = 0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="So many in all, each one's end letting the next begin. [all at once]")
    ] = None,
    stagger: Annotated[
        int, typer.Option(min=0, help="With requests: the first ones begin so many steps after each other.")
    ] = 0,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: greedy.")] = 0.8,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    kernels: str = "auto",
    group_fill: str = "reference",
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline", help="Also a plain torch loop over the model in float32 and, where it is native, bfloat16."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Decode and prefill tokens a second of the engine alone, and where a step's time goes."""
    from server.bench.baseline import native_types, plain_rates
    from server.bench.engine import EngineLoad, bench_engine
    from server.bench.machine import machine_of
    from server.bench.shapes import config_of, random_model
    from server.config import read_settings
    from server.engine.request import Privacy, RequestError
    from server.loading import build_engine, load, quantize_experts, resolve_device, resolve_dtype

    with told(), progress("measuring") as (bar, task):
        shares = _list_of("private_share", private_share, float, 0, 1)
        counts = _list_of("concurrency", concurrency, int, 1, 4096)
        if requests is not None and requests < max(counts):
            raise ValueError(f"requests: {requests} are too few for {max(counts)} at once")
        if stagger and requests is None:
            raise ValueError("stagger: is for a closed loop; say how many requests in all")
        if baseline and requests is not None:
            raise ValueError("baseline: not with requests; the plain loop begins all of them together")
        flags = {"device": device, "dtype": dtype, "kernels": kernels, "group_fill": group_fill, "quantize": quantize}
        flags |= {"log_level": "error", "max_concurrent": max(counts), "kv_cache_memory": "4GiB"}
        settings = read_settings(flags if model is None else {**flags, "model": model}, None)
        if shape is None:
            loaded = load(settings)
            tested, default = loaded.engine.direct, loaded.engine.info.default_privacy
        else:
            config, on = config_of(shape), resolve_device(device)
            weights, fill = random_model(config, dtype=resolve_dtype(dtype, on), device=on)
            if settings.quantize == "int8":
                quantize_experts(weights)
            tested, default = build_engine(settings, weights, fill, None), Privacy(config.temperature, 0.01)
        if private_temperature is not None:
            default = Privacy(private_temperature, 0.0 if private_temperature == 0 else default.skip_below)
        machine = machine_of(tested.runner.model.device, tested.runner.model.dtype)
        loads = [
            EngineLoad(count, share, prompt_tokens, output_tokens, spread, requests, temperature, stagger)
            for count in counts
            for share in shares
        ]
        public: dict[int, float] = {}  # tokens a second by concurrency
        if baseline and (spread or 0 not in shares):
            raise ValueError("baseline: is for public requests of one length")
        try:
            for result in bench_engine(
                tested, loads, machine, default, repeats=repeats, progress=lambda done: bar.update(task, completed=done)
            ):
                named = {"shape": shape or "checkpoint", "dtype": str(tested.runner.model.dtype).split(".")[1]}
                named["quantize"] = settings.quantize
                print_result({**named, **result.as_dict()}, as_json=as_json)
                if result.private_share == 0:
                    public[result.concurrency] = result.output_tokens_per_second
        except RequestError as error:
            raise ValueError(str(error)) from None
        if not baseline:
            return
        if len(native_types(machine.device)) == 1:
            typer.echo("no baseline in bfloat16: this processor does not compute in it", err=True)
        for values in plain_rates(tested.runner.model, public, prompt_tokens, output_tokens, repeats):
            print_result({**values, "shape": shape or "checkpoint"}, as_json=as_json)


@bench.command("economy")
def economy(
    concurrency: _Numbers = "32,128,512",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 16,
    output_tokens: Annotated[int, typer.Option(min=2)] = 32,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    as_json: JsonOption = False,
) -> None:
    """The paper's MoT model against the dense one of equal FLOPs a token: decode tokens a second of the engine, and the
    limit that the machine's balance sets."""
    from server.bench.economy import bench_economy
    from server.bench.machine import machine_of
    from server.bench.shapes import config_of, random_model
    from server.config import read_settings
    from server.loading import build_engine, resolve_device, resolve_dtype

    with told(), progress("measuring") as (bar, task):
        counts = _list_of("concurrency", concurrency, int, 1, 4096)
        flags = {"device": device, "dtype": dtype, "kernels": kernels, "log_level": "error"}
        sizes = {
            "max_concurrent": max(counts),
            "kv_cache_memory": "4GiB",
            "prefill_tokens": max(counts) * prompt_tokens,
        }
        settings = read_settings({**flags, **sizes}, None)
        on = resolve_device(device)
        chosen = resolve_dtype(dtype, on)
        mot, dense = (
            build_engine(settings, *random_model(config_of(shape), dtype=chosen, device=on), None)
            for shape in ("paper", "paper-dense")
        )
        for result in bench_economy(
            mot, dense, counts, machine_of(on, chosen), prompt_tokens=prompt_tokens, output_tokens=output_tokens,
            repeats=repeats, progress=lambda done: bar.update(task, completed=done),
        ):  # fmt: skip
            print_result({"bench": "economy", "dtype": str(chosen).split(".")[1], **result.as_dict()}, as_json=as_json)


@bench.command("kernel")
def kernel(
    shape: Annotated[str, typer.Option(help="demo, paper or mot-medium.")] = "demo",
    mode: Annotated[
        list[str] | None, typer.Option(help="public, private, private_unmixed, attention or sampling; all.")
    ] = None,
    groups: _Numbers = "1,2,4,8,16,32,64",
    device: str = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, or int8: experts in int8, the rest by auto.")
    ] = "auto",
    kernels: str = "auto",
    as_json: JsonOption = False,
) -> None:
    """The MoT layer, attention and sampling, beside read bandwidth, matmul rate (on a CPU the better of float32 and the
    type asked for) and torch's batched product."""
    from server.bench.kernel import MODES, KernelBench
    from server.bench.machine import machine_of
    from server.bench.shapes import config_of
    from server.loading import resolve_device, resolve_dtype, resolve_kernels

    with told(), progress("measuring") as (bar, task):
        unknown = [name for name in mode or () if name not in MODES]
        if unknown:
            raise ValueError(f"mode: {unknown[0]!r} is not one of {', '.join(MODES)}")
        config, on = config_of(shape), resolve_device(device)
        if not config.is_grouped:
            raise ValueError(f"shape: {shape!r} has no experts")
        counts = _list_of("groups", groups, int, 1, 4096)
        chosen = resolve_dtype("auto" if dtype == "int8" else dtype, on)
        tested = KernelBench(
            shape, config, chosen, machine_of(on, chosen), resolve_kernels(kernels, on), quantized=dtype == "int8"
        )
        modes = [name for name in MODES if not mode or name in mode]
        for done, result in enumerate(tested.run(counts, modes), 1):
            bar.update(task, completed=done / len(modes) / len(counts))
            print_result(result.as_dict(), as_json=as_json)
