"""Many streams at once, clients that go away, queues that fill up: nothing is lost, nothing leaks, nothing waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from serve.serve_testing import TINY, Service


def requests_of(rng: random.Random, count: int) -> list[dict[str, Any]]:
    return [
        TINY
        | {
            "prompt": [rng.randrange(3, 49000) for _ in range(rng.randint(1, 60))],
            "seed": rng.getrandbits(31),
            "max_tokens": rng.randint(1, 40),
        }
        for _ in range(count)
    ]


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The text of a stream that is complete."""
    text, finish = "", None
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                assert finish == "length"
                return text
            if line:
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                assert finish is None, "nothing comes after the end"
                text, finish = text + choice["text"], choice["finish_reason"]
    raise AssertionError("the stream ended early")


WATCH = """
import sys, time, urllib.request
while True:
    start = time.monotonic()
    assert urllib.request.urlopen(sys.argv[1]).status == 200
    print(time.monotonic() - start, flush=True)
    time.sleep(0.1)
"""


@pytest.mark.slow
def test_many_streams(tiny: Service, rng: random.Random):
    """200 at once, each complete, each equal to its unstreamed twin; /health answers meanwhile."""
    bodies = requests_of(rng, 200)

    async def streams() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=tiny.url, timeout=120, limits=limits) as client:
            return list(await asyncio.gather(*(stream(client, body) for body in bodies)))

    async def twins() -> list[str]:
        async with httpx.AsyncClient(base_url=tiny.url, timeout=120, limits=httpx.Limits(max_connections=20)) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0]["text"] for answer in answers]

    # a process of its own: this one is busy reading
    watcher = subprocess.Popen([sys.executable, "-c", WATCH, f"{tiny.url}/health"], stdout=subprocess.PIPE, text=True)
    streamed = asyncio.run(streams())
    assert watcher.poll() is None, "/health failed"
    watcher.kill()
    seconds = sorted(map(float, watcher.communicate()[0].split()))
    assert streamed == asyncio.run(twins())
    tiny.assert_idle()
    assert len(seconds) > 5
    assert seconds[int(0.95 * len(seconds))] < 1


def test_clients_that_go_away(tiny: Service, rng: random.Random):
    """At 100 random moments, streaming or not."""
    before = tiny.metric("rayllm_requests_total")

    async def leave(client: httpx.AsyncClient, body: dict[str, Any], is_stream: bool) -> None:
        work = stream(client, body) if is_stream else client.post("/v1/completions", json=body)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(work, rng.uniform(0, 1.5))

    async def work() -> None:
        async with httpx.AsyncClient(base_url=tiny.url, timeout=60) as client:
            bodies = [body | {"max_tokens": 1500} for body in requests_of(rng, 100)]
            await asyncio.gather(*(leave(client, body, i % 2 == 0) for i, body in enumerate(bodies)))

    asyncio.run(work())
    tiny.assert_idle()
    assert tiny.metric("rayllm_requests_total") > before


@pytest.mark.parametrize("is_stream", [True, False])
def test_the_blocks_of_a_client_that_left_are_free_at_once(tiny: Service, is_stream: bool):
    async def work() -> None:
        async with httpx.AsyncClient(base_url=tiny.url, timeout=60) as client:
            body = TINY | {"prompt": [5] * 100, "max_tokens": 1900, "stream": is_stream}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            while tiny.metric("rayllm_running_sequences") == 0:
                await asyncio.sleep(0.05)
            task.cancel()

    asyncio.run(work())
    tiny.assert_idle()


@pytest.mark.slow
def test_overload(deploy, tiny_model):
    """A queue of 8, 64 requests at once: each is answered in full, or refused at once with 429."""
    service = deploy(
        "overload",
        **tiny_model,
        max_num_seqs=4,
        max_queued_requests=8,
        num_gpu_blocks_override=200,
        max_model_len=512,
        max_queued_tokens=1000,
    )
    body = TINY | {"prompt": [7] * 20, "max_tokens": 60}

    async def work() -> list[tuple[httpx.Response, float]]:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:

            async def ask() -> tuple[httpx.Response, float]:
                start = time.monotonic()
                return await client.post("/v1/completions", json=body), time.monotonic() - start

            return list(await asyncio.gather(*(ask() for _ in range(64))))

    answers = asyncio.run(work())
    statuses = Counter(answer.status_code for answer, _ in answers)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 12
    for answer, seconds in answers:
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 60
        else:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"
            assert seconds < 5
    service.assert_idle()

    long = TINY | {"prompt": [8] * 500, "max_tokens": 12}
    too_many = service.http.post("/v1/completions", json=long | {"prompt": [long["prompt"]] * 9})
    assert too_many.status_code == 429, "3,200 + 1,000 tokens are the most"
    assert service.http.post("/v1/completions", json=long).status_code == 200
    service.assert_idle()
