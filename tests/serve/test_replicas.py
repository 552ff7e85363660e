"""Several engines behind one route: prefixes and sessions keep to theirs, load is shared, a death goes unnoticed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from ray import serve

from deployments.config import ApiConfig, ServedModel
from deployments.engine import engine_deployment
from deployments.router import REFRESH_S
from deployments.startup import forget, read_failure
from rayllm.checkpoint.sources import resolve_model
from rayllm.errors import UsageError
from serve.serve_testing import TINY, Service

BLOCK = 16
PREFIX = 16 * BLOCK
"""Tokens."""


@pytest.fixture(scope="module")
def engine(tiny_model: dict[str, Any]) -> dict[str, Any]:
    """Arguments of engines that hold all prefixes of a test."""
    limits = {"max_num_seqs": 8, "max_model_len": 1024, "num_gpu_blocks_override": 1024}
    return tiny_model | {"block_size": BLOCK} | limits


@pytest.fixture(scope="module")
def pair(deploy: Callable[..., Service], engine: dict[str, Any]) -> Service:
    return deploy("pair", **engine, num_replicas=2, api_replicas=2)


def prompt_of(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(3, 49000) for _ in range(num_tokens)]


def ask_all(service: Service, bodies: list[dict[str, Any]], at_once: int, **headers: str) -> list[dict[str, Any]]:
    """The answers, none of which fails."""

    async def work() -> list[dict[str, Any]]:
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(base_url=service.url, timeout=120, limits=limits, headers=headers) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=TINY | body) for body in bodies))
            assert {answer.text for answer in answers if answer.status_code != 200} == set()
            return [answer.json() for answer in answers]

    return asyncio.run(work())


def hit_rate(answers: list[dict[str, Any]]) -> float:
    usages = [answer["usage"] for answer in answers]
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    return float(cached / sum(usage["prompt_tokens"] for usage in usages))


def sequences(service: Service) -> Counter[str]:
    """How many each engine has been given so far."""
    response: Any = serve.get_deployment_handle("Engine", service.name).broadcast("status")
    return Counter({status.engine: status.stats.num_sequences for status in response.results()})


def shares(before: Counter[str], after: Counter[str]) -> list[float]:
    """Each engine's part of the sequences that came in between, the largest first."""
    risen = after - before
    return sorted((risen[engine] / risen.total() for engine in after), reverse=True)


@pytest.mark.slow
def test_engines_come_and_go_with_the_load(deploy, engine: dict[str, Any], rng: random.Random):
    """From one to two and back under requests that never fail, and so do the processes that serve HTTP."""
    service = deploy(
        "scaled",
        **engine,
        max_replicas=2,
        target_ongoing_requests=4,
        max_api_replicas=2,
        api_target_ongoing_requests=4,
        upscale_delay_s=0.5,
        downscale_delay_s=0.5,
    )

    def running() -> dict[str, int]:
        deployments = serve.status().applications["scaled"].deployments
        return {name: deployment.replica_states.get("RUNNING", 0) for name, deployment in deployments.items()}

    assert running() == {"Engine": 1, "Api": 1}
    most: Counter[str] = Counter()

    async def keep_asking(client: httpx.AsyncClient) -> None:
        while most != {"Engine": 2, "Api": 2}:
            body = TINY | {"prompt": prompt_of(rng, 20), "max_tokens": 50}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text

    async def work() -> None:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            askers = asyncio.gather(*(keep_asking(client) for _ in range(12)))
            while not askers.done():
                for name, number in (await asyncio.to_thread(running)).items():
                    most[name] = max(most[name], number)
                await asyncio.sleep(0.2)
            await askers

            deadline = time.monotonic() + 40
            while await asyncio.to_thread(running) != {"Engine": 1, "Api": 1}:
                assert time.monotonic() < deadline, "waited for one of each"
                answer = await client.post("/v1/completions", json=TINY | {"prompt": [5], "max_tokens": 5})
                assert answer.status_code == 200, answer.text
                await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(work(), 90))
    service.assert_idle()
    serve.delete("scaled")  # room for the others


def test_shards_have_whole_devices(host: str, engine: dict[str, Any]):
    """Whoever overrides what the application reserves for an engine is told what to do instead."""
    source = resolve_model(engine["model"], "auto")
    model = ServedModel.of(**engine)
    config = model.resolve(source.config, "cpu")
    app: Any = engine_deployment(model, config, source, "Engine", "STRICT_PACK", ApiConfig())
    app._bound_deployment = app._bound_deployment.options(placement_group_bundles=[{"CPU": 0.5}])
    with pytest.raises(RuntimeError):
        serve.run(app, name="half", route_prefix=None)
    [state] = serve.status().applications["half"].deployments.values()
    serve.delete("half")
    message = "placement_group_bundles must be [{'CPU': 1}], not [{'CPU': 0.5}]: shards have"
    assert f"UsageError: {message}" in state.message
    told = read_failure("half")
    assert isinstance(told, UsageError)
    assert str(told).startswith(message)
    forget("half")
    assert read_failure("half") is None


@pytest.mark.slow
def test_prefixes_keep_to_their_engine(tiny: Service, pair: Service, rng: random.Random):
    """Twenty prefixes, repeated: nearly the hit rate of one engine that sees all, and the load is shared."""
    prefixes = [prompt_of(rng, PREFIX) for _ in range(20)]
    bodies = [{"prompt": prefix + prompt_of(rng, 8), "max_tokens": 8} for _ in range(6) for prefix in prefixes]
    best = hit_rate(ask_all(tiny, bodies, at_once=8))
    before = sequences(pair)
    routed = hit_rate(ask_all(pair, bodies, at_once=8))
    assert best > 0.75
    assert routed >= 0.9 * best
    assert shares(before, sequences(pair))[0] <= 0.65


@pytest.mark.slow
def test_a_hot_prefix_spills_over(pair: Service, rng: random.Random):
    hot = prompt_of(rng, PREFIX)
    bodies = [{"prompt": (hot if i % 5 else prompt_of(rng, PREFIX)) + [i], "max_tokens": 16} for i in range(150)]
    before = sequences(pair)
    assert hit_rate(ask_all(pair, bodies, at_once=24)) > 0.6
    assert shares(before, sequences(pair))[0] <= 0.65


@pytest.mark.slow
def test_sessions_keep_to_their_engine(pair: Service, rng: random.Random):
    """Whatever they ask, over HTTP or a handle, and whichever process serves them."""
    time.sleep(2 * REFRESH_S)  # the load of the test before is forgotten
    handle = serve.get_app_handle("pair")
    engines = set()
    for i in range(20):  # enough that chance leaves neither engine without one
        session = f"user-{i}"
        before = sequences(pair)
        bodies = [{"prompt": prompt_of(rng, 2 * BLOCK), "max_tokens": 2} for _ in range(3)]
        ask_all(pair, bodies, 1, **{"X-Session-Id": session})
        of_session = handle.options(session_id=session)
        for body in bodies:
            of_session.generate.remote(body["prompt"], max_tokens=2).result()
        risen = sequences(pair) - before
        assert list(risen.values()) == [6]
        engines |= risen.keys()
    assert len(engines) == 2


@pytest.mark.slow
def test_an_engine_that_dies_is_not_missed(pair: Service, rng: random.Random):
    """What it had goes on on the other one, where new requests go too; none fails."""
    victim = serve.get_deployment_handle("Engine", "pair").status.remote().result()
    bodies = [{"prompt": prompt_of(rng, 40), "max_tokens": 60} for _ in range(120)]

    async def work() -> float:
        async with httpx.AsyncClient(base_url=pair.url, timeout=120) as client:
            requests = []
            for i, body in enumerate(bodies):
                requests.append(asyncio.create_task(client.post("/v1/completions", json=TINY | body)))
                if i == 40:
                    os.kill(victim.stats.pid, signal.SIGKILL)
                await asyncio.sleep(0.02)
            killed = time.monotonic()
            answers = await asyncio.gather(*requests)
            assert {answer.text for answer in answers if answer.status_code != 200} == set()
            assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {60}
            return time.monotonic() - killed

    assert asyncio.run(work()) < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_replicas": 3, "max_replicas": 2}, r"max_replicas must be at least num_replicas \(3\), not 2"),
        ({"target_ongoing_requests": 5}, "target_ongoing_requests must be left out without max_replicas, not 5"),
        ({"max_replicas": 2, "target_ongoing_requests": 0}, "target_ongoing_requests must be at least 1, not 0"),
        ({"tensor_parallel_size": 0.5}, "tensor_parallel_size must be int, not 0.5"),
    ],
)
def test_contradictory_engines(arguments: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=f"^{message}$"):
        ServedModel.of(model="m", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"api_replicas": 3, "max_api_replicas": 2},
            r"max_api_replicas must be at least api_replicas \(3\), not 2",
        ),
        ({"upscale_delay_s": 0}, "upscale_delay_s must be over 0, not 0"),
        ({"downscale_delay_s": -1}, "downscale_delay_s must be at least 0, not -1"),
    ],
)
def test_contradictory_processes(arguments: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=f"^{message}$"):
        ApiConfig.of(**arguments)
