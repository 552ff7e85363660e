"""Starts an engine on Ray, watches it and admits sequences to it: all that lies between a process and its driver."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayllm.checkpoint.sources import ModelSource
from rayllm.config import EngineConfig
from rayllm.engine import placement
from rayllm.engine.driver import Driver, EngineInfo, EngineStats
from rayllm.engine.shard import ShardStats
from rayllm.errors import EngineDeadError, UsageError
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
from rayllm.messages.transport import Address, Receiver, Sender, local_host, remove_abandoned
from rayllm.progress import Progress, ProgressBar
from rayllm.runner import precompile

logger = logging.getLogger("rayllm")

PROGRESS_PERIOD_S = 0.2
STOP_TIMEOUT_S = 5.0
CHECK_PERIOD_S = 1.0
MAX_RESTARTS = 3


class Engine:
    """A driver and its shards, owned by this process: they end with it, or with `close`.

    When one of them dies or hangs, all sequences fail, and `recover` starts them again, `MAX_RESTARTS` times.

    Raises `UsageError`, before anything expensive starts, when model, arguments and cluster do not fit together, and
    `EngineDeadError` when a process fails on the way. Made anywhere, it belongs to the event loop that first calls
    `answer` or `check`.
    """

    def __init__(
        self,
        config: EngineConfig,
        source: ModelSource,
        address: str | None = None,
        progress: bool = True,
        placement_group: PlacementGroup | None = None,
        report: Callable[[Progress], None] | None = None,
        max_restarts: int | None = None,
    ):
        """`address`: of a Ray cluster; None uses the one this process is in, or else starts Ray here.

        `placement_group`: resources that are reserved already, for a configuration whose device is decided.
        `progress` is shown on stderr, or else told to `report`. `max_restarts`: default `MAX_RESTARTS`.
        """
        started = time.monotonic()
        self.source = source
        source.config.check_tensor_parallel(config.tensor_parallel_size)
        if config.device != "auto":
            self._resolve(config, config.device)
        self._ahead: subprocess.Popen[bytes] | None = None
        self._started_ray = False
        self._own_group: PlacementGroup | None = None
        self._report = report
        self._max_restarts = MAX_RESTARTS if max_restarts is None else max_restarts
        self._num_starts = 0
        self._is_final = False
        self._recovery: asyncio.Task[None] | None = None
        self._driver: Any = None
        self._ended: Any = None
        """An object reference that resolves when the driver has stopped, and raises if it died."""
        self._inbox: Receiver[OwnerMessage] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._death: str | None = None
        self._clients: dict[Address, int] = {}
        self._num_clients = 0
        self._pending: dict[tuple[int, int], asyncio.Future[None]] = {}
        """By (client, sequence): sequences that have not ended."""
        try:
            if config.device != "cpu":
                with contextlib.suppress(UsageError):  # "auto" may yet be a CPU, which takes other arguments
                    self._ahead = precompile.start(self._resolve(config, "cuda"), source.config)
            self._started_ray = placement.connect(address, min_cpus=config.tensor_parallel_size)
            device = placement.choose_device(config.device)
            self.config = self._resolve(config, device)
            if placement_group is None:
                placement_group = self._own_group = placement.reserve(
                    config.tensor_parallel_size, device, config.placement_timeout_s, progress
                )
            self._group = placement_group
            self.host = local_host() if placement.has_many_nodes() else None
            """This node's address, if there are others."""
            show: AbstractContextManager[Any] = ProgressBar() if progress else nullcontext(report)
            with show as report:
                self.info = self._start(report)
            if self._ahead is not None:
                self._ahead.poll()  # it has ended, or will with this engine
        except BaseException:
            self.close()
            raise
        self.startup_s = time.monotonic() - started

    def _resolve(self, config: EngineConfig, device: str) -> EngineConfig:
        model = self.source.config
        return config.resolved(
            device=device,
            model_dtype=model.dtype,
            model_max_len=model.max_model_len,
            model_kv_heads=model.num_key_value_heads,
        )

    def _start(self, report: Callable[[Progress], None] | None) -> EngineInfo:
        node_id = ray.get_runtime_context().get_node_id()
        remove_abandoned()
        self._inbox = Receiver(OwnerMessage, self.host)
        driver_class = ray.remote(num_cpus=0, concurrency_groups={"control": 2})(Driver)
        bundle_0 = PlacementGroupSchedulingStrategy(self._group, 0)
        incarnation, self._num_starts = self._num_starts, self._num_starts + 1
        self._driver = driver_class.options(scheduling_strategy=bundle_0).remote(self.config, self.source, incarnation)
        started = self._driver.start.remote(self._group, self._inbox.address(node_id))
        try:
            if report:
                self._follow(started, report)
            info: EngineInfo = ray.get(started)
        except ray.exceptions.RayTaskError as error:
            raise self._cause(error) from None
        except ray.exceptions.RayActorError as error:
            raise EngineDeadError(f"the engine died while it started: {error}".splitlines()[0]) from None
        if self.config.device == "cuda" and ":" in info.prefill_backend:
            logger.warning("prefill attention runs on %s", info.prefill_backend)
        self._to_driver = Sender(info.address.seen_from(node_id))
        self._ended = self._driver.run.remote()
        return info

    @staticmethod
    def _cause(error: ray.exceptions.RayTaskError) -> Exception:
        """The exception behind one that passed through actors: ours as it is, others in one line."""
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, BaseException):
            cause = cause.cause
        if isinstance(cause, UsageError | EngineDeadError):
            return cause
        if isinstance(cause, ray.exceptions.RayActorError):
            return EngineDeadError(
                "the engine failed to start: a shard died; Ray's logs on its node (worker-*.err) say why"
            )
        return EngineDeadError(f"the engine failed to start: {type(cause).__name__}: {cause}".splitlines()[0])

    def _follow(self, started: ray.ObjectRef, report: Callable[[Progress], None]) -> None:
        """Tells the shards' progress until `started` resolves."""
        while not ray.wait([started], timeout=PROGRESS_PERIOD_S)[0]:
            try:
                report(ray.get(self._driver.progress.remote(), timeout=5))
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                return  # `started` tells why

    @property
    def trouble(self) -> str | None:
        """Why it answers nothing any more; None also while it is dead but may be started again."""
        return self._death if self._is_final or self._num_starts > self._max_restarts else None

    def stats(self) -> EngineStats:
        stats: EngineStats = ray.get(self._driver.stats.remote())
        return stats

    def shard_stats(self) -> list[ShardStats]:
        """By rank."""
        stats: list[ShardStats] = ray.get(self._driver.shard_stats.remote())
        return stats

    # ---- in an event loop

    async def answer(self, client: Address, sequence: NewSequence) -> None:
        """Lasts until the sequence, whose tokens go to `client`, has ended; cancelled, it aborts it.

        Raises `EngineDeadError` when it cannot end any more.
        """
        loop = self._attach()
        if (number := self._clients.get(client)) is None:
            number = self._clients[client] = self._num_clients
            self._num_clients += 1
            self._to_driver.send(AddClient(number, client.seen_from(self.info.address.node_id)))
        key = number, sequence.sequence_id
        ended = self._pending[key] = loop.create_future()
        self._to_driver.send(AddSequence(number, sequence))
        try:
            await ended
        finally:
            if self._pending.pop(key, None) is not None and self._death is None:
                self._to_driver.send(Abort(number, [sequence.sequence_id]))

    async def recover(self) -> bool:
        """Starts driver and shards again where they were, unless that has been done, or was done too often."""
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.get_running_loop().create_task(self._recover())
        await asyncio.shield(self._recovery)  # who no longer waits leaves it to the others
        return self._death is None

    async def _recover(self) -> None:
        while self._death is not None and self.trouble is None:
            logger.warning("%s: the engine is started again", self._death)
            self._stop(timeout_s=0)
            self._clients = {}
            try:
                self.info = await asyncio.get_running_loop().run_in_executor(None, self._start_again)
                self._death = self._death if self._is_final else None
            except Exception as error:  # a replacement node may lack the model, say
                self._is_final = self._is_final or not isinstance(error, EngineDeadError)
                self._death = str(error) or type(error).__name__

    def _start_again(self) -> EngineInfo:
        timeout_s = self.config.placement_timeout_s
        if not self._group.wait(timeout_s):  # a node has left
            self._is_final = True
            raise EngineDeadError(f"the cluster had no place for the engine within {timeout_s:g} s")
        return self._start(self._report)

    async def check(self) -> EngineStats:
        """What the driver counts; raises `EngineDeadError` if it, or a shard, is dead or stuck.

        An engine that is found stuck counts as dead from then on.
        """
        self._attach()
        timeout_s = self.config.step_timeout_s
        assert timeout_s is not None
        try:
            stats: EngineStats = await asyncio.wait_for(self._driver.stats.remote(), timeout_s)
            if stats.stalled_s <= timeout_s:
                return stats
            reason = f"the shards have not answered a step for {stats.stalled_s:.0f} s"
        except TimeoutError:
            reason = f"the driver has not answered for {timeout_s:g} s"
        except ray.exceptions.RayError as error:
            reason = f"the driver died: {type(error).__name__}"
        self._fail(reason)
        raise EngineDeadError(reason)

    def _attach(self) -> asyncio.AbstractEventLoop:
        """Ties this object to the running event loop, on first use; raises `EngineDeadError` if it is dead."""
        if self._death is not None:
            raise EngineDeadError(self._death)
        if self._loop is None:
            assert self._inbox is not None
            self._loop = asyncio.get_running_loop()
            for fileno in self._inbox.filenos():
                self._loop.add_reader(fileno, self._receive)
            self._watchers = [self._loop.create_task(watch()) for watch in (self._watch, self._check_often)]
            self._receive()
        return self._loop

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
            await self._ended
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
        self._stop(STOP_TIMEOUT_S)
        if self._ahead is not None:
            self._ahead.kill()
            self._ahead.wait()
            self._ahead = None
        if self._own_group is not None:
            placement.release(self._own_group)
            self._own_group = None
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False

    def _stop(self, timeout_s: float) -> None:
        """Ends driver and shards; they have `timeout_s` to clean up after themselves."""
        if self._inbox is not None:
            if self._loop is not None and not self._loop.is_closed():
                for fileno in self._inbox.filenos():
                    self._loop.remove_reader(fileno)
                for watcher in self._watchers:
                    watcher.cancel()
            self._loop = None
            self._inbox.close()
            self._inbox = None
        if self._ended is not None:
            self._to_driver.close(linger_s=1)
            if timeout_s:
                self._driver.stop.remote()
                ray.wait([self._ended], timeout=timeout_s)
            self._ended = None
        if self._driver is not None:
            ray.kill(self._driver)  # shards are its own: Ray ends them with it
            self._driver = None
