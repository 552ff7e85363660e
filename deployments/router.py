"""Which engine a choice goes to: the one that has its prompt's beginning cached, unless that one is busier."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Sequence

import xxhash
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from rayllm.messages.base import BYTES_PER_ID
from rayllm.messages.sequences import NewSequence
from rayllm.scheduling.block_manager import block_hash, root_hash

logger = logging.getLogger("ray.serve")

MARGIN, SHARE_OF_MEAN = 8, 0.25
"""A whole cached prompt is worth so many requests more than another engine has: the larger of these two, the second
of the engines' mean."""
MAX_EXCESS = 1.25
"""An engine with so many times the blocks of the mean is not home to what is new."""
MAX_BLOCKS = 256
"""Leading blocks of a prompt that are looked at."""
MAX_REMEMBERED = 32768
"""Blocks that are remembered of each engine."""
REFRESH_S = 1.0
"""What other processes send to an engine is learned with an own request's answer, or by asking this often."""


class Policy:
    """Chooses engines, called by their ids, by their loads and by the block hashes of what it sent to each.

    A choice goes where the requests that are there already, less the margin times the share of its prompt's blocks
    that is cached there, are least. What follows a prompt's longest known prefix counts as cached on one engine, its
    home: of those that have the prefix and no more than their part of all blocks so far, the one that its first block
    is hashed to. So processes that know nothing of each other send what is new to the same engine, but for few. Of a
    request with a session, the session stands for all blocks, and its home is where it is hashed to.
    """

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._blocks: defaultdict[str, OrderedDict[bytes, None]] = defaultdict(OrderedDict)

    def choose(self, loads: dict[str, int], hashes: Sequence[bytes], session: str = "") -> str:
        """The engine for a prompt of these hashes, of those in `loads`; equally good ones in their order."""
        margin = max(MARGIN, SHARE_OF_MEAN * sum(loads.values()) / len(loads))
        shares = {_home(session.encode(), loads): 1.0} if session else self._shares(hashes, loads)
        chosen = min(loads, key=lambda engine: loads[engine] - margin * shares.get(engine, 0))
        self._remember(self._blocks[chosen], hashes)
        return chosen

    def forget_others(self, engines: Collection[str]) -> None:
        """All that are not among `engines` are gone for good."""
        for gone in self._blocks.keys() - set(engines):
            del self._blocks[gone]

    def _shares(self, hashes: Sequence[bytes], engines: Iterable[str]) -> dict[str, float]:
        """How much of a prompt of these hashes each engine has cached."""
        if not hashes:
            return {}
        depths = {engine: _depth(hashes, self._blocks[engine]) for engine in engines}
        known = max(depths.values())
        if known < len(hashes):
            numbers = {engine: len(self._blocks[engine]) for engine, depth in depths.items() if depth == known}
            most = MAX_EXCESS * sum(numbers.values()) / len(numbers)
            home = _home(hashes[known], [engine for engine, number in numbers.items() if number <= most])
            depths[home] = len(hashes)
        return {engine: depth / len(hashes) for engine, depth in depths.items()}

    def _remember(self, memory: OrderedDict[bytes, None], hashes: Sequence[bytes]) -> None:
        """Puts a prompt's blocks last, its last ones before its first, in a memory that forgets what is first."""
        for key in reversed(hashes):
            memory[key] = None
            memory.move_to_end(key)
        while len(memory) > self._max_remembered:
            memory.popitem(last=False)


def _depth(hashes: Sequence[bytes], blocks: Collection[bytes]) -> int:
    """How many leading ones of `hashes` are among `blocks`."""
    return next((i for i, key in enumerate(hashes) if key not in blocks), len(hashes))


def _home(key: bytes, engines: Iterable[str]) -> str:
    """Rendezvous hashing: the same in every process, and an engine that comes or goes moves only its own keys."""
    return max(engines, key=lambda engine: xxhash.xxh3_64_intdigest(key + engine.encode()))


def hashes_of(sequence: NewSequence, block_size: int) -> list[bytes]:
    """The hashes of the sequence's first full blocks, as the engine computes them."""
    size = block_size * BYTES_PER_ID
    hashes = [root_hash(sequence.cache_salt)]
    for start in range(0, min(len(sequence.token_ids) // size, MAX_BLOCKS) * size, size):
        hashes.append(block_hash(hashes[-1], sequence.token_ids[start : start + size]))
    return hashes[1:]


class PrefixRouter(FIFOMixin, RequestRouter):
    """Serve's router, in each process that calls engines, with `Policy`."""

    def initialize_state(self, block_size: int) -> None:
        """See `RequestRouter`; `block_size`: tokens of the engines' blocks."""
        self._block_size = block_size
        self._policy = Policy()
        self._refreshed = 0.0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`: first the engine of choice, then all."""
        replicas = random.sample(candidate_replicas, len(candidate_replicas))
        if pending_request is None or not replicas:
            return [replicas]
        pending_request.routing_context.should_backoff = True
        try:
            await self._refresh(replicas)
            return [[self._choose(replicas, pending_request)], replicas]
        except Exception:  # Serve would drop the request
            logger.exception("routing by prefix failed: the least busy engine is taken")
            return [replicas]

    def _choose(self, replicas: list[RunningReplica], request: PendingRequest) -> RunningReplica:
        by_name = {replica.replica_id.unique_id: replica for replica in replicas}
        loads = {name: self.replica_queue_len_cache.get(r.replica_id) or 0 for name, r in by_name.items()}
        sequence = next((argument for argument in request.args if isinstance(argument, NewSequence)), None)
        hashes = hashes_of(sequence, self._block_size) if sequence else []
        chosen = by_name[self._policy.choose(loads, hashes, request.metadata.session_id)]
        self.on_send_request(chosen.replica_id)  # counted now: a burst is routed before the first of it is sent
        return chosen

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See `RequestRouter`: these are all engines that there are now."""
        super().update_replicas(replicas)
        self._policy.forget_others([replica.replica_id.unique_id for replica in replicas])

    async def _refresh(self, replicas: list[RunningReplica]) -> None:
        """Asks the engines how many requests they have, if that was not done lately; after a pause, waits for it."""
        age = time.monotonic() - self._refreshed
        if age < REFRESH_S:
            return
        self._refreshed += age

        async def ask(replica: RunningReplica) -> None:
            number = await asyncio.wait_for(replica.get_queue_len(deadline_s=REFRESH_S), REFRESH_S)
            self.on_new_queue_len_info(replica.replica_id, number)

        self._asking = asyncio.gather(*map(ask, replicas), return_exceptions=True)
        if age > 2 * REFRESH_S:
            await self._asking
