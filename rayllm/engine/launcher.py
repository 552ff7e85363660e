"""The Ray side of an engine: what it runs on, and how its processes start and end."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayllm.checkpoint.sources import ModelSource
from rayllm.config import EngineArgs, EngineConfig
from rayllm.engine import placement
from rayllm.engine.driver import Driver, EngineInfo
from rayllm.errors import EngineDeadError, UsageError
from rayllm.messages.transport import Address
from rayllm.progress import Progress
from rayllm.runner import precompile

logger = logging.getLogger("rayllm")

PROGRESS_PERIOD_S = 0.2
PROGRESS_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 5.0


class Launcher:
    """Starts and stops the driver and shards of an engine, on resources that it holds until `close`."""

    def __init__(self, config: EngineConfig, source: ModelSource, placement_group: PlacementGroup, held: ExitStack):
        """`placement_group` is what Ray has reserved for the engine, with the bundles of `placement.bundles_of`; `held`
        is what `close` gives back, the last first."""
        self.config = config
        self.source = source
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self.host = placement.local_host() if placement.has_many_nodes() else None
        """This node's address, if there are others."""
        self.driver: Any = None
        """The driver's handle; None before and after it."""
        self.ended: Any = None
        """An object reference that resolves when the driver has stopped, and raises if it died; None as `driver`."""
        self.num_starts = 0
        """How often driver and shards were started, which numbers the engine's incarnations."""
        self._group = placement_group
        self._held = held

    @classmethod
    def connect(cls, args: EngineArgs, source: ModelSource, address: str | None, progress: bool) -> Launcher:
        """Connects to Ray (see `placement.connect`), decides what the engine runs with, and reserves its resources.

        Raises `UsageError`, before anything expensive starts, when model, arguments and cluster do not fit together;
        nothing is held then. `progress` shows a wait for resources on stderr.
        """
        args.check_model(source.config)
        with ExitStack() as held:
            if args.device != "cpu":
                with contextlib.suppress(UsageError):  # "auto" may yet be a CPU, which takes other arguments
                    _compile_ahead(args.resolve(source.config, "cuda"), source, held)
            if placement.connect(address, min_cpus=args.tensor_parallel_size):
                held.callback(ray.shutdown)
            config = args.resolve(source.config, placement.choose_device(args.device))
            group = placement.reserve(config.tensor_parallel_size, config.device, config.placement_timeout_s, progress)
            held.callback(placement.release, group)
            launcher = cls(config, source, group, held)
            launcher._held = held.pop_all()
        return launcher

    @classmethod
    def on(cls, placement_group: PlacementGroup, config: EngineConfig, source: ModelSource) -> Launcher:
        """One for resources that others have reserved, and give back."""
        with ExitStack() as held:
            if config.device == "cuda":
                _compile_ahead(config, source, held)
            launcher = cls(config, source, placement_group, held)
            launcher._held = held.pop_all()
        return launcher

    def has_place(self) -> bool:
        """Whether the cluster has the resources, on other nodes if some have left; waits `placement_timeout_s`."""
        return bool(self._group.wait(self.config.placement_timeout_s))

    def start(self, owner: Address, report: Callable[[Progress], None] | None) -> EngineInfo:
        """Starts driver and shards, and returns when they can execute steps; `owner` is the inbox of their owner.

        Tells `report` how far they are. Raises `UsageError` for what they find wrong, a damaged file say, and
        `EngineDeadError` when one of them fails.
        """
        driver_class = ray.remote(num_cpus=0, concurrency_groups={"control": 2})(Driver)
        bundle_0 = PlacementGroupSchedulingStrategy(self._group, 0)
        incarnation, self.num_starts = self.num_starts, self.num_starts + 1
        self.driver = driver_class.options(scheduling_strategy=bundle_0).remote(self.config, self.source, incarnation)
        started = self.driver.start.remote(self._group, owner)
        try:
            if report:
                self._follow(started, report)
            info: EngineInfo = ray.get(started)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayActorError as error:
            raise EngineDeadError(f"the engine died while it started: {error}".splitlines()[0]) from None
        if self.config.device == "cuda" and ":" in info.prefill_backend:
            logger.warning("prefill attention runs on %s", info.prefill_backend)
        self.ended = self.driver.run.remote()
        return info

    def _follow(self, started: ray.ObjectRef, report: Callable[[Progress], None]) -> None:
        """Tells the shards' progress until `started` resolves."""
        while not ray.wait([started], timeout=PROGRESS_PERIOD_S)[0]:
            try:
                report(ray.get(self.driver.progress.remote(), timeout=PROGRESS_TIMEOUT_S))
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                return  # `started` tells why

    def stop(self, timeout_s: float) -> None:
        """Ends driver and shards; they have `timeout_s` to clean up after themselves."""
        if self.ended is not None:
            if timeout_s:
                self.driver.stop.remote()
                ray.wait([self.ended], timeout=timeout_s)
            self.ended = None
        if self.driver is not None:
            ray.kill(self.driver)  # shards are its own: Ray ends them with it
            self.driver = None

    def close(self) -> None:
        """Frees everything: processes, resources, and Ray if it was started here. May be called twice."""
        self.stop(STOP_TIMEOUT_S)
        self._held.close()


def _compile_ahead(config: EngineConfig, source: ModelSource, held: ExitStack) -> None:
    """Compiles for a GPU while Ray and the engine's processes start; `held` ends it."""
    if process := precompile.start(config, source.config):
        threading.Thread(target=process.wait, daemon=True).start()  # lest it stays as a zombie
        held.callback(process.kill)


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
