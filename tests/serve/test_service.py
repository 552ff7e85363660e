"""What is beside OpenAI's fields: keys, limits, several models, metrics, Python handles."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from deployments import report
from rayllm.errors import UsageError
from serve.serve_testing import Service, eventually

TINY: dict[str, Any] = {"model": "org/tiny", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def two(deploy, tiny_text_model: Path, smollm2: Path) -> Service:
    """Two models behind a key, with small limits."""
    common = {
        "tokenizer": str(smollm2),
        "model": str(tiny_text_model),
        "num_gpu_blocks_override": 64,
        "block_size": 16,
        "device": "cpu",
    }
    first = common | {"served_model_name": ["first", "premier"], "max_model_len": 64}
    second = common | {"served_model_name": "second", "max_model_len": 128, "enable_snapkv": True, "snapkv_limit": 64}
    template = {"chat_template": "{{ messages[0].content }} {{ messages[0].role }}"}
    more = {"allowed_origins": ["https://a.example"], "log_requests": True}
    models = [first, second | template]
    return deploy("two", models=models, api_keys=["secret", "other"], max_body_bytes=2000, **more)


def lines_of(service: Service) -> list[dict[str, str]]:
    """What was told of requests since the last call."""
    response: Any = serve.get_app_handle(service.name).broadcast("request_lines")
    lines = [line for lines in response.results(timeout_s=10) for line in lines]
    return [dict(field.split("=", 1) for field in line.split(" ")) for line in lines]


def test_keys(two: Service):
    assert two.http.get("/health").status_code == 200, "load balancers have no key"
    for headers in (
        {},
        {"authorization": "Bearer secre"},
        {"authorization": "Basic secret"},
        {"authorization": "secret"},
        {"x-api-key": "secre"},
        {"x-api-key": "Bearer secret"},
        {"x-api-key": "s\xe9cret".encode("latin-1")},
    ):
        for path in ("/v1/models", "/metrics"):
            answer = two.http.get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    for key in ("secret", "other"):
        client = OpenAI(base_url=f"{two.url}/v1", api_key=key)
        assert [model.id for model in client.models.list()] == ["first", "premier", "second"]
        assert two.http.get("/v1/models", headers={"x-api-key": key}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{two.url}/v1", api_key="x").models.list()


def test_models_are_chosen_by_name(two: Service):
    client = OpenAI(base_url=f"{two.url}/v1", api_key="secret")
    for name, length in (("first", 64), ("second", 128)):
        assert client.models.retrieve(name).model_dump()["max_model_len"] == length
        answer = client.completions.create(model=name, prompt=[5] * 60, max_tokens=50)
        assert answer.model == name
        assert answer.usage is not None and answer.usage.total_tokens == min(length, 110)
    described = two.http.get("/openapi.json").json()
    [named, _] = described["components"]["schemas"]["ChatRequest"]["properties"]["model"]["anyOf"]
    assert named["enum"] == ["first", "premier", "second"]


def test_a_model_has_several_names(two: Service):
    client = OpenAI(base_url=f"{two.url}/v1", api_key="secret")
    for name in ("first", "premier"):
        assert client.models.retrieve(name).id == name
        answer = client.completions.create(model=name, prompt=[5, 6], max_tokens=2, temperature=0)
        assert (answer.model, answer.usage and answer.usage.total_tokens) == (name, 4)
    headers = {"x-api-key": "secret"}
    metrics = two.http.get("/metrics", headers=headers).text
    counted = re.findall(r'rayllm_requests_total\{.*model="(\w+)"\}', metrics)
    assert "first" in counted and "premier" not in counted
    handle = serve.get_app_handle("two")
    assert handle.generate.remote([5, 6], "premier", max_tokens=2).result()["num_prompt_tokens"] == 2


def test_a_chat_template_of_ones_own(two: Service):
    headers = {"x-api-key": "secret"}

    def tokens(**body: Any) -> list[int]:
        found: list[int] = two.http.post("/tokenize", json=body, headers=headers).json()["tokens"]
        return found

    messages = [{"role": "user", "content": "Hello"}]
    assert tokens(model="second", messages=messages) == tokens(model="second", prompt="Hello user")
    assert tokens(model="first", messages=messages) != tokens(model="first", prompt="Hello user")


def test_pages_of_allowed_origins_may_ask(two: Service):
    """Preflights pass Serve's proxy and need no key; others get nothing that would let a page read the answer."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    path, allowed = "/v1/chat/completions", "access-control-allow-origin"
    answer = two.http.options(path, headers=asked | {"origin": "https://a.example"})
    assert (answer.status_code, answer.headers[allowed]) == (200, "https://a.example")
    assert "authorization" in answer.headers["access-control-allow-headers"]
    for headers, status in (({"x-api-key": "secret"}, 200), ({}, 401)):
        answer = two.http.get("/v1/models", headers=headers | {"origin": "https://a.example"})
        assert (answer.status_code, answer.headers[allowed]) == (status, "https://a.example")
    for origin in ("https://b.example", "https://a.example.b.example", "null"):
        assert allowed not in two.http.options(path, headers=asked | {"origin": origin}).headers
        answer = two.http.get("/v1/models", headers={"origin": origin, "x-api-key": "secret"})
        assert answer.status_code == 200 and allowed not in answer.headers


def test_no_page_may_ask_where_no_origin_is_allowed(tiny: Service):
    asked = {"access-control-request-method": "POST", "origin": "https://a.example"}
    answer = tiny.http.options("/v1/completions", headers=asked)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_compressed_bodies_are_refused(tiny: Service):
    body = json.dumps(TINY).encode()
    for encoding, content in (("gzip", gzip.compress(body)), ("br", body), ("gzip, identity", body)):
        answer = tiny.http.post("/v1/completions", content=content, headers={"content-encoding": encoding})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (415, "invalid_request_error")
        assert encoding in error["message"]
    for encoding in ("Identity", ""):
        assert tiny.http.post("/v1/completions", content=body, headers={"content-encoding": encoding}).is_success


def test_what_is_there_without_a_key(two: Service):
    for path in ("", "/"):
        answer = two.http.get(path)
        assert answer.headers["content-type"].startswith("text/plain")
        assert re.fullmatch(r"rayllm [^\n]*/openapi.json[^\n]*\n", answer.text)
    for ping in (two.http.get("/ping"), two.http.post("/ping")):
        assert (ping.status_code, ping.json()["status"]) == (200, "ok")


def test_requests_are_told_one_by_one(two: Service):
    """With their ids, tokens and ends, once they have ended; never their text."""
    lines_of(two)
    headers = {"x-api-key": "secret"}
    body = {"model": "second", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}

    def post(name: str, path: str = "/v1/completions", **fields: Any) -> None:
        two.http.post(path, json=body | fields, headers=headers | {"x-request-id": name})

    post("whole", n=2)
    post("stream", stream=True)
    post("premier", model="premier")
    post("wrong", model="secretive prompt")
    post("wrong path", path="/v2/a%20b%0Aid=c")
    two.http.get("/v1/models", headers={"x-request-id": "keyless"})
    with two.http.stream(
        "POST",
        "/v1/completions",
        json=body | {"prompt": [5], "max_tokens": 120, "stream": True},
        headers=headers | {"x-request-id": "left"},
    ) as response:
        next(response.iter_lines())
    two.http.get("/health")
    serve.get_app_handle("two").generate.remote([5, 6], "first", max_tokens=3, ignore_eos=True).result()
    found: list[dict[str, str]] = []

    def are_told() -> bool:
        found.extend(lines_of(two))
        return len(found) == 8

    eventually(are_told, 10, "all lines")
    for line in found:
        assert 0 <= float(line.pop("seconds")) < 60
    by_id = {line.pop("id"): list(line.values()) for line in found}
    path = "/v1/completions"
    left = by_id.pop("left")
    assert left[:3] == ["second", path, "1"] and left[4:] in (["abort", "200"], ["length", "200"])
    assert by_id.pop("whole") == ["second", path, "3", "8", "length", "200"]
    assert by_id.pop("stream") == ["second", path, "3", "4", "length", "200"]
    assert by_id.pop("premier") == ["first", path, "3", "4", "length", "200"]
    assert by_id.pop("wrong") == ["-", path, "0", "0", "-", "404"]
    assert by_id.pop("wrong%20path") == ["-", "/two/v2/a%20bid%3Dc", "0", "0", "-", "404"]
    assert by_id.pop("keyless") == ["-", "/v1/models", "0", "0", "-", "401"]
    assert list(by_id.values()) == [["first", "generate", "2", "3", "length", "200"]]


def test_the_load_is_told_while_there_is_some(
    tiny: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(report, "PERIOD_S", 0.2)
    tiny.assert_idle()
    watched = report.Report("tiny", "org/tiny", log_requests=False)

    def told() -> str:
        time.sleep(0.3)
        watched.tell()
        return capsys.readouterr().out

    assert told() == ""
    prompt = list(range(3, 35))
    long = TINY | {"prompt": prompt, "max_tokens": 1900, "stream": True}
    with tiny.http.stream("POST", "/v1/completions", json=long):
        pattern = (
            r"\d\d:\d\d:\d\d org/tiny: 1 running, 0 waiting; ([\d.]+) prompt tokens/s, ([\d.]+) output tokens/s; "
            r"KV cache ([\d.]+)% used, prefix hits ([\d.]+)%\n"
        )
        lines = [re.fullmatch(pattern, told()) for _ in range(2)]
        assert all(lines)
        assert float(lines[0][1]) > 0  # type: ignore[index]
        assert float(lines[1][1]) == 0  # type: ignore[index]
        assert float(lines[1][2]) > 0 and 0 < float(lines[1][3]) < 50  # type: ignore[index]
    tiny.assert_idle()
    after = [told() for _ in range(3)]
    assert "org/tiny: 0 running, 0 waiting; 0.0 prompt tokens/s" in after[0]
    assert after[-1] == ""
    tiny.http.post("/v1/completions", json=TINY | {"prompt": prompt, "max_tokens": 1})
    assert float(re.findall(r"prefix hits ([\d.]+)%", told())[0]) >= 50


def test_large_bodies(two: Service):
    answer = two.http.post("/v1/completions", content=b" " * 2001, headers={"authorization": "Bearer secret"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")


def test_metrics(tiny: Service):
    def read() -> dict[str, float]:
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(tiny.http.get("/metrics").text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0) + sample.value
        return values

    before = read()
    prompt = list(range(1000, 1040))
    for _ in range(2):
        tiny.http.post("/v1/completions", json=TINY | {"prompt": prompt, "n": 2}).raise_for_status()
    tiny.http.post("/v1/completions", json={})
    eventually(lambda: read()["rayllm_steps_total"] > before["rayllm_steps_total"], 5, "the engine's own numbers")
    after = read()

    def risen(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert risen("rayllm_requests_total") == 4
    assert risen("rayllm_prompt_tokens_total") == 80
    assert risen("rayllm_output_tokens_total") == 16
    assert risen("rayllm_cached_prompt_tokens_total") >= 64
    assert risen("rayllm_time_to_first_token_seconds_count") == 2
    assert risen("rayllm_request_seconds_count") == 2
    assert risen("rayllm_queue_seconds_count") == 4
    assert risen("rayllm_time_per_output_token_seconds_count") == 4
    assert risen("rayllm_http_responses_total") >= 3
    assert after["rayllm_kv_blocks"] == 1024


def test_python_handles(tiny: Service):
    """As the README shows them."""
    handle = serve.get_app_handle("tiny")
    prompt = [5, 6, 7]
    answer = handle.generate.remote(prompt, max_tokens=4, temperature=0, ignore_eos=True).result()
    assert answer["finish_reason"] == "length"
    assert len(answer["token_ids"]) == 4
    pieces = list(handle.options(stream=True).stream.remote(prompt, max_tokens=4, temperature=0, ignore_eos=True))
    assert "".join(piece["text"] for piece in pieces) == answer["text"]
    both = handle.generate.remote(prompt, max_tokens=4, n=2, seed=1).result()
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    with pytest.raises(UsageError, match="temperature must be a number from 0 to 100, not -1"):
        handle.generate.remote(prompt, temperature=-1).result()
    with pytest.raises(UsageError, match=r"unknown sampling parameter max_tokns: did you mean max_tokens\?"):
        handle.generate.remote(prompt, max_tokns=3).result()
    with pytest.raises(UsageError, match="model must be one of org/tiny, not 'tiny'") as refused:
        handle.generate.remote(prompt, "tiny").result()
    assert refused.value.cause.param == "model"  # type: ignore[attr-defined]
    tiny.assert_idle()


def test_snapkv(two: Service):
    body = TINY | {"model": "second", "prompt": list(range(100)), "temperature": 0}
    headers = {"authorization": "Bearer secret"}

    def ask(**fields: Any) -> int:
        answer = two.http.post("/v1/completions", json=body | fields, headers=headers).json()
        pruned: int = answer["usage"]["prompt_tokens_details"]["pruned_tokens"]
        return pruned

    assert [ask(), ask(snapkv_limit="all"), ask(snapkv_limit=40), ask(snapkv_limit=None)] == [36, 0, 60, 36]
    for limit in (65, 0, "none"):
        refused = two.http.post("/v1/completions", json=body | {"snapkv_limit": limit}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "snapkv_limit")
    line = re.compile(r'rayllm_pruned_tokens_total\{engine="\w+",model="second"\} 132.0')
    eventually(lambda: bool(line.search(two.http.get("/metrics", headers=headers).text)), 5, "the engine's own numbers")


# Command lines
