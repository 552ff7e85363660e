"""Starts an engine on Ray and watches it: everything between a configuration and a driver that runs."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tqdm import tqdm

from rayllm import placement
from rayllm.config import EngineConfig
from rayllm.driver import Driver, EngineInfo, EngineStats
from rayllm.errors import EngineDeadError, UsageError
from rayllm.model_source import ModelSource
from rayllm.shard import ShardStats

logger = logging.getLogger("rayllm")

PROGRESS_PERIOD_S = 0.2
STOP_TIMEOUT_S = 5.0


class Engine:
    """A driver and its shards, owned by this process: they end with it, or with `close`.

    Raises `UsageError`, before anything expensive starts, when model, arguments and cluster do not fit together, and
    `EngineDeadError` when a process fails on the way.
    """

    def __init__(self, config: EngineConfig, source: ModelSource, address: str | None = None, progress: bool = True):
        """`address`: of a Ray cluster; None uses the one this process is in, or else starts Ray here."""
        started = time.monotonic()
        self.source = source
        source.config.check_tensor_parallel(config.tensor_parallel_size)
        if config.device != "auto":
            self._resolve(config, config.device)
        self._started_ray = placement.connect(address, min_cpus=config.tensor_parallel_size)
        self._placement_group: PlacementGroup | None = None
        self._driver: Any = None
        self.ended: Any = None
        """An object reference that resolves when the driver has stopped, and raises if it died."""
        try:
            device = placement.choose_device(config.device)
            self.config = self._resolve(config, device)
            self._placement_group = placement.reserve(
                config.tensor_parallel_size, device, config.placement_timeout_s, progress
            )
            self.info = self._start(progress)
        except BaseException:
            self.close()
            raise
        self.startup_s = time.monotonic() - started

    def _resolve(self, config: EngineConfig, device: str) -> EngineConfig:
        model = self.source.config
        return config.resolved(device=device, model_dtype=model.dtype, model_max_len=model.max_model_len)

    def _start(self, progress: bool) -> EngineInfo:
        driver_class = ray.remote(num_cpus=0, concurrency_groups={"control": 2})(Driver)
        bundle_0 = PlacementGroupSchedulingStrategy(self._placement_group, 0)
        self._driver = driver_class.options(scheduling_strategy=bundle_0).remote(self.config, self.source, 0)
        started = self._driver.start.remote(self._placement_group, ray.get_runtime_context().get_node_id())
        try:
            if progress:
                self._show_progress(started)
            info: EngineInfo = ray.get(started)
        except ray.exceptions.RayTaskError as error:
            raise self._cause(error) from None
        except ray.exceptions.RayActorError as error:
            raise EngineDeadError(f"the engine died while it started: {error}".splitlines()[0]) from None
        if self.config.device == "cuda" and ":" in info.prefill_backend:
            logger.warning("prefill attention runs on %s", info.prefill_backend)
        self.ended = self._driver.run.remote()
        return info

    @staticmethod
    def _cause(error: ray.exceptions.RayTaskError) -> Exception:
        """The exception behind one that passed through actors: ours as it is, others in one line."""
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, BaseException):
            cause = cause.cause
        if isinstance(cause, UsageError | EngineDeadError):
            return cause
        return EngineDeadError(f"the engine failed to start: {type(cause).__name__}: {cause}".splitlines()[0])

    def _show_progress(self, started: ray.ObjectRef) -> None:
        """One line that follows the shards' progress until `started` resolves."""
        with tqdm(leave=False, bar_format="{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}]") as bar:
            while not ray.wait([started], timeout=PROGRESS_PERIOD_S)[0]:
                try:
                    progress = ray.get(self._driver.progress.remote(), timeout=5)
                except ray.exceptions.GetTimeoutError:
                    continue
                except ray.exceptions.RayError:
                    return  # `started` tells why
                bar.total, bar.n = progress.total, progress.done
                bar.set_description_str(progress.stage)

    def stats(self) -> EngineStats:
        stats: EngineStats = ray.get(self._driver.stats.remote())
        return stats

    def shard_stats(self) -> list[ShardStats]:
        """By rank."""
        stats: list[ShardStats] = ray.get(self._driver.shard_stats.remote())
        return stats

    def close(self) -> None:
        """Frees everything: actors, resources, and Ray if this engine started it. May be called twice."""
        if self.ended is not None:
            self._driver.stop.remote()
            ray.wait([self.ended], timeout=STOP_TIMEOUT_S)
            self.ended = None
        if self._driver is not None:
            ray.kill(self._driver)  # shards are its own: Ray ends them with it
            self._driver = None
        if self._placement_group is not None:
            placement.release(self._placement_group)
            self._placement_group = None
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False
