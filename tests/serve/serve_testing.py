"""What tests ask of a service that runs."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
from openai import OpenAI

TINY: dict[str, Any] = {"model": "org/tiny", "temperature": 1, "ignore_eos": True}
"""A request's body, but for prompt and length."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """An application that runs."""

    def __init__(self, url: str, name: str):
        self.url = url
        self.name = name
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        text = self.http.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def assert_idle(self) -> None:
        """Within a moment nothing runs or waits, and no block is used."""
        names = ("rayllm_running_sequences", "rayllm_waiting_sequences", "rayllm_kv_blocks_used")
        eventually(lambda: [self.metric(name) for name in names] == [0, 0, 0], 10, "the engine to be idle")


def eventually(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
