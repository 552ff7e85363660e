"""Processes that die or hang under the service: what clients see, and how it comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from ray import serve

from serve.serve_testing import TINY, Service, eventually

pytestmark = pytest.mark.slow

NAME = "failing"
SEEDED: dict[str, Any] = TINY | {"seed": 7, "prompt": [5, 6, 7]}


@pytest.fixture(scope="module")
def service(deploy, tiny_model) -> Service:
    return deploy(NAME, **tiny_model, num_gpu_blocks_override=256, step_timeout_s=3)


@pytest.fixture(autouse=True)
def healthy_again(service: Service) -> Iterator[None]:
    yield
    eventually(lambda: service.http.get("/health").status_code == 200, 60, "the service to be back")
    answer = service.http.post("/v1/completions", json=SEEDED | {"max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] == 3
    service.assert_idle()


def pid_of(name: str) -> int:
    """The process that Ray calls `name`, of this test's cluster; the youngest, if there are several."""
    driver = psutil.Process(serve.get_deployment_handle("Engine", NAME).status.remote().result().stats.pid)
    if name == DRIVER:
        return driver.pid
    siblings = psutil.Process(driver.ppid()).children()
    found = [p for p in siblings if p.name().startswith(name) or p.cmdline()[:1] == [name]]
    return max(found, key=lambda process: process.create_time()).pid


REPLICA, DRIVER, SHARD = f"ray::ServeReplica:{NAME}:Engine", "driver", "ray::Shard.run"


class LongStream:
    """A request whose answer takes seconds, read on a thread."""

    def __init__(self, service: Service):
        self.text = ""
        self.finish: str | None = None
        self.error: Exception | None = None
        self.has_begun = threading.Event()
        self.service = service
        self.body = SEEDED | {"max_tokens": 500}
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        assert self.has_begun.wait(30)

    def _read(self) -> None:
        try:
            for chunk in self.service.openai.completions.create(**split(self.body), stream=True):
                self.text += chunk.choices[0].text
                self.finish = chunk.choices[0].finish_reason
                self.has_begun.set()
        except Exception as error:
            self.error = error

    def assert_complete(self) -> None:
        """It ended as it would have ended undisturbed."""
        self.thread.join(90)
        assert not self.thread.is_alive()
        assert self.error is None
        assert self.finish == "length"
        undisturbed = self.service.http.post("/v1/completions", json=self.body).json()
        assert self.text == undisturbed["choices"][0]["text"]


def split(body: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI's client takes it."""
    return {k: v for k, v in body.items() if k != "ignore_eos"} | {"extra_body": {"ignore_eos": True}}


@pytest.mark.parametrize("name", [REPLICA, SHARD])
def test_a_killed_process(service: Service, name: str):
    """Streams go on after a pause; requests meanwhile are answered late or refused at once; /health tells."""
    stream = LongStream(service)
    os.kill(pid_of(name), signal.SIGKILL)
    killed = time.monotonic()
    statuses: list[int] = []
    while not statuses or statuses[-1] != 200 or len(statuses) < 20:
        answer = service.http.get("/health")
        statuses.append(answer.status_code)
        if answer.status_code == 503:
            assert answer.headers["retry-after"]
            start = time.monotonic()
            refused = service.http.post("/v1/completions", json=SEEDED | {"max_tokens": 3})
            assert refused.status_code in (200, 503)
            if refused.status_code == 503:
                assert refused.headers["retry-after"]
                assert time.monotonic() - start < 2
        if 503 not in statuses:
            assert time.monotonic() - killed < 5, "/health says so"
        assert time.monotonic() - killed < 60
        time.sleep(0.1)
    stream.assert_complete()


def test_a_stuck_process(service: Service):
    stream = LongStream(service)
    stuck = pid_of(DRIVER)
    os.kill(stuck, signal.SIGSTOP)
    try:
        eventually(lambda: service.http.get("/health").status_code == 503, 15, "/health to say so")
        stream.assert_complete()
    finally:
        if psutil.pid_exists(stuck):
            os.kill(stuck, signal.SIGKILL)
