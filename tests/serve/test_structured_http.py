"""Structured output as clients ask for it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from ray import serve

from serve.serve_testing import Service

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
CHAT: dict[str, Any] = {
    "model": "smol",
    "messages": [{"role": "user", "content": "Describe a few apples as JSON."}],
    "max_tokens": 60,
    "seed": 1,
}


class Apples(pydantic.BaseModel):
    """What SCHEMA describes, as a client's own type."""

    colour: str
    count: int


def check(text: str | None) -> None:
    jsonschema.validate(json.loads(text or ""), SCHEMA)


@pytest.mark.parametrize("strict", [True, False, None])
def test_json_schema(smol: Service, strict: bool | None):
    form: Any = {"type": "json_schema", "json_schema": {"name": "apples", "schema": SCHEMA, "strict": strict}}
    whole = smol.openai.chat.completions.create(**CHAT, response_format=form, n=2)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)
    stream = smol.openai.chat.completions.create(**CHAT, response_format=form, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


def test_other_forms(smol: Service):
    def ask(**fields: Any) -> str:
        answer = smol.openai.chat.completions.create(**CHAT, extra_body=fields)
        return answer.choices[0].message.content or ""

    assert ask(response_format={"type": "json_object"}).startswith("{"), "its end may come later"
    assert ask(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert ask(structured_outputs={"regex": "[0-9]{3}"}).isdigit()
    assert ask(structured_outputs={"grammar": 'start: "a" "b"'}) == "ab"
    check(ask(structured_outputs={"json": SCHEMA}))
    completion = smol.openai.completions.create(
        model="smol", prompt="Apples: ", max_tokens=60, extra_body={"structured_outputs": {"json": SCHEMA}}
    )
    check(completion.choices[0].text)
    handle = serve.get_app_handle("smol")
    check(handle.generate.remote("Apples: ", max_tokens=60, structured_outputs={"json": SCHEMA}).result()["text"])


def test_the_client_s_own_types(smol: Service):
    """What the client makes of a type, `$defs` and titles among it, and of the answer."""
    answer = smol.openai.chat.completions.parse(**CHAT, response_format=Apples)
    assert isinstance(answer.choices[0].message.parsed, Apples)


def test_an_answer_that_is_cut_off_says_so(smol: Service):
    answer = smol.openai.chat.completions.create(
        **CHAT | {"max_tokens": 3},
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    )
    assert answer.choices[0].finish_reason == "length"


def test_what_is_refused(smol: Service):
    def schema(body: Any) -> dict[str, Any]:
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": body}}}

    wrong: list[tuple[dict[str, Any], str, str]] = [
        (schema({"not": {}}), "response_format", 'Unimplemented keys: ["not"]'),
        (schema({"type": "strin"}), "response_format", "Invalid type: strin"),
        (schema({"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}), "response_format", "lexer error"),
        (schema({"$ref": "http://127.0.0.1:1/schema"}), "response_format", "not present in a registry"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"guided": "a"}}, "structured_outputs.guided", "not supported"),
        (schema({}) | {"structured_outputs": {"regex": "a"}}, "response_format", "give one"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    ]
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    wrong.append((schema(deep), "response_format", ""))
    for fields, param, message in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            smol.openai.chat.completions.create(**CHAT, extra_body=fields)
        assert message in refused.value.message
        assert refused.value.param == param
        assert "\n" not in refused.value.message
