"""Events: one line of data each, whatever is inside."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.sse import EventEncoder, EventTemplate, event

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_an_event_is_one_line_and_a_blank_one(text: str) -> None:
    encoded = event({"text": text})
    line, *rest = encoded.decode().splitlines()  # at every separator that Unicode knows
    assert rest == [""]
    assert encoded.endswith(b"\n\n")
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


@given(st.dictionaries(TEXT, TEXT, min_size=1), st.dictionaries(TEXT, TEXT, min_size=1))
def test_a_shared_head_changes_nothing(head: dict[str, str], rest: dict[str, str]) -> None:
    encoded = EventEncoder(head).event(rest)
    assert json.loads(encoded.removeprefix(b"data: ")) == {**head, **rest}


def test_not_a_number_is_our_fault_and_never_sent() -> None:
    with pytest.raises(ValueError):
        event({"logprob": math.nan})


@given(TEXT, TEXT, st.lists(st.integers(0, 2**31)), st.booleans())
def test_a_template_is_the_event_with_other_contents(name: str, text: str, numbers: list[int], listed: bool) -> None:
    encoder = EventEncoder({"model": name})

    def encoded(text: str, numbers: object) -> bytes:
        choice = {"text": text, "logprobs": None} | ({"ids": numbers} if listed else {})
        return encoder.event({"choices": [choice], "usage": None})

    template = EventTemplate(encoded(EventTemplate.TEXT, EventTemplate.NUMBERS))
    assert template.event(text, numbers) == encoded(text, numbers)
