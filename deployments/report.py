"""What `rayllm serve` says of a service that runs: how much it does, and with `--log-requests` each request."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from ray import serve

from deployments.api import API
from deployments.engine import ENGINE, EngineStatus
from rayllm.engine.driver import EngineStats

PERIOD_S = 10.0
"""Time between two lines about the load."""
ANSWER_S = 2.0


@dataclass(frozen=True)
class Load:
    """What the engines of one model have counted together, or have now."""

    num_prefilled_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_blocks: int = 0

    @classmethod
    def of(cls, now: list[EngineStatus], before: dict[str, EngineStats]) -> Load:
        """How they are `now`, and what they counted since `before`, where an engine that is new had counted nothing."""

        def risen(name: str) -> int:
            return sum(getattr(s.stats, name) - getattr(before.get(s.engine), name, 0) for s in now)

        return cls(
            risen("num_prefilled_tokens"),
            risen("num_cached_tokens"),
            risen("num_output_tokens"),
            sum(status.stats.num_running for status in now),
            sum(status.stats.num_waiting for status in now),
            sum(status.num_blocks - status.stats.num_free_blocks for status in now),
            sum(status.num_blocks for status in now),
        )

    @property
    def is_idle(self) -> bool:
        """Nothing is there, and nothing was since the line before."""
        return not any((self.num_prefilled_tokens, self.num_output_tokens, self.num_running, self.num_waiting))

    def line(self, model: str, seconds: float) -> str:
        """How busy the model's engines are, and were in the last `seconds`."""
        num_prompt_tokens = self.num_prefilled_tokens + self.num_cached_tokens
        prompt_rate, output_rate = num_prompt_tokens / seconds, self.num_output_tokens / seconds
        return (
            f"{model}: {self.num_running} running, {self.num_waiting} waiting; "
            f"{prompt_rate:.1f} prompt tokens/s, {output_rate:.1f} output tokens/s; "
            f"KV cache {self.num_used_blocks / max(self.num_blocks, 1):.1%} used, "
            f"prefix hits {self.num_cached_tokens / max(num_prompt_tokens, 1):.1%}"
        )


class Report:
    """Prints what there is to say of the application `app` and its one model."""

    def __init__(self, app: str, model: str, log_requests: bool):
        self._model = model
        self._log_requests = log_requests
        self._api = serve.get_deployment_handle(API, app)
        self._engine = serve.get_deployment_handle(ENGINE, app)
        self._stats = {status.engine: status.stats for status in self._statuses()}
        self._told = time.monotonic()
        self._was_idle = True

    def tell(self) -> None:
        """Prints what is due; is to be called often."""
        self.tell_requests()
        if (seconds := time.monotonic() - self._told) >= PERIOD_S:
            self._told += seconds
            statuses = self._statuses()
            load = Load.of(statuses, self._stats)
            self._stats |= {status.engine: status.stats for status in statuses}
            if not (load.is_idle and self._was_idle):  # the first idle one tells that the work is over
                _say(load.line(self._model, seconds))
            self._was_idle = load.is_idle

    def tell_requests(self) -> None:
        """With `log_requests`, prints the requests that have ended."""
        if self._log_requests:
            for lines in self._ask(self._api, "request_lines"):
                for line in lines:
                    _say(line)

    def _statuses(self) -> list[EngineStatus]:
        return [status for status in self._ask(self._engine, "status") if isinstance(status, EngineStatus)]

    def _ask(self, handle: Any, method: str) -> list[Any]:
        """What the replicas answer; nothing of those that are gone or late."""
        with contextlib.suppress(Exception):
            answers: Any = handle.broadcast(method).results(timeout_s=ANSWER_S, return_exceptions=True)
            return [answer for answer in answers if not isinstance(answer, BaseException)]
        return []


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the service goes on where nobody listens
        print(time.strftime("%H:%M:%S"), line, flush=True)
