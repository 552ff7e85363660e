"""Every endpoint and field, asked by OpenAI's own client, compared with the model's own tokens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from rayllm.frontend.tokenizer import Tokenizer
from serve.serve_testing import Service

CHAT: list[Any] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": [{"type": "text", "text": "Name a"}, {"type": "text", "text": "colour."}]},
]
PROMPT = "The three primary colours are"
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GREEDY: dict[str, Any] = {"model": "smol", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_source(smollm2)


def chunks_of(stream: Any) -> list[Any]:
    return list(stream)


def test_chat(smol: Service, tokenizer: Tokenizer):
    answer = smol.openai.chat.completions.create(messages=CHAT, **GREEDY)
    [choice] = answer.choices
    assert (answer.object, answer.model, choice.index) == ("chat.completion", "smol", 0)
    assert choice.message.role == "assistant"
    plain = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Name a\ncolour."}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(plain), add_special_tokens=False)
    completion = smol.openai.completions.create(prompt=prompt, **GREEDY)
    assert choice.message.content == completion.choices[0].text
    assert choice.finish_reason == completion.choices[0].finish_reason
    assert answer.usage is not None and completion.usage is not None
    num_tokens = completion.usage.completion_tokens
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": len(prompt),
        "completion_tokens": num_tokens,
        "total_tokens": len(prompt) + num_tokens,
    }


def test_an_answer_goes_back_as_it_came(smol: Service):
    """With every role there is."""
    answer = smol.openai.chat.completions.create(messages=CHAT, **GREEDY)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        *CHAT,
        answer.choices[0].message.model_dump(),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": "Another one.", "name": "me"},
    ]
    again = smol.openai.chat.completions.create(messages=messages, **GREEDY)
    assert again.usage is not None
    assert again.usage.prompt_tokens > answer.usage.total_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [1, 3])
def test_a_chat_stream_is_the_whole_answer_in_pieces(smol: Service, n: int):
    asked: dict[str, Any] = GREEDY | {"messages": CHAT, "n": n, "temperature": 1, "seed": 5}
    whole = smol.openai.chat.completions.create(**asked)
    chunks = chunks_of(
        smol.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert len({chunk.id for chunk in chunks}) == 1
    *chunks, last = chunks
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [choice.finish_reason]
    assert len({choice.message.content for choice in whole.choices}) == n, "each choice has its own seed"


def test_a_stream_on_the_wire(smol: Service):
    with smol.http.stream("POST", "/v1/completions", json=GREEDY | {"prompt": PROMPT, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"


def test_prompts_of_all_kinds(smol: Service, tokenizer: Tokenizer):
    texts = [PROMPT, "Once upon a time"]
    ids = [tokenizer.encode(text) for text in texts]

    def ask(prompt: Any) -> list[str]:
        answer = smol.openai.completions.create(prompt=prompt, **GREEDY)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    both = ask(texts)
    assert len(both) == 2
    assert ask(ids) == both
    assert ask(texts[0]) + ask(ids[1]) == both


def test_n_of_several_prompts(smol: Service):
    asked = GREEDY | {"temperature": 1, "seed": 9, "n": 2}
    answer = smol.openai.completions.create(prompt=[PROMPT, "Water"], **asked)
    alone = smol.openai.completions.create(prompt="Water", **asked)
    assert [choice.text for choice in answer.choices][2:] == [choice.text for choice in alone.choices]
    assert alone.choices[0].text != alone.choices[1].text


def test_logprobs_of_completions(smol: Service, tokenizer: Tokenizer):
    answer = smol.openai.completions.create(prompt=PROMPT, echo=True, logprobs=2, **GREEDY)
    [choice] = answer.choices
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    assert choice.text.startswith(PROMPT)
    assert "".join(logprobs.tokens) == choice.text
    assert [
        choice.text[start:].startswith(t) for start, t in zip(logprobs.text_offset or [], logprobs.tokens, strict=True)
    ]
    num_prompt = len(tokenizer.encode(PROMPT))
    assert len(logprobs.tokens) == num_prompt + 12
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    for token, own, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[
        num_prompt:
    ]:
        assert max(top.values()) == top[token] == own, "greedy"
        assert len(top) == 2


def test_logprobs_of_chats(smol: Service):
    asked = GREEDY | {"messages": CHAT, "logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    [choice] = smol.openai.chat.completions.create(**asked).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    spelled = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert spelled.decode() == choice.message.content
    for entry in choice.logprobs.content:
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 3
    streamed = chunks_of(smol.openai.chat.completions.create(**asked, stream=True))
    parts = [part for chunk in streamed for c in chunk.choices if c.logprobs for part in c.logprobs.content]
    assert parts == choice.logprobs.content


def test_fields_reach_the_sampler(smol: Service, tokenizer: Tokenizer):
    def ask(**fields: Any) -> Any:
        extra = {k: fields.pop(k) for k in list(fields) if k in EXTRA}
        return smol.openai.completions.create(prompt=PROMPT, extra_body=extra, **(GREEDY | fields)).choices[0]

    plain = ask()
    first, second = tokenizer.encode(plain.text)[:2]
    assert ask(logit_bias={str(first): -100}).text != plain.text
    assert ask(stop=[plain.text[5:9]]).text == plain.text[:5]
    assert ask(stop=plain.text[5:9], include_stop_str_in_output=True).text == plain.text[:9]
    stopped = ask(stop_token_ids=[second])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", second)
    assert ask(temperature=2, top_k=1).text == plain.text
    assert ask(temperature=2, top_p=1e-6).text == plain.text
    assert ask(temperature=2, min_p=1).text == plain.text
    assert ask(repetition_penalty=100).text != plain.text
    assert ask(presence_penalty=2, frequency_penalty=2).text != plain.text
    seeded = {"temperature": 1, "seed": 3, "max_tokens": 30}
    assert ask(**seeded).text == ask(**seeded).text
    assert ask(**seeded).text != ask(**seeded | {"seed": 4}).text
    ended = ask(logit_bias={"2": 100}, max_tokens=5)
    assert (ended.text, ended.finish_reason) == ("", "stop")
    assert ask(logit_bias={"2": 100}, max_tokens=5, ignore_eos=True).finish_reason == "length"
    assert ask(logit_bias={"2": 100}, max_tokens=5, min_tokens=3).text != ""
    assert ask(logit_bias={"2": 100}, max_tokens=2, ignore_eos=True, skip_special_tokens=False).text == "<|im_end|>" * 2


EXTRA = {
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
    *("include_stop_str_in_output", "skip_special_tokens"),
}


def test_max_completion_tokens_and_the_template(smol: Service):
    asked: dict[str, Any] = {"model": "smol", "messages": CHAT, "temperature": 0}
    answer = smol.openai.chat.completions.create(**asked, max_completion_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    bare = smol.openai.chat.completions.create(
        **asked, max_tokens=3, extra_body={"chat_template_kwargs": {"add_generation_prompt": False}}
    )
    assert bare.usage is not None and bare.usage.prompt_tokens < answer.usage.prompt_tokens


def test_cached_tokens_are_told(smol: Service):
    prompt = list(range(100, 150))
    first, second = (smol.openai.completions.create(prompt=prompt, **GREEDY).usage for _ in range(2))
    salted = smol.openai.completions.create(prompt=prompt, extra_body={"cache_salt": "me"}, **GREEDY).usage
    cached = [usage.prompt_tokens_details.cached_tokens for usage in (first, second, salted)]  # type: ignore[union-attr]
    assert cached == [0, 48, 0]


def test_models_and_tokens(smol: Service, tiny: Service, tokenizer: Tokenizer):
    assert [model.id for model in smol.openai.models.list()] == ["smol"]
    assert tiny.openai.models.retrieve("org/tiny").model_dump()["max_model_len"] == 2048
    ids = tokenizer.encode("Grüße, 世界")
    answer = smol.http.post("/tokenize", json={"model": "smol", "prompt": "Grüße, 世界"}).json()
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 512}
    assert smol.http.post("/detokenize", json={"model": "smol", "tokens": ids}).json() == {"prompt": "Grüße, 世界"}
    chat = smol.http.post("/tokenize", json={"model": "smol", "messages": [{"role": "user", "content": "a"}]}).json()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    assert chat["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    assert smol.http.get("/version").json().keys() == {"version"}
    assert smol.http.get("/health").json() == {"status": "ok", "models": ["smol"]}


def test_the_async_client(smol: Service):
    async def ask() -> list[str]:
        client = AsyncOpenAI(base_url=f"{smol.url}/v1", api_key="none", max_retries=0)

        async def stream(prompt: str) -> str:
            chunks = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        return list(await asyncio.gather(*(stream(f"{PROMPT} {i}") for i in range(8))))

    streamed = asyncio.run(ask())
    whole = smol.openai.completions.create(prompt=[f"{PROMPT} {i}" for i in range(8)], **GREEDY)
    assert streamed == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("text", ["🦊 🐻", "漢字かな", "e\u0301a\u0308 नमस्ते"])
def test_characters_stay_whole(smol: Service, text: str):
    """The model copies a text whose characters take several tokens; no piece of the stream breaks one."""
    asked = GREEDY | {"prompt": " ".join([text] * 8), "max_tokens": 24}
    [whole] = smol.openai.completions.create(**asked).choices
    pieces = [chunk.choices[0].text for chunk in smol.openai.completions.create(stream=True, **asked)]
    assert text in whole.text
    assert len(pieces) > len(whole.text) / 4, "it came in pieces"
    assert "".join(pieces) == whole.text
    last_whole = "".join(pieces[:-1])
    assert "\N{REPLACEMENT CHARACTER}" not in last_whole, "only max_tokens may cut a character"


def test_a_stop_string_over_three_tokens(smol: Service, tokenizer: Tokenizer):
    [whole] = smol.openai.completions.create(prompt=PROMPT, **GREEDY).choices
    ids = tokenizer.encode(whole.text)
    before, span = tokenizer.decode(ids[:3]), tokenizer.decode(ids[3:6])
    stop = span[1:-1]
    assert stop in whole.text and len(ids) > 6
    expected = whole.text[: whole.text.index(stop)]
    assert len(expected) >= len(before)
    chunks = chunks_of(smol.openai.completions.create(prompt=PROMPT, stop=stop, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert (chunks[-1].choices[0].finish_reason, chunks[-1].choices[0].stop_reason) == ("stop", stop)
    smol.assert_idle()


def test_wrong_requests_name_the_field(smol: Service):
    chat, complete = smol.openai.chat.completions.create, smol.openai.completions.create
    wrong: list[tuple[Any, str | None]] = [
        (lambda: chat(messages=CHAT, **GREEDY | {"temperature": 3}), "temperature"),
        (lambda: chat(messages=[], **GREEDY), "messages"),
        (lambda: chat(messages=[{"role": "robot", "content": ""}], **GREEDY), "messages[0].role"),  # type: ignore
        (lambda: chat(messages=CHAT, tools=[TOOL], **GREEDY), "tools"),
        (lambda: chat(messages=CHAT, tool_choice="required", **GREEDY), "tool_choice"),
        (lambda: chat(messages=CHAT, modalities=["audio"], **GREEDY), "modalities"),
        (lambda: chat(messages=CHAT, reasoning_effort="high", **GREEDY), "reasoning_effort"),
        (lambda: complete(prompt=PROMPT, best_of=2, **GREEDY), "best_of"),
        (lambda: complete(prompt=PROMPT, **GREEDY | {"max_tokens": 0}), "max_tokens"),
        (lambda: complete(prompt=PROMPT, **GREEDY | {"max_tokens": 2.5}), "max_tokens"),
        (lambda: chat(messages=CHAT, top_logprobs=2, **GREEDY), "top_logprobs"),
        *[
            (
                lambda name=name: chat(messages=CHAT, extra_body={"chat_template_kwargs": {name: "x"}}, **GREEDY),
                "chat_template_kwargs",
            )
            for name in ("chat_template", "conversation", "tokenize", "messages", "self")
        ],
        (lambda: complete(prompt=PROMPT, suffix="x", **GREEDY), "suffix"),
        (lambda: complete(prompt=[], **GREEDY), "prompt"),
        (lambda: complete(prompt=[PROMPT, [1]], **GREEDY), "prompt"),  # type: ignore[list-item]
        (lambda: chat(messages=[{"role": "user", "content": "a " * 600}], **GREEDY), "messages"),
        (
            lambda: chat(messages=CHAT, extra_body={"max_completion_tokens": 3}, **GREEDY),
            "max_tokens",
        ),
        (lambda: complete(prompt=[49152], **GREEDY), "prompt"),
        (lambda: complete(prompt=[1] * 512, **GREEDY), "prompt"),
        (lambda: complete(prompt=PROMPT, logit_bias={"49152": 1}, **GREEDY), "logit_bias"),
        (lambda: complete(prompt=PROMPT, extra_body={"stop_token_ids": [49152]}, **GREEDY), "stop_token_ids"),
        (lambda: complete(prompt=PROMPT, extra_body={"snapkv_limit": 100}, **GREEDY), "snapkv_limit"),
        (lambda: complete(prompt=PROMPT, extra_body={"snapkv_limit": "none"}, **GREEDY), "snapkv_limit"),
        (lambda: complete(prompt=[PROMPT] * 2, n=65, **GREEDY), "n"),
        (lambda: complete(prompt=PROMPT, logprobs=21, **GREEDY), "logprobs"),
        (lambda: complete(prompt=PROMPT, n=129, **GREEDY), "n"),
        (lambda: complete(prompt=PROMPT, stop=["x"] * 17, **GREEDY), "stop"),
        (lambda: complete(prompt=PROMPT, stream_options={"include_usage": True}, **GREEDY), "stream_options"),
        (lambda: complete(prompt=PROMPT, extra_body={"min_tokens": 13}, **GREEDY), "min_tokens"),
        (lambda: complete(prompt=PROMPT, extra_body={"best_off": 2}, **GREEDY), "best_off"),
    ]
    for ask, param in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            ask()
        assert refused.value.param == param, refused.value
        assert refused.value.type == "invalid_request_error"
        assert "\n" not in refused.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        complete(prompt=PROMPT, **GREEDY | {"model": "gpt-4"})
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", b"", 400),
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/v2", b"", 404),
        ("GET", "/v1/models/none", b"", 404),
    ],
)
def test_wrong_bodies_and_paths(smol: Service, method: str, path: str, content: bytes, status: int):
    answer = smol.http.request(method, path, content=content, headers={"x-request-id": "r-1"})
    assert answer.status_code == status
    assert answer.headers["x-request-id"] == "r-1"
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_every_answer_has_an_id(smol: Service):
    ids = {smol.http.get(path).headers["x-request-id"] for path in ("/health", "/v1/models", "/nothing")}
    assert len(ids) == 3
