"""Commands that serve: serve, key, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.terminal import ModelOption, fail, told
from server.config import Settings, read_settings

app = typer.Typer()


@app.command()
def serve(
    model: ModelOption = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in /v1/models.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0: any free one. [8000]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    quantize: Annotated[str | None, typer.Option(help="none, or int8 for the experts' weights.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the model.")] = None,
    engine: Annotated[str | None, typer.Option(help="process, or thread beside the event loop's. [process]")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, native (compiled) or plain.")] = None,
    group_fill: Annotated[str | None, typer.Option(help="reference, zeros or none.")] = None,
    position_window: Annotated[str | None, typer.Option(help="auto, or 1 for exact position, or more.")] = None,
    max_groups: Annotated[int | None, typer.Option(help="Decode groups a step before merging.")] = None,
    max_align_wait: Annotated[
        float | None, typer.Option(help="Milliseconds a request may wait for a group to reach its position. [0]")
    ] = None,
    max_prompt_wait: Annotated[
        float | None, typer.Option(help="Milliseconds a public prompt may wait for others to be computed with. [50]")
    ] = None,
    private: Annotated[str | None, typer.Option(help="default-off, default-on or force.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="TOML file of API keys; see `motserve key`.")] = None,
    kv_cache_memory: Annotated[str | None, typer.Option(help="Such as 1GiB or 512MB.")] = None,
    swap_memory: Annotated[str | None, typer.Option(help="For requests that make room for urgent ones. [1GiB]")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Sequences running at once. [256]")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Sequences queued before 429. [1024]")] = None,
    prefill_tokens: Annotated[int | None, typer.Option(help="Prompt tokens a step. [192 to 512, measured]")] = None,
    stream_interval: Annotated[
        str | None, typer.Option(help="Tokens an event of a stream; auto: by the load, at most 100 ms late. [auto]")
    ] = None,
    max_body_bytes: Annotated[str | None, typer.Option(help="Larger request bodies get 413. [1MiB]")] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds until a request is cut off. [600]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings.")] = None,
) -> None:
    """Serve a checkpoint over HTTP. Every flag is also an environment variable MOTSERVE_…; flags win, then the
    environment, then the file."""
    flags = {name: value for name, value in locals().items() if name != "config" and value is not None}
    with told():
        settings = read_settings(flags, config)
        _serve(settings)


def _serve(settings: Settings) -> None:
    from server.engine_process import EngineProcess, configure_logging, freeze

    configure_logging(settings)
    process = EngineProcess(settings) if settings.engine == "process" else None  # loads while this one imports
    import uvicorn  # a second to import: not for `motserve --help`

    from server.app import create_app
    from server.chat import ChatTemplate

    if process is not None:
        engine, ready = process.wait()
        name, folder = ready.name, ready.folder
    else:
        from server.loading import load

        loaded = load(settings)
        engine, name, folder = loaded.engine, loaded.name, loaded.folder
    application = create_app(engine, settings, name, chat_template=ChatTemplate.load(folder))
    freeze()
    uvicorn.run(
        application, host=settings.host, port=settings.port, log_level=settings.log_level, access_log=False,
        timeout_graceful_shutdown=5,
    )  # fmt: skip


@app.command()
def key(
    file: Annotated[Path, typer.Argument(help="The key file; made where there is none.")],
    name: Annotated[str, typer.Argument(help="Whose key it is; shown nowhere but in the file.")],
    tenant: Annotated[str | None, typer.Option(help="Public requests of one tenant may mix. [the name]")] = None,
    private: Annotated[str | None, typer.Option(help="default-off, default-on or force. [the server's]")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Completions under way at once.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Make an API key: its hash goes into the file, the key itself to standard output, this once."""
    from server.auth import KeyEntry, add_key, hash_of, new_key

    with told():
        secret = new_key()
        values = {
            "name": name, "sha256": hash_of(secret.encode()), "tenant": tenant, "private": private,
            "max_concurrent": max_concurrent, "requests_per_minute": requests_per_minute,
        }  # fmt: skip
        add_key(file, KeyEntry.model_validate(values))
        print(secret)


@app.command()
def generate(
    prompt: str,
    model: ModelOption = None,
    private: Annotated[bool, typer.Option("--private", help="Decode privately.")] = False,
    private_temperature: Annotated[float | None, typer.Option(help="0 to the checkpoint's temperature.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: Annotated[int | None, typer.Option()] = None,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """One completion in the terminal, streaming."""
    from server.generate import stream_text

    if private_temperature is not None and not private:
        fail("private_temperature: only with --private")
    with told():
        settings = read_settings(
            {"model": model, "device": device, "dtype": dtype} if model else {"device": device, "dtype": dtype}, None
        )
        pieces = stream_text(
            settings, prompt, private=private, private_temperature=private_temperature, max_tokens=max_tokens,
            temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
