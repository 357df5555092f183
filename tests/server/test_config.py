"""Settings: flags over environment over file; sizes and numbers; every mistake names its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import Settings, parse_automatic, parse_bytes, read_settings


def test_flags_win_over_the_environment_which_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('port = 1\nmax_concurrent = 1\nkv_cache_memory = "1MiB"\nposition_window = "auto"')
    monkeypatch.setenv("MOTSERVE_MAX_CONCURRENT", "2")
    monkeypatch.setenv("MOTSERVE_PORT", "2")
    settings = read_settings({"port": 3}, file)
    assert (settings.port, settings.max_concurrent, settings.kv_cache_memory) == (3, 2, 2**20)
    assert settings.position_window is None


@given(
    st.integers(0, 10**6), st.sampled_from(["", "B", "kB", "KiB", "mb", "MiB", "GB", "gib"]), st.sampled_from(["", " "])
)
def test_sizes(number: int, unit: str, space: str) -> None:
    factor = {"": 1, "b": 1, "kb": 10**3, "kib": 2**10, "mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30}
    assert parse_bytes(f"{number}{space}{unit}") == number * factor[unit.lower()]


@given(st.one_of(st.text(), st.floats(allow_nan=True), st.none(), st.booleans(), st.lists(st.integers())))
def test_what_is_no_size_or_number_is_refused_or_read(value: Any) -> None:
    for parse in (parse_bytes, parse_automatic):
        try:
            found = parse(value)
        except ValueError as error:
            assert repr(value) in str(error)
        else:
            assert found is None or isinstance(found, int)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 70000}, "port"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "float16"}, "dtype"),
        ({"group_fill": "ones"}, "group_fill"),
        ({"position_window": "0"}, "position_window"),
        ({"stream_interval": "0"}, "stream_interval"),
        ({"stream_interval": "often"}, "stream_interval"),
        ({"max_align_wait": -1}, "max_align_wait"),
        ({"max_align_wait": float("nan")}, "max_align_wait"),
        ({"private": "sometimes"}, "private"),
        ({"kv_cache_memory": "much"}, "kv_cache_memory"),
        ({"kv_cache_memory": 0}, "kv_cache_memory"),
        ({"swap_memory": "-1"}, "swap_memory"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"request_timeout": 0}, "request_timeout"),
        ({"kernels": "fast"}, "kernels"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_mistakes_name_their_field(flags: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        read_settings(flags, None)


@pytest.mark.parametrize("text", ["port = ", "nonsense = 3", "port = 'x'"])
def test_mistakes_in_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(ValueError, match=r"f\.toml|nonsense|port"):
        read_settings({}, tmp_path / "f.toml")
    with pytest.raises(ValueError, match="config"):
        read_settings({}, tmp_path / "missing.toml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 3  # type: ignore[misc]
