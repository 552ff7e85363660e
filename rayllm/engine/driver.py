"""The driver: an actor that owns the scheduler and leads the shards, a step or two ahead of them."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import time
from array import array
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import ray
import zmq
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayllm.checkpoint.sources import ModelSource
from rayllm.config import EngineConfig
from rayllm.engine import placement
from rayllm.engine.shard import Shard, ShardStats
from rayllm.errors import EngineDeadError
from rayllm.messages.base import Stop
from rayllm.messages.sequences import (
    Abort,
    AddClient,
    AddSequence,
    ClientGone,
    DriverMessage,
    Ended,
    EngineDied,
    NewSequence,
    SequenceUpdate,
    Updates,
)
from rayllm.messages.step import ShardFailed, StepOutput, StepTimes
from rayllm.messages.transport import Address, Receiver, Sender
from rayllm.progress import Progress
from rayllm.scheduling.pruning import make_policy
from rayllm.scheduling.scheduler import Scheduler
from rayllm.scheduling.sequence import Sequence

logger = logging.getLogger("rayllm")

STEPS_IN_FLIGHT = 2
"""One step is executed by the shards, one waits for them."""

SHORT_STEP_S = 0.002
"""A shorter step is over before the answer to the one before it has launched the next: then one more is in flight."""

COMPILATION_S = 60.0
"""The first step may take so much longer than others."""

SHARD_STOP_TIMEOUT_S = 2.0
"""Longest wait for shards that were told to stop; one that hangs is killed with the driver."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine's owner and clients need to know of it once it has started."""

    address: Address
    """The address of the driver's inbox."""
    num_blocks: int
    """KV cache blocks of each shard."""
    prefill_backend: str
    """What prefill attention runs on, and why if that is not the fastest there is."""


@dataclass(frozen=True)
class EngineStats:
    """What a driver has counted since it started, and how things are now; times are in seconds."""

    pid: int
    """The driver's process."""
    num_steps: int
    """Steps sent to the shards, answered or not."""
    num_sequences: int
    """Sequences that came, whatever became of them."""
    num_in_flight: int
    """Steps that are not answered yet."""
    num_running: int
    """Sequences that have a lane now."""
    num_waiting: int
    """Sequences that wait for one."""
    num_free_blocks: int
    """KV cache blocks that no sequence uses now, cached ones among them."""
    num_prefilled_tokens: int
    """Tokens of prompts that were computed."""
    num_cached_tokens: int
    """Tokens of prompts that the prefix cache had."""
    num_output_tokens: int
    """Tokens that were sampled for sequences."""
    num_preemptions: int
    """How often a running sequence's blocks were taken away."""
    num_pruned_tokens: int
    """Prompt tokens whose KV was not kept."""
    num_pruned_blocks: int
    """Blocks given back by prompts that were pruned."""
    driver_s: float
    """How long the driver was busy."""
    times: StepTimes
    """The sum of all answered steps' times."""
    stalled_s: float
    """How long the oldest step in flight has been waited for, a first step's time to compile not counted."""
    time_s: float
    """When this was so, by the driver's monotonic clock."""


class Driver:
    """Leads one engine. The owner calls `start`, then `run`, which lasts as long as the engine.

    `start` raises `UsageError` for what shards find wrong (a damaged file, no room for one sequence), and whatever else
    fails in them; `run` raises `EngineDeadError` when one is gone. The other methods may be called meanwhile.
    """

    def __init__(self, config: EngineConfig, source: ModelSource, incarnation: int):
        self.config = config
        self.source = source
        self.incarnation = incarnation
        self._shards: list[Any] = []
        self._shard_runs: list[ray.ObjectRef] = []
        self._clients: dict[int, Sender] = {}
        self._num_steps = self._num_sequences = 0
        self._driver_s = 0.0
        self._times = StepTimes()
        self._step_s = 0.0
        """How long the device took for the last step that was answered; 0 before."""
        self._last_progress = time.monotonic()
        """When something last came of the steps in flight; `COMPILATION_S` later for the first."""

    def start(self, placement_group: PlacementGroup, owner: Address) -> EngineInfo:
        """Makes the shards, all at once; returns when they can execute steps. `owner` is the owner's inbox."""
        config = self.config
        needed = placement.SHARD[config.device]
        options: dict[str, Any] = {"num_cpus": needed.get("CPU", 0), "num_gpus": needed.get("GPU", 0)}
        if config.device == "cuda" and config.tensor_parallel_size > 1:
            # symmetric memory wants ranks on distinct device numbers
            options["runtime_env"] = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
        shard_class = ray.remote(concurrency_groups={"control": 1})(Shard)
        self._shards = [
            shard_class.options(
                **options, scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group, rank)
            ).remote(config, self.source, rank, self.incarnation)
            for rank in range(config.tensor_parallel_size)
        ]
        places = ray.get([shard.place.remote() for shard in self._shards])
        own_node = ray.get_runtime_context().get_node_id()
        spans_nodes = len({own_node, owner.node_id, *(node for node, _ in places)}) > 1
        self._inbox: Receiver[DriverMessage] = Receiver(DriverMessage, placement.local_host() if spans_nodes else None)
        self._owner = Sender(owner.seen_from(own_node))

        store = ray.get(self._shards[0].open_store.remote()) if len(self._shards) > 1 else None
        rooms = ray.get([shard.load.remote(store) for shard in self._shards])
        num_blocks = [min(room) for room in zip(*rooms, strict=True)]
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            incarnation=self.incarnation,
            pruning=make_policy(config),
        )
        ready = ray.get(
            [
                shard.start.remote(num_blocks, shard_host if spans_nodes else None)
                for shard, (_, shard_host) in zip(self._shards, places, strict=True)
            ]
        )
        address = self._inbox.address(own_node)
        self._senders = [Sender(inbox.seen_from(own_node)) for inbox, _ in ready]
        self._shard_runs = [shard.run.remote(address) for shard in self._shards]
        threading.Thread(target=self._watch, daemon=True).start()
        return EngineInfo(address, min(num_blocks), prefill_backend=ready[0][1])

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        """How far the slowest shard is with its start."""
        if not self._shards:
            return Progress("placing shards")
        return min(ray.get([shard.progress.remote() for shard in self._shards]), key=lambda progress: progress.done)

    @ray.method(concurrency_group="control")
    def shard_stats(self) -> list[ShardStats]:
        """Facts about the shards' processes, by rank; waits for all of them."""
        stats: list[ShardStats] = ray.get([shard.stats.remote() for shard in self._shards])
        return stats

    @ray.method(concurrency_group="control")
    def stats(self) -> EngineStats:
        """What was counted so far; reads what the loop writes, so that numbers may be a step apart."""
        scheduler = self.scheduler
        return EngineStats(
            pid=os.getpid(),
            num_steps=self._num_steps,
            num_sequences=self._num_sequences,
            num_in_flight=len(scheduler.in_flight),
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_free_blocks=scheduler.num_free_blocks,
            num_prefilled_tokens=scheduler.num_prefilled_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_output_tokens=scheduler.num_output_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_pruned_tokens=scheduler.num_pruned_tokens,
            num_pruned_blocks=scheduler.num_pruned_blocks,
            driver_s=self._driver_s,
            times=self._times,
            stalled_s=max(0.0, time.monotonic() - self._last_progress) if scheduler.in_flight else 0.0,
            time_s=time.monotonic(),
        )

    def run(self) -> None:
        """Schedules, sends, takes results in, until told to stop; raises `EngineDeadError` when a shard fails."""
        gc.freeze()  # a collection of all that is imported would stop the engine for some ten milliseconds
        try:
            running = True
            while running:
                step, began = None, time.perf_counter()
                most = STEPS_IN_FLIGHT + (0 < self._step_s < SHORT_STEP_S)
                if len(self.scheduler.in_flight) < most and (step := self.scheduler.schedule()):
                    if len(self.scheduler.in_flight) == 1:
                        self._last_progress = time.monotonic() + (0 if self._num_steps else COMPILATION_S)
                    self._num_steps += 1
                    for sender in self._senders:
                        sender.send(step)
                self._driver_s += time.perf_counter() - began
                messages = self._inbox.receive(timeout_s=0 if step else None)
                began = time.perf_counter()
                for message in messages:
                    running = running and self._handle(message)
                self._driver_s += time.perf_counter() - began
        except Exception as error:
            reason = str(error) if isinstance(error, EngineDeadError) else f"driver: {type(error).__name__}: {error}"
            self._owner.send(EngineDied(reason))
            raise
        finally:
            for sender in self._senders:
                sender.send(Stop())
            for peer in (*self._senders, *self._clients.values(), self._owner):
                peer.close(linger_s=1)
            self._inbox.close()
            if self._shard_runs:  # they clean up after themselves
                ray.wait(self._shard_runs, num_returns=len(self._shard_runs), timeout=SHARD_STOP_TIMEOUT_S)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Ends `run`, and the shards' with it."""
        self._tell(Stop())

    def _tell(self, message: Stop | ShardFailed) -> None:
        """Sends to the own inbox, from another thread."""
        sender = Sender(self._inbox.local)
        sender.send(message)
        sender.close(linger_s=1)

    def _handle(self, message: DriverMessage) -> bool:
        """Takes one message in; returns False when the engine is to end."""
        match message:
            case StepOutput():
                if message.incarnation == self.incarnation:
                    self._last_progress = time.monotonic()
                    self._times += message.times
                    self._step_s = message.times.device_s
                    self._publish(self.scheduler.update(message))
            case AddSequence():
                self._num_sequences += 1
                self.scheduler.add(self._sequence(message.client_id, message.new))
            case Abort():
                for sequence_id in message.sequence_ids:
                    self.scheduler.abort(message.client_id, sequence_id)
            case AddClient():
                self._clients[message.client_id] = Sender(message.address)
                self._inbox.watch(self._clients[message.client_id], ClientGone(message.client_id))
            case ClientGone():
                del self._clients[message.client_id]
                self.scheduler.abort_all(message.client_id)
                self._owner.send(message)
            case ShardFailed():
                raise EngineDeadError(message.reason)
            case Stop():
                return False
        return True

    def _sequence(self, client_id: int, new: NewSequence) -> Sequence:
        params = new.params
        room = self.config.max_model_len - new.num_prompt_tokens
        eos_token_ids = () if params.ignore_eos else new.eos_token_ids
        return Sequence(
            client_id=client_id,
            sequence_id=new.sequence_id,
            token_ids=array("i", new.token_ids),
            num_prompt_tokens=new.num_prompt_tokens,
            params=params,
            seed=new.seed,
            max_tokens=min(params.max_tokens or room, room),
            stop_token_ids=frozenset((*params.stop_token_ids, *eos_token_ids)),
            grammar=new.grammar,
            cache_salt=new.cache_salt,
        )

    def _publish(self, updates: list[tuple[int, SequenceUpdate]]) -> None:
        """One message for each client that a step moved, and one for the owner if sequences ended."""
        by_client = defaultdict(list)
        for client_id, update in updates:
            by_client[client_id].append(update)
        for client_id, own in by_client.items():
            with contextlib.suppress(zmq.Again):  # far behind: it has stopped, and is about to be gone
                self._clients[client_id].send(Updates(self.incarnation, own))
        if ended := [(client_id, update.sequence_id) for client_id, update in updates if update.finish_reason]:
            self._owner.send(Ended(ended))

    def _watch(self) -> None:
        """Tells the loop when a shard is gone: ZeroMQ would not."""
        ended, _ = ray.wait(self._shard_runs, num_returns=1)
        rank = self._shard_runs.index(ended[0])
        try:
            ray.get(ended)
            reason = f"shard {rank} ended"
        except ray.exceptions.RayActorError:
            reason = f"shard {rank} died"
        except ray.exceptions.RayError as error:
            reason = f"shard {rank}: {error.args[0] if error.args else error}".splitlines()[-1]
        self._tell(ShardFailed(self.incarnation, reason))
