"""Log probabilities as clients see them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from server.engine.request import TokenLogprob
from server.logprobs import TextOffsets, Vocabulary, chat_logprobs, completion_logprobs, prompt_logprobs


def test_the_chosen_token_is_always_among_the_alternatives(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    outside, inside = TokenLogprob(50, -4.0, ((60, -0.1), (61, -0.2))), TokenLogprob(60, -0.1, ((60, -0.1),))
    shown = completion_logprobs(vocabulary, [outside, inside], TextOffsets())
    text = {token: vocabulary[token].text for token in (50, 60, 61)}
    assert shown["tokens"] == [text[50], text[60]]
    assert list(shown["top_logprobs"][0].items()) == [(text[60], -0.1), (text[61], -0.2), (text[50], -4.0)]
    assert shown["top_logprobs"][1] == {text[60]: -0.1}


def test_tokens_of_one_text_are_told_apart(tokenizer: Tokenizer) -> None:
    """Lone bytes of multi-byte characters all look like U+FFFD."""
    first, second = [
        token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) in (b"\xc3", b"\xa9")
    ]
    entry = TokenLogprob(second, -0.2, ((first, -0.1), (second, -0.2)))
    shown = completion_logprobs(Vocabulary(tokenizer), [entry], TextOffsets())
    assert shown["top_logprobs"] == [{f"token_id:{first}": -0.1, "\ufffd": -0.2}]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_offsets_point_at_the_character_a_token_begins_in(text: str) -> None:
    tokenizer = _TOKENIZER
    vocabulary, offsets = Vocabulary(tokenizer), TextOffsets()
    raw = b""
    for token in tokenizer.encode(text):
        place = offsets.place(vocabulary[token])
        assert place == sum(byte & 0xC0 != 0x80 for byte in raw) - (tokenizer.token_bytes(token)[0] & 0xC0 == 0x80)
        assert text.encode().startswith(raw) and text[:place].encode() == raw[: len(text[:place].encode())]
        raw += tokenizer.token_bytes(token)


def test_without_a_tokenizer_tokens_are_ids() -> None:
    vocabulary = Vocabulary(None)
    shown = prompt_logprobs(vocabulary, [5, 6], [None, TokenLogprob(6, -1.0, ((7, -0.5),))], "")
    assert shown == {
        "tokens": ["token_id:5", "token_id:6"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"token_id:7": -0.5, "token_id:6": -1.0}],
        "text_offset": [0, 0],
    }


def test_minus_infinity_is_a_number(tokenizer: Tokenizer) -> None:
    entry = TokenLogprob(50, -math.inf, ((50, -math.inf),))
    assert chat_logprobs(Vocabulary(tokenizer), [entry])["content"][0]["logprob"] == -9999.0
    assert completion_logprobs(Vocabulary(tokenizer), [entry], TextOffsets())["token_logprobs"] == [-9999.0]


_TOKENIZER = Tokenizer.train(iter(["the café and the naïve façade"] * 3), vocab_size=300)
