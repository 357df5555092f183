"""Chat templates: the checkpoint's, in a sandbox, or the fallback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.errors import CheckpointError
from server.chat import ChatTemplate
from server.engine.request import RequestError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
SOURCE = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}<assistant>"


def write_config(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_without_a_template_contents_are_joined_by_blank_lines(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "Be brief.\n\nHello"
    write_config(tmp_path, eos_token="</s>")
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "Be brief.\n\nHello"


@pytest.mark.parametrize(
    "template", [SOURCE, [{"name": "rag", "template": "no"}, {"name": "default", "template": SOURCE}]]
)
def test_the_checkpoints_template(tmp_path: Path, template: object) -> None:
    write_config(tmp_path, chat_template=template, eos_token={"content": "</s>"})
    expected = "<system>Be brief.</s>\n<user>Hello</s>\n<assistant>"
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == expected


def test_a_template_file_comes_first(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="no")
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "2"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('not ' + messages[1].content) }}",
        "{{ messages[9].content }}",
        "{{ messages[1].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_refuses_quotes_nothing(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source).render(MESSAGES)
    assert caught.value.param == "messages"
    assert "Hello" not in str(caught.value)


@pytest.mark.parametrize("config", ['{"chat_template": "{% if %}"}', '{"chat_template": 1}', "[]", "{"])
def test_a_broken_template_is_found_when_it_is_loaded(tmp_path: Path, config: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(CheckpointError):
        ChatTemplate.load(tmp_path)
