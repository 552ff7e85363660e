"""A shard: one tensor-parallel rank, an actor that Ray placed. It executes the steps that the driver sends.

Torch is imported where it is used, in the shard's own process: whoever only starts shards does without.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from rayllm.caches import use_writable_caches
from rayllm.checkpoint.sources import ModelSource
from rayllm.config import EngineConfig
from rayllm.engine.placement import local_host
from rayllm.messages.base import Stop
from rayllm.messages.step import ShardFailed, StepInput
from rayllm.messages.transport import Address, Receiver, Sender
from rayllm.progress import Progress, Tracker

if TYPE_CHECKING:
    from rayllm.runner.output import PendingOutput

logger = logging.getLogger("rayllm")

SPIN_COUNT = 5000
"""Turns, of 25 to 50 ns each, for which torch's threads look for work before they sleep.

OpenMP's own 300,000 keep threads that wait for others on the cores that those need, where other processes run, too:
then they are several times slower. On idle cores this is as fast, and no spinning at all a seventh slower."""


@dataclass(frozen=True)
class ShardStats:
    """Facts about one shard's process."""

    pid: int
    bytes_read: int
    """How much it read of the checkpoint."""
    peak_memory_bytes: int
    """The most that its tensors took at once on a GPU, or the whole process on a CPU."""


class Shard:
    """Rank `rank` of one engine.

    The driver calls `place`, on rank 0 of several `open_store`, `load`, `start`, then `run`, which lasts as long as the
    engine. `load` and `start` raise `UsageError` for what cannot work here: a model that is not on this node or does
    not fit into its memory, a damaged file. `progress` and `stats` may be called meanwhile.
    """

    def __init__(self, config: EngineConfig, source: ModelSource, rank: int, incarnation: int):
        self.config = config
        self.source = source
        self.rank = rank
        self.incarnation = incarnation
        self._tracker = Tracker()
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))  # before torch is imported, which reads it

    def place(self) -> tuple[str, str]:
        """The node that Ray chose, and its address."""
        return ray.get_runtime_context().get_node_id(), local_host()

    def open_store(self) -> tuple[str, int]:
        """On rank 0: opens the store where the ranks meet; returns its host and port."""
        from rayllm.runner import process_group

        self._tracker.stage("importing torch")
        self._store = process_group.open_store(local_host(), self.config.tensor_parallel_size)
        return self._store.host, self._store.port

    def load(self, store: tuple[str, int] | None) -> list[int]:
        """Joins the other ranks, loads the weights; returns how many blocks of each KV group there is room for."""
        self._tracker.stage("importing torch")
        if self.config.device == "cuda":
            use_writable_caches()
        from rayllm.runner import process_group, warm_up
        from rayllm.runner.device import DTYPES, open_device
        from rayllm.runner.loading import load_model

        config = self.config
        gpu_ids = [str(gpu) for gpu in ray.get_gpu_ids()]
        self.device = open_device(config.device, gpu_ids, config.tensor_parallel_size)
        self._tracker.stage("looking for the model")
        source = self.source.on_this_node(weights=True, track=self._tracker.track)
        self._tracker.stage("joining ranks")
        numbers = config.max_num_batched_tokens * source.config.hidden_size
        node_id = ray.get_runtime_context().get_node_id()
        shared = numbers, DTYPES[config.dtype]
        tp = process_group.join(self.rank, config.tensor_parallel_size, store, self.device, node_id, shared)
        self.loaded = load_model(config, source, tp, self.device, self._tracker.track)
        self._tracker.stage("compiling kernels")
        warm_up.compile_kernels(self.loaded)
        self._tracker.stage("measuring memory")
        return warm_up.count_blocks(self.loaded)

    def start(self, num_blocks: list[int], host: str | None) -> tuple[Address, str]:
        """Makes the KV cache and captures graphs; returns the address that steps are to be sent to, and what prefill
        attention runs on, with the reason if that is not the fastest there is.

        `host` None: the driver is on this node.
        """
        from rayllm.runner.executor import Executor
        from rayllm.runner.loading import attention_backend

        self.executor = Executor(self.loaded, num_blocks, capture=True, track=self._tracker.track)
        self._inbox: Receiver[StepInput | Stop] = Receiver(StepInput | Stop, host)
        return self._inbox.address(ray.get_runtime_context().get_node_id()), attention_backend(
            self.config, self.source.config
        )

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        """How far `load` or `start` is."""
        return self._tracker.progress

    @ray.method(concurrency_group="control")
    def stats(self) -> ShardStats:
        """Facts about this process; `load` must have ended."""
        return ShardStats(os.getpid(), self.loaded.bytes_read, self.device.peak_memory())

    def run(self, driver: Address) -> None:
        """Executes steps until told to stop. Rank 0 answers on a thread of its own, so that the next step is launched
        while the last one's tokens are awaited. A failure is reported to the driver, then raised."""
        gc.freeze()  # a collection of all that is imported would stop it for a tenth of a second
        driver_address = driver.seen_from(ray.get_runtime_context().get_node_id())
        answers: queue.SimpleQueue[PendingOutput | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._answer, args=(answers, driver_address), daemon=True)
        thread.start()
        try:
            while True:
                for message in self._inbox.receive():
                    if isinstance(message, Stop):
                        return
                    if message.incarnation == self.incarnation:
                        pending = self.executor.execute(message)
                        if self.rank == 0:
                            answers.put(pending)
        except Exception as error:
            self._report(driver_address, error)
            raise
        finally:
            answers.put(None)
            thread.join()
            self._inbox.close()

    def _answer(self, answers: queue.SimpleQueue[PendingOutput | None], driver_address: str) -> None:
        driver = Sender(driver_address)
        try:
            while (pending := answers.get()) is not None:
                driver.send(pending.wait())
        except Exception as error:
            self._report(driver_address, error)
        finally:
            driver.close(linger_s=1)

    def _report(self, driver_address: str, error: Exception) -> None:
        logger.exception("shard %d failed", self.rank)
        sender = Sender(driver_address)
        reason = f"shard {self.rank}: {type(error).__name__}: {error}".splitlines()[0]
        sender.send(ShardFailed(self.incarnation, reason))
        sender.close(linger_s=1)
