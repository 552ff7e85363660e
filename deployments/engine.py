"""The Engine deployment: a replica owns a placement group, which Serve made for it, and in it a driver and shards."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from deployments.config import ApiConfig, ServedModel, scaling
from deployments.metrics import EngineGauges
from deployments.router import PrefixRouter
from deployments.startup import failure_told, write_progress
from rayllm.checkpoint.sources import ModelSource
from rayllm.config import EngineConfig
from rayllm.engine import placement
from rayllm.engine.driver import EngineStats
from rayllm.engine.engine import Engine
from rayllm.engine.launcher import Launcher
from rayllm.errors import EngineDeadError, QueueFullError, UsageError
from rayllm.frontend.client import Client
from rayllm.messages.base import BYTES_PER_ID
from rayllm.messages.sequences import NewSequence
from rayllm.messages.transport import Address
from rayllm.progress import Progress
from rayllm.sampling_params import SamplingParams

logger = logging.getLogger("ray.serve")

ENGINE = "Engine"
"""The deployment's name; with several models, its beginning."""
HEALTH_MARGIN_S = 5
"""A check may wait for a stuck driver's answer until that counts as dead; only then Serve should."""
STATUS_TIMEOUT_S = 1.5


@dataclass(frozen=True)
class Refusal:
    """Why a sequence was not answered. Returned, not raised: Serve would log a traceback of what is no fault."""

    reason: str
    is_full: bool
    """Whether the queue was full; otherwise the engine died."""

    def error(self) -> Exception:
        """What whoever asked is to raise."""
        return QueueFullError(self.reason) if self.is_full else EngineDeadError(self.reason)


@dataclass(frozen=True)
class EngineStatus:
    """What an engine tells of itself while it is alive."""

    engine: str
    """The replica's id."""
    stats: EngineStats
    num_blocks: int
    """KV cache blocks of each shard."""


class EngineReplica:
    """Admits sequences to its engine; its health is the engine's."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: ServedModel, config: EngineConfig, source: ModelSource
    ):
        context = serve.get_replica_context()
        self.model = model
        self._id, self._app = context.replica_id.unique_id, context.app_name
        self._stage = ""
        with failure_told(self._app):
            await self._start(config, source)

    async def _start(self, config: EngineConfig, source: ModelSource) -> None:
        model, loop = self.model, asyncio.get_running_loop()
        group = ray.util.get_current_placement_group()
        expected = placement.bundles_of(config.tensor_parallel_size, config.device)
        if (reserved := group and group.bundle_specs) != expected:
            raise UsageError(
                f"placement_group_bundles must be {expected}, not {reserved}: shards have whole GPUs, as many "
                "as tensor_parallel_size says; leave placement_group_bundles out",
                "placement_group_bundles",
            )

        def start() -> Engine:
            launcher = Launcher.on(group, config, source)
            return Engine(launcher, progress=False, report=self._report, max_restarts=0)  # Serve restarts the replica

        self.engine = await loop.run_in_executor(None, start)
        self._capacity = self.engine.info.num_blocks * config.block_size
        queued = model.max_queued_tokens
        self._max_tokens = self._capacity + (4 * self._capacity if queued is None else queued)
        self._num_sequences = self._num_tokens = 0
        self._gauges = EngineGauges(model.name)
        await self._produce_a_token(source)
        logger.info(f"{model.name} is ready after {self.engine.startup_s:.1f} s: {self._capacity} tokens of KV cache")

    def _report(self, progress: Progress) -> None:
        """One line in the log for each stage of the start."""
        if progress.stage != self._stage:
            self._stage = progress.stage
            logger.info(f"{self.model.name}: {progress.stage}")
        write_progress(self._app, progress)

    async def _produce_a_token(self, source: ModelSource) -> None:
        client = Client(self.engine, self.engine.config, source.config, tokenizer=None)
        async for _ in client.answer([[0]], SamplingParams(max_tokens=1, ignore_eos=True)):
            pass
        client.close()

    async def answer(self, client: Address, sequence: NewSequence) -> Refusal | None:
        """Lasts until the sequence, whose tokens go to `client`, has ended; cancelled, it aborts it."""
        num_tokens = len(sequence.token_ids) // BYTES_PER_ID
        waiting = self._num_sequences - self.model.max_num_seqs
        if waiting >= self.model.max_queued_requests:
            return Refusal(f"{waiting} requests are waiting already", is_full=True)
        if self._num_sequences and self._num_tokens + num_tokens > self._max_tokens:
            return Refusal(f"prompts of {self._num_tokens} tokens are running or waiting already", is_full=True)
        self._num_sequences += 1
        self._num_tokens += num_tokens
        try:
            await self.engine.answer(client, sequence)
            return None
        except EngineDeadError as error:
            return Refusal(str(error), is_full=False)
        finally:
            self._num_sequences -= 1
            self._num_tokens -= num_tokens

    async def status(self) -> EngineStatus | Refusal:
        """Soon, for the Api asks all engines at once: a stuck one must not hide the others."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                stats = await self.engine.check()
                return EngineStatus(self._id, stats, self.engine.info.num_blocks)
        except TimeoutError:
            return Refusal("the engine does not answer", is_full=False)
        except EngineDeadError as error:
            return Refusal(str(error), is_full=False)

    async def check_health(self) -> None:
        """Called by Serve. With its engine this process ends: were it to raise, Serve would go on sending requests
        here until the third time."""
        try:
            stats = await self.engine.check()
        except EngineDeadError as error:
            logger.error(f"{self.model.name}: {error}; another engine takes its place")
            os._exit(1)
        self._gauges.set(stats, self.engine.info.num_blocks)


def engine_deployment(
    model: ServedModel, config: EngineConfig, source: ModelSource, name: str, strategy: str, api: ApiConfig
) -> serve.Application:
    """`model`, whose engines run with `config`, as a deployment called `name`; `strategy`: how Ray places shards."""
    options = scaling(
        model.num_replicas,
        model.max_replicas,
        model.target_ongoing_requests or max(1, model.max_num_seqs * 3 // 4),
        api,
    )
    if (model.max_replicas or model.num_replicas) > 1 and model.prefix_routing and model.enable_prefix_caching:
        options["request_router_config"] = RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"block_size": model.block_size}
        )
    deployment: Any = serve.deployment(
        EngineReplica,
        name=name,
        **options,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=placement.bundles_of(config.tensor_parallel_size, config.device),
        placement_group_strategy=strategy,
        max_ongoing_requests=1_000_000,  # the replica itself bounds its queue
        health_check_period_s=1,
        health_check_timeout_s=config.step_timeout_s + HEALTH_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=api.drain_timeout_s,
        max_constructor_retry_count=1,
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(model, config, source)
