"""An engine as its owner has it: admits sequences, watches the processes, and has them started again when they die."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray

from rayllm.engine.driver import EngineStats
from rayllm.engine.launcher import Launcher
from rayllm.engine.shard import ShardStats
from rayllm.errors import EngineDeadError
from rayllm.messages.sequences import (
    Abort,
    AddClient,
    AddSequence,
    ClientGone,
    Ended,
    EngineDied,
    NewSequence,
    OwnerMessage,
)
from rayllm.messages.transport import Address, Receiver, Sender, remove_abandoned
from rayllm.progress import Progress, ProgressBar

logger = logging.getLogger("rayllm")

CHECK_PERIOD_S = 1.0
MAX_RESTARTS = 3


class Engine:
    """A driver and its shards, owned by this process: they end with it, or with `close`.

    When one of them dies or hangs, all sequences fail, and `recover` starts them again, `MAX_RESTARTS` times.

    Made anywhere, it belongs to the event loop that first calls `answer` or `check`.
    """

    def __init__(
        self,
        launcher: Launcher,
        progress: bool = True,
        report: Callable[[Progress], None] | None = None,
        max_restarts: int | None = None,
    ):
        """Starts driver and shards, and closes `launcher` if that fails: with `UsageError` for what they find wrong, or
        `EngineDeadError` when one of them fails.

        `progress` is shown on stderr, or else told to `report`. `max_restarts`: `MAX_RESTARTS` if it is None.
        """
        began = time.monotonic()
        self._launcher = launcher
        self.config = launcher.config
        self.host = launcher.host
        """This node's address, if the cluster has others."""
        self._report = report
        self._max_restarts = MAX_RESTARTS if max_restarts is None else max_restarts
        self._is_final = False
        """Whether it is not to be started again."""
        self._death: str | None = None
        """Why it is dead; None while it is not."""
        self._recovery: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: Receiver[OwnerMessage] | None = None
        self._to_driver: Sender | None = None
        self._clients: dict[Address, int] = {}
        """The numbers by which the driver knows them."""
        self._num_clients = 0
        self._watchers: list[asyncio.Task[None]] = []
        self._pending: dict[tuple[int, int], asyncio.Future[None]] = {}
        """Sequences that have not ended, by (client_id, sequence_id)."""
        try:
            shown: AbstractContextManager[Any] = ProgressBar() if progress else nullcontext(report)
            with shown as show:
                self._start(show)
        except BaseException:
            self.close()
            raise
        self.startup_s = time.monotonic() - began

    def _start(self, report: Callable[[Progress], None] | None) -> None:
        """Starts driver and shards, and the ways to and from them."""
        remove_abandoned()
        node_id = self._launcher.node_id
        self._inbox = Receiver(OwnerMessage, self.host)
        self.info = self._launcher.start(self._inbox.address(node_id), report)
        self._to_driver = Sender(self.info.address.seen_from(node_id))

    @property
    def trouble(self) -> str | None:
        """Why it answers nothing any more; None also while it is dead but may be started again."""
        return self._death if self._is_final or self._launcher.num_starts > self._max_restarts else None

    def stats(self) -> EngineStats:
        """What the driver counts; waits for it."""
        stats: EngineStats = ray.get(self._launcher.driver.stats.remote())
        return stats

    def shard_stats(self) -> list[ShardStats]:
        """Facts about the shards' processes, by rank; waits for them."""
        stats: list[ShardStats] = ray.get(self._launcher.driver.shard_stats.remote())
        return stats

    # ---- in an event loop

    async def answer(self, client: Address, sequence: NewSequence) -> None:
        """Lasts until the sequence, whose tokens go to `client`, has ended; cancelled, it aborts it.

        Raises `EngineDeadError` when it cannot end any more.
        """
        to_driver = self._attach()
        if (client_id := self._clients.get(client)) is None:
            client_id = self._clients[client] = self._num_clients
            self._num_clients += 1
            to_driver.send(AddClient(client_id, client.seen_from(self.info.address.node_id)))
        key = client_id, sequence.sequence_id
        ended = self._pending[key] = asyncio.get_running_loop().create_future()
        to_driver.send(AddSequence(client_id, sequence))
        try:
            await ended
        finally:
            if self._pending.pop(key, None) is not None and self._death is None:
                to_driver.send(Abort(client_id, [sequence.sequence_id]))

    async def recover(self) -> bool:
        """Starts driver and shards again where they were, unless that has been done, or was done too often."""
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.get_running_loop().create_task(self._recover())
        await asyncio.shield(self._recovery)  # who no longer waits leaves it to the others
        return self._death is None

    async def _recover(self) -> None:
        while self._death is not None and self.trouble is None:
            logger.warning("%s: the engine is started again", self._death)
            self._disconnect()
            self._launcher.stop(timeout_s=0)
            self._clients = {}
            try:
                await asyncio.get_running_loop().run_in_executor(None, self._start_again)
                self._death = self._death if self._is_final else None
            except Exception as error:  # a replacement node may lack the model, say
                self._is_final = self._is_final or not isinstance(error, EngineDeadError)
                self._death = str(error) or type(error).__name__

    def _start_again(self) -> None:
        if not self._launcher.has_place():  # a node has left
            self._is_final = True
            timeout_s = self.config.placement_timeout_s
            raise EngineDeadError(f"the cluster had no place for the engine within {timeout_s:g} s")
        self._start(self._report)

    async def check(self) -> EngineStats:
        """What the driver counts; raises `EngineDeadError` if it, or a shard, is dead or stuck.

        An engine that is found stuck counts as dead from then on.
        """
        self._attach()
        timeout_s = self.config.step_timeout_s
        try:
            stats: EngineStats = await asyncio.wait_for(self._launcher.driver.stats.remote(), timeout_s)
            if stats.stalled_s <= timeout_s:
                return stats
            reason = f"the shards have not answered a step for {stats.stalled_s:.0f} s"
        except TimeoutError:
            reason = f"the driver has not answered for {timeout_s:g} s"
        except ray.exceptions.RayError as error:
            reason = f"the driver died: {type(error).__name__}"
        self._fail(reason)
        raise EngineDeadError(reason)

    def _attach(self) -> Sender:
        """Ties this object to the running event loop, on first use; returns the way to the driver.

        Raises `EngineDeadError` if the engine is dead.
        """
        if self._death is not None:
            raise EngineDeadError(self._death)
        assert self._inbox is not None and self._to_driver is not None
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for fileno in self._inbox.filenos():
                self._loop.add_reader(fileno, self._receive)
            self._watchers = [self._loop.create_task(watch()) for watch in (self._watch, self._check_often)]
            self._receive()
        return self._to_driver

    def _receive(self) -> None:
        assert self._inbox is not None
        for message in self._inbox.receive(timeout_s=0):
            match message:
                case Ended():
                    for key in message.sequences:
                        self._end(key)
                case ClientGone():
                    self._clients = {a: number for a, number in self._clients.items() if number != message.client_id}
                    for key in [key for key in self._pending if key[0] == message.client_id]:
                        self._end(key, "the connection to the client has broken")
                case EngineDied():
                    self._fail(message.reason)

    def _end(self, key: tuple[int, int], reason: str | None = None) -> None:
        future = self._pending.pop(key, None)
        if future is None or future.done():
            return
        if reason is None:
            future.set_result(None)
        else:
            future.set_exception(EngineDeadError(reason))

    def _fail(self, reason: str) -> None:
        if self._death is None:
            self._death = reason
            for key in tuple(self._pending):
                self._end(key, reason)

    async def _watch(self) -> None:
        """Fails all sequences when the driver is gone: ZeroMQ would not tell."""
        try:
            await self._launcher.ended
            self._fail("the engine was stopped")
        except Exception as error:
            await asyncio.sleep(0.1)  # its own last words say more
            self._fail(f"the driver died: {type(error).__name__}")

    async def _check_often(self) -> None:
        """Notices an engine that hangs."""
        while True:
            await asyncio.sleep(CHECK_PERIOD_S)
            with contextlib.suppress(EngineDeadError):
                await self.check()

    def close(self) -> None:
        """Frees everything: actors, resources, and Ray if this engine started it. May be called twice."""
        self._is_final = True
        self._fail("the engine was closed")
        self._disconnect()
        self._launcher.close()

    def _disconnect(self) -> None:
        """Closes the ways to and from the driver, and leaves the event loop."""
        if self._inbox is not None:
            if self._loop is not None and not self._loop.is_closed():
                for fileno in self._inbox.filenos():
                    self._loop.remove_reader(fileno)
                for watcher in self._watchers:
                    watcher.cancel()
            self._loop = None
            self._inbox.close()
            self._inbox = None
        if self._to_driver is not None:
            self._to_driver.close(linger_s=1)
            self._to_driver = None
