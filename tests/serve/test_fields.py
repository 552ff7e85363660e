"""What clients send without asking for anything, and how requests that cannot be served are refused."""

from __future__ import annotations

import asyncio
import time
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatFields
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as CompletionFields

from serve.serve_testing import Service

ASKED: dict[str, Any] = {"model": "smol", "temperature": 0, "max_tokens": 4}
CHAT: dict[str, Any] = ASKED | {"messages": [{"role": "user", "content": "Name a colour."}]}
COMPLETION: dict[str, Any] = ASKED | {"prompt": "The three primary colours are"}

NOTHING: dict[str, Any] = {
    "n": 1,
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "me",
    "user": "me",
}
OF_CHATS: dict[str, Any] = {
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "function_call": "none",
    "response_format": {"type": "text"},
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "verbosity": "low",
}
OF_COMPLETIONS: dict[str, Any] = {"best_of": 1, "suffix": ""}


def post(service: Service, path: str, body: dict[str, Any]) -> Any:
    answer = service.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_fields_that_ask_for_nothing(smol: Service):
    """Alone, all together, and null, which every field of OpenAI's may be."""
    for path, body, fields, known in (
        ("/v1/chat/completions", CHAT, NOTHING | OF_CHATS, ChatFields),
        ("/v1/completions", COMPLETION, NOTHING | OF_COMPLETIONS, CompletionFields),
    ):
        plain = post(smol, path, body)["choices"]
        assert post(smol, path, body | fields)["choices"] == plain
        nulls = dict.fromkeys(get_type_hints(known).keys() - body.keys() | {"not_yet_known"})
        assert post(smol, path, nulls | body)["choices"] == plain
        for name, value in fields.items():
            assert post(smol, path, body | {name: value})["choices"] == plain, name


def test_messages_come_back_from_any_server(smol: Service):
    answer: dict[str, Any] = {"role": "assistant", "content": "Red.", "reasoning_content": "Hm.", "refusal": None}
    answer |= {"annotations": [], "audio": None, "function_call": None, "tool_calls": None, "name": None}
    body = CHAT | {"messages": [*CHAT["messages"], answer, {"role": "user", "content": "Another?"}]}
    assert post(smol, "/v1/chat/completions", body)["choices"]


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_usage_in_every_event(smol: Service, path: str, body: dict[str, Any]):
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    text = smol.http.post(path, json=body | {"stream": True, "stream_options": options}).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n")[:-2]]
    usages = [httpx.Response(200, text=event).json()["usage"] for event in events]
    numbers = [usage["completion_tokens"] for usage in usages]
    assert numbers == sorted(numbers) and numbers[-1] == 4 and set(numbers) >= {1, 4}
    assert {usage["total_tokens"] - usage["completion_tokens"] for usage in usages} == {usages[0]["prompt_tokens"]}


def test_a_prompt_is_scored(smol: Service):
    scored = post(smol, "/v1/completions", COMPLETION | {"max_tokens": 0, "echo": True, "logprobs": 1})
    whole = post(smol, "/v1/completions", COMPLETION | {"echo": True, "logprobs": 1})
    [choice], [longer] = scored["choices"], whole["choices"]
    number = scored["usage"]["prompt_tokens"]
    assert (choice["text"], choice["finish_reason"]) == (COMPLETION["prompt"], "length")
    assert scored["usage"]["completion_tokens"] == 0
    for name, values in choice["logprobs"].items():
        assert len(values) == number, name
        assert values == longer["logprobs"][name][:number], name


def test_whole_numbers_are_integers(smol: Service):
    exact = post(smol, "/v1/completions", COMPLETION)["choices"]
    loose = COMPLETION | {"max_tokens": 4.0, "n": 1.0, "top_k": 0.0, "logit_bias": {"7": 0}, "temperature": 0.0}
    assert post(smol, "/v1/completions", loose)["choices"] == exact
    answer = smol.http.post("/v1/completions", content=b"\xef\xbb\xbf" + httpx.Request("POST", "/", json=loose).content)
    assert answer.json()["choices"] == exact
    for wrong in (2.5, "4", True):
        answer = smol.http.post("/v1/completions", json=COMPLETION | {"max_tokens": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens"), answer.text


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"model": "smol", "prompt": [['])
def test_deep_bodies(smol: Service, opening: bytes):
    answer = smol.http.post("/v1/completions", content=opening * 50_000)
    assert answer.status_code == 400, answer.text


def test_a_temperature_that_cannot_be_divided_by_is_greedy(smol: Service):
    greedy = post(smol, "/v1/completions", COMPLETION)["choices"]
    for temperature in (1e-38, 5e-324, 1e-31):
        assert post(smol, "/v1/completions", COMPLETION | {"temperature": temperature})["choices"] == greedy


def test_clients_recognise_a_prompt_that_is_too_long(smol: Service):
    long = "word " * 600
    for ask in (
        lambda: smol.openai.completions.create(**COMPLETION | {"prompt": long}),
        lambda: smol.openai.completions.create(**COMPLETION | {"prompt": [5] * 512}),
        lambda: smol.openai.completions.create(**COMPLETION | {"prompt": long * 1000}),
        lambda: smol.openai.chat.completions.create(**CHAT | {"messages": [{"role": "user", "content": long}]}),
    ):
        with pytest.raises(openai.BadRequestError, match="maximum context length") as refused:
            ask()
        assert refused.value.code == "context_length_exceeded"


@pytest.mark.slow
@pytest.mark.parametrize("long", ["word " * (2 << 20), "\x04" * (1 << 20), "é漢 " * (2 << 20)])
def test_a_huge_prompt_holds_up_nobody(smol: Service, long: str):
    """`\x04` has no token: however much of it there is says nothing of the number of tokens."""
    gaps: dict[str, float] = {"health": 0.0, "stream": 0.0}

    async def work() -> None:
        async with httpx.AsyncClient(base_url=smol.url, timeout=120, limits=httpx.Limits(max_connections=64)) as client:
            busy = True

            async def poll() -> None:
                while busy:
                    began = time.monotonic()
                    assert (await client.get("/health")).status_code == 200
                    gaps["health"] = max(gaps["health"], time.monotonic() - began)

            async def stream() -> None:
                body = COMPLETION | {"stream": True, "ignore_eos": True, "max_tokens": 400}
                while busy:
                    async with client.stream("POST", "/v1/completions", json=body) as response:
                        last = None
                        async for _ in response.aiter_bytes():
                            now = time.monotonic()
                            gaps["stream"] = max(gaps["stream"], now - (last or now))
                            last = now
                            if not busy:
                                break

            others = asyncio.gather(poll(), *(stream() for _ in range(16)))
            await asyncio.sleep(1)
            gaps.update(health=0.0, stream=0.0)
            for path, body in (
                ("/v1/completions", COMPLETION | {"prompt": long}),
                ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": long}]}),
            ):
                answer = await client.post(path, json=body)
                assert answer.status_code in (200, 400), answer.text[:200]
            busy = False
            await others

    asyncio.run(work())
    assert max(gaps.values()) < 0.5, gaps
