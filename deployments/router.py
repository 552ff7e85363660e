"""Which engine a choice goes to: the one that has its prompt's beginning cached, unless that one is busier."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Any

import xxhash
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from rayllm.block_manager import block_hash, root_hash
from rayllm.step import BYTES_OF_ID, NewSequence

logger = logging.getLogger("ray.serve")

MARGIN, SHARE_OF_MEAN = 8, 0.25
"""A whole cached prompt is worth so many requests more than another engine has: the larger of these two, the second
of the engines' mean."""
MAX_EXCESS = 1.25
"""An engine with so many times the blocks of the mean is not home to what is new."""
MAX_BLOCKS = 256
"""Of a prompt that are looked at."""
MAX_REMEMBERED = 32768
"""Blocks of each engine, and sessions."""
REFRESH_S = 1.0
"""What other processes send to an engine is learned with an own request's answer, or by asking this often."""


class PrefixRouter(FIFOMixin, RequestRouter):
    """Serve's router in each process that calls engines; knows the block hashes of what it sent to which engine.

    A choice goes where the requests that are there already, less the margin times the share of its prompt's blocks
    that is cached there, are least. What follows a prompt's longest known prefix counts as cached on one engine, its
    home: of those that have the prefix and no more than their part of all blocks so far, the one that its first block
    is hashed to. So processes that know nothing of each other send what is new to the same engine, but for few. Of a
    request with a session, the session stands for all blocks: its home is where it went last or else, again, where it
    is hashed to.
    """

    def initialize_state(self, block_size: int) -> None:
        self._bytes_of_block = block_size * BYTES_OF_ID
        self._blocks: dict[ReplicaID, OrderedDict[bytes, None]] = {}
        self._sessions: OrderedDict[bytes, ReplicaID] = OrderedDict()
        self._refreshed = 0.0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`: first the engine of choice, then any."""
        replicas = {
            replica.replica_id: replica for replica in random.sample(candidate_replicas, len(candidate_replicas))
        }
        if pending_request is None or not replicas:
            return [list(replicas.values())]
        pending_request.routing_context.should_backoff = True
        try:
            self._refresh(replicas.values())
            chosen = self._choose(replicas, pending_request)
        except Exception:  # Serve would drop the request
            logger.exception("routing by prefix failed: the least loaded engine is taken")
            return [list(replicas.values())]
        self.on_send_request(chosen)  # counted now: a burst is routed before the first of it is sent
        return [[replicas[chosen]], list(replicas.values())]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._blocks = {replica.replica_id: self._blocks.get(replica.replica_id, OrderedDict()) for replica in replicas}

    def _choose(self, ids: Collection[ReplicaID], request: PendingRequest) -> ReplicaID:
        loads = {id: self.replica_queue_len_cache.get(id) or 0 for id in ids}
        margin = max(MARGIN, SHARE_OF_MEAN * sum(loads.values()) / len(loads))
        hashes = self._hashes(request)
        session = request.metadata.session_id
        key = xxhash.xxh3_128_digest(session.encode()) if session else None
        shares = {self._home_of_session(key, ids): 1.0} if key else self._shares(hashes, ids)
        chosen = min(ids, key=lambda id: loads[id] - margin * shares.get(id, 0))
        blocks = self._blocks[chosen]
        _remember(blocks, dict.fromkeys(reversed(hashes)))
        if key:
            _remember(self._sessions, {key: chosen})
        return chosen

    def _hashes(self, request: PendingRequest) -> list[bytes]:
        """Those of the prompt's full blocks, as the engine computes them."""
        match request.args:
            case [_, NewSequence() as sequence]:
                hashes = [root_hash(sequence.cache_salt)]
            case _:
                return []
        end = min(len(sequence.token_ids) // self._bytes_of_block, MAX_BLOCKS) * self._bytes_of_block
        for start in range(0, end, self._bytes_of_block):
            hashes.append(block_hash(hashes[-1], sequence.token_ids[start : start + self._bytes_of_block]))
        return hashes[1:]

    def _shares(self, hashes: list[bytes], ids: Iterable[ReplicaID]) -> dict[ReplicaID, float]:
        """How much of a prompt of these hashes each engine has cached."""
        if not hashes:
            return {}
        depths = {id: _depth(hashes, self._blocks[id]) for id in ids}
        known = max(depths.values())
        if known < len(hashes):
            numbers = {id: len(self._blocks[id]) for id in ids if depths[id] == known}
            most = MAX_EXCESS * sum(numbers.values()) / len(numbers)
            home = _home(hashes[known], [id for id, number in numbers.items() if number <= most])
            depths[home] = len(hashes)
        return {id: depth / len(hashes) for id, depth in depths.items()}

    def _home_of_session(self, key: bytes, ids: Collection[ReplicaID]) -> ReplicaID:
        last = self._sessions.get(key)
        return last if last in ids else _home(key, ids)

    def _refresh(self, replicas: Collection[RunningReplica]) -> None:
        """Asks the engines how many requests they have, if that was not done lately."""
        if time.monotonic() - self._refreshed < REFRESH_S:
            return
        self._refreshed = time.monotonic()

        async def ask(replica: RunningReplica) -> None:
            number = await asyncio.wait_for(replica.get_queue_len(deadline_s=REFRESH_S), REFRESH_S)
            self.on_new_queue_len_info(replica.replica_id, number)

        self._asking = asyncio.gather(*map(ask, replicas), return_exceptions=True)


def _depth(hashes: list[bytes], blocks: Collection[bytes]) -> int:
    """How many leading ones of `hashes` are among `blocks`."""
    return next((i for i, key in enumerate(hashes) if key not in blocks), len(hashes))


def _home(key: bytes, ids: Iterable[ReplicaID]) -> ReplicaID:
    """Rendezvous hashing: the same in every process, and an engine that comes or goes moves only its own keys."""
    return max(ids, key=lambda id: xxhash.xxh3_64_intdigest(key + id.unique_id.encode()))


def _remember(memory: OrderedDict[bytes, Any], new: dict[bytes, Any]) -> None:
    """Puts `new` last in a memory that forgets what is first."""
    for key, value in new.items():
        memory[key] = value
        memory.move_to_end(key)
    while len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)
