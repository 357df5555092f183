"""Frozen settings of the server, from flags, environment variables ``MOTSERVE_…`` and an optional file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(value: object) -> int:
    """``1GiB``, ``512 MB`` or a number of bytes. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is not a size such as 1GiB or 512MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_automatic(value: object) -> int | None:
    """``auto`` (None) or a whole number of at least 1. Raises ValueError."""
    if value is None or value == "auto":
        return None
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"{value!r} is neither 'auto' nor a whole number of at least 1")
    return number


class Settings(BaseSettings):
    """Every field is a flag of ``motserve serve`` and an environment variable ``MOTSERVE_<FIELD>``."""

    model_config = SettingsConfigDict(env_prefix="MOTSERVE_", frozen=True, extra="forbid", protected_namespaces=())

    model: Path | None = Field(None, description="checkpoint folder; the bundled demonstration model when absent")
    served_model_name: str | None = Field(None, min_length=1, description="name in /v1/models; default: the folder's")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["none", "int8"] = Field("none", description="int8: expert weights with a scale a channel")
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; default: torch's choice")
    engine: Literal["process", "thread"] = Field(
        "process", description="where the model runs: in a process of its own, or in a thread of the server's"
    )
    kernels: Literal["auto", "native", "plain"] = Field(
        "auto", description="native: compiled row-wise kernels (CPU, needs a C++ compiler); auto: where they are there"
    )
    group_fill: Literal["reference", "zeros", "none"] = "reference"
    position_window: Annotated[int | None, BeforeValidator(parse_automatic)] = Field(
        None, description="how far apart members of a decode group may be; 1: exact position; auto: by the machine"
    )
    max_groups: int | None = Field(None, ge=1, description="decode groups a step before merging; default: measured")
    max_align_wait: float = Field(
        0.0, ge=0, le=60_000, allow_inf_nan=False,
        description="milliseconds that a public request may wait, after its first token, for a group that is about to "
        "reach its position; 0: none waits",
    )  # fmt: skip
    max_prompt_wait: float = Field(
        50.0, ge=0, le=60_000, allow_inf_nan=False,
        description="milliseconds that a public prompt may wait, while others run, for prompts to be computed with; "
        "it does where that is found to save more waiting than it costs; 0: none waits",
    )  # fmt: skip
    private: Literal["default-off", "default-on", "force"] = "default-off"
    api_keys: Path | None = Field(None, description="TOML file of API keys; without one, anybody is served")
    kv_cache_memory: Annotated[int, BeforeValidator(parse_bytes)] = Field(2**30, ge=1)
    swap_memory: Annotated[int, BeforeValidator(parse_bytes)] = Field(
        2**30, ge=0, description="host memory for requests that make room for more urgent ones; 0: nobody does"
    )
    max_concurrent: int = Field(256, ge=1, description="sequences running at once")
    max_waiting: int = Field(1024, ge=1, description="sequences queued before new requests get 429")
    prefill_tokens: int | None = Field(
        None, ge=1, description="prompt tokens computed a step beside decoding; default: 192, of public prompts up to "
        "512 where the machine computes them while it reads the experts"
    )  # fmt: skip
    stream_interval: Annotated[int | None, BeforeValidator(parse_automatic)] = Field(
        None, description="tokens an event of a stream holds, but for the first and the last; auto: one, and more "
        "where streams would otherwise get more than 750 events a second for each core, but none over 100 ms late"
    )  # fmt: skip
    max_body_bytes: Annotated[int, BeforeValidator(parse_bytes)] = Field(2**20, ge=1, description="larger bodies: 413")
    request_timeout: float = Field(600.0, gt=0, description="seconds until a request is cut off")
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def read_settings(flags: Mapping[str, object], file: Path | None) -> Settings:
    """Flags win over environment variables, which win over the TOML file. Raises ValueError (pydantic's names the
    field)."""
    values: dict[str, object] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"config: {file}: {error}") from None
    kept = {name: value for name, value in values.items() if f"MOTSERVE_{name.upper()}" not in os.environ}
    return Settings(**{**kept, **flags})  # type: ignore[arg-type]
