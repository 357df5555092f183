"""One completion without HTTP, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from server.config import Settings
from server.engine.engine import Engine
from server.engine.request import EngineRequest, Privacy, RequestError, SamplingParams
from server.loading import load


def stream_text(
    settings: Settings,
    prompt: str,
    *,
    private: bool,
    private_temperature: float | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> Iterator[str]:
    """The completion, piece by piece. Raises ValueError naming what is wrong, CheckpointError."""
    loaded = load(settings)
    engine, info = loaded.engine.direct, loaded.engine.info
    if engine.tokenizer is None:
        raise ValueError(f"{loaded.folder}: no tokenizer.json, so there is no text to generate from or to")
    privacy = None
    if private:
        default = info.default_privacy
        privacy = Privacy(
            default.temperature if private_temperature is None else private_temperature, default.skip_below
        )
    ids = engine.tokenizer.encode(prompt) or ([info.end_of_text] if info.end_of_text is not None else [])
    request = EngineRequest(
        "generate",
        (tuple(ids),),
        SamplingParams(
            max_tokens=max(1, min(max_tokens, info.max_positions - len(ids))),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        ),
        privacy=privacy,
    )
    try:
        engine.check(request)
    except RequestError as error:
        raise ValueError(str(error)) from None
    return _run(engine, request)


def _run(engine: Engine, request: EngineRequest) -> Iterator[str]:
    engine.add(request)
    while not engine.idle:
        for _, delta in engine.step():
            yield delta.text
