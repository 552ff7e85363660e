"""The Api's connection to one model's Engine deployment, and what it knows of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import ray
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.engine import EngineStatus, Refusal
from rayllm.engine import ray_private
from rayllm.messages.sequences import NewSequence
from rayllm.messages.transport import Address

PROBE_PERIOD_S = 0.5
PROBE_TIMEOUT_S = 2.0

GONE = (ray.exceptions.RayError, RayServeException, DeploymentUnavailableError)
"""What a handle call raises when its replica is not there, or no longer."""


class ServeLink:
    """A client's `Link` through a Serve handle: one call for each choice, open as long as it is answered."""

    def __init__(self, engine: DeploymentHandle, recovery_timeout_s: float):
        self.trouble: str | None = "the engine is starting"
        """Why there is no engine now; None while there is one."""
        self.statuses: list[EngineStatus] = []
        """What each engine told that answered last."""
        self._engine = engine
        self._recovery_timeout_s = recovery_timeout_s
        self._heard = time.monotonic()
        """When an engine last told how it is, or ended an answer."""
        self._probed = asyncio.Event()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._prober = asyncio.get_running_loop().create_task(self._probe())

    async def answer(self, client: Address, sequence: NewSequence) -> None:
        """See `rayllm.frontend.client.Link`."""
        session_id = ray_private.serve_session_id()
        engine = self._engine.options(method_name="answer", session_id=session_id)
        response = engine.remote(client, sequence)
        call = asyncio.ensure_future(_result(response))
        try:
            waited: list[asyncio.Future[Any]] = [call, self._lost]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            refusal = call.result() if call.done() else Refusal(self.trouble or "no engine answers", is_full=False)
        finally:
            if not call.done():
                response.cancel()
                call.cancel()
        if refusal is not None:
            raise refusal.error()
        self._heard = time.monotonic()

    async def recover(self) -> bool:
        """Waits until an engine answers again, at most `recovery_timeout_s`."""
        deadline = time.monotonic() + self._recovery_timeout_s
        while time.monotonic() < deadline:
            self._probed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._probed.wait(), deadline - time.monotonic())
            if self.trouble is None:
                return True
        return False

    async def _probe(self) -> None:
        """Asks all engines how they are, for ever."""
        while True:
            try:
                response: Any = self._engine.broadcast("status")
                answers = await response.results_async(timeout_s=PROBE_TIMEOUT_S, return_exceptions=True)
                self.statuses = [answer for answer in answers if isinstance(answer, EngineStatus)]
                refusals = [answer.reason for answer in answers if isinstance(answer, Refusal)]
                self.trouble = None if self.statuses else next(iter(refusals), "no engine is running")
                if self.statuses:
                    self._heard = time.monotonic()
            except (TimeoutError, *GONE) as error:
                # late may be one stuck engine of several, which Serve will find, or this process in a burst of requests
                is_late = isinstance(error, TimeoutError)
                if not (is_late and (len(self.statuses) > 1 or time.monotonic() - self._heard < PROBE_TIMEOUT_S)):
                    self.statuses, self.trouble = [], "no engine answers"
            if self.trouble and time.monotonic() - self._heard > self._recovery_timeout_s:
                self._lost.set_result(None)  # calls that wait for a replica have waited long enough
                self._lost = asyncio.get_running_loop().create_future()
            self._probed.set()
            await asyncio.sleep(PROBE_PERIOD_S)


async def _result(response: Any) -> Refusal | None:
    try:
        refusal: Refusal | None = await response
        return refusal
    except GONE as error:
        return Refusal(f"the engine is gone ({type(error).__name__})", is_full=False)
