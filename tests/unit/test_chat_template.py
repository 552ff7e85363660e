"""`chat_template`: a file, or the template itself, in the place of the tokenizer's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayllm.checkpoint.sources import resolve_model
from rayllm.config import EngineArgs
from rayllm.errors import UsageError
from rayllm.frontend.chat import with_chat_template_read
from rayllm.frontend.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"


def rendered(smollm2: Path, chat_template: str | None) -> str:
    args = EngineArgs(model=str(smollm2), chat_template=chat_template)
    return load_tokenizer(args, resolve_model(str(smollm2))).apply_chat_template(MESSAGES)


def test_a_template_replaces_the_tokenizers(smollm2: Path, tmp_path: Path):
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    assert rendered(smollm2, None).startswith("<|im_start|>")
    assert rendered(smollm2, TEMPLATE) == "<user> Hi\n"
    assert rendered(smollm2, str(file)) == "<user> Hi\n"


def test_other_nodes_get_the_text(tmp_path: Path):
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    args = with_chat_template_read(EngineArgs(model="m", chat_template=str(file)))
    assert args.chat_template == TEMPLATE
    assert with_chat_template_read(args) == args
    assert with_chat_template_read(EngineArgs(model="m")).chat_template is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content }}{{ undefined.field }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ tools[0] + 1 }}",
    ],
)
def test_a_template_may_want_other_messages(smollm2: Path, template: str):
    args = EngineArgs(model=str(smollm2), chat_template=template)
    load_tokenizer(args, resolve_model(str(smollm2)))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nowhere.jinja", "'nowhere.jinja' cannot be read: No such file or directory"),
        ("/", "'/' cannot be read: Is a directory"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("{% for m in messages %}", r"not valid Jinja \(line 1: Unexpected end of template"),
        ("\n{{ messages[0 }}", r"not valid Jinja \(line 2: "),
        ("{% frobnicate %}", r"not valid Jinja \(line 1: Encountered unknown tag 'frobnicate'"),
        ("BINARY", "cannot be read: it is not UTF-8"),
        ("PLAIN", "has no Jinja in it"),
        ("EMPTY", "has no Jinja in it"),
    ],
)
def test_what_is_no_template(smollm2: Path, tmp_path: Path, template: str, message: str):
    contents = {"BINARY": b"\xff{{", "PLAIN": b"Hello", "EMPTY": b""}
    if (content := contents.get(template)) is not None:
        (tmp_path / "file").write_bytes(content)
        template = str(tmp_path / "file")
    with pytest.raises(UsageError, match=message) as refused:
        rendered(smollm2, template)
    assert refused.value.param == "chat_template"
    assert "\n" not in str(refused.value)


def test_without_a_tokenizer_there_is_no_use_for_it():
    with pytest.raises(UsageError, match="skip_tokenizer_init must be off when chat_template is given"):
        EngineArgs(model="m", skip_tokenizer_init=True, chat_template=TEMPLATE)
