"""The block table's owner: ref-counted blocks of KV, found again by the hash of their tokens.

A full block's hash is xxh3_128(parent's hash ‖ token ids). A freed block keeps its content and hash until it
is evicted: unhashed ones first, then least recently used first, a sequence's last blocks before its first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

import xxhash

from rayllm.scheduling.sequence import BlockTable, Prefix, Sequence


def root_hash(cache_salt: str | None) -> bytes:
    """The parent of every first block's hash."""
    return b"root" + xxhash.xxh3_128_digest((cache_salt or "").encode())


def block_hash(parent: bytes, token_ids: bytes) -> bytes:
    """The hash of a full block that follows those of `parent`; `token_ids` are int32, in native order."""
    return xxhash.xxh3_128_digest(parent + token_ids)


class BlockManager:
    """Blocks 0 … num_blocks - 1 of one KV group, each of `block_size` slots; the group's layers attend to everything.

    `index` is that of the group, in `Sequence.block_tables` too.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, index: int = 0):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._index = index
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._prefixes: list[Prefix | None] = [None] * num_blocks
        """What the hashes stand for, since two could collide."""
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """Blocks nobody uses, the next to be evicted first."""

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, cached ones among them."""
        return len(self._free)

    def table(self, seq: Sequence) -> BlockTable:
        """The group's blocks of `seq`."""
        return seq.block_tables[self._index]

    def find_cached(self, seq: Sequence, window: int = 0) -> list[int]:
        """The longest run of cached blocks that `seq` starts with; leaves one token at least to compute, and the last
        `window` tokens of a prompt that will be pruned."""
        if not self.enable_prefix_caching or seq.wants_prompt_logprobs:
            return []
        found: list[int] = []
        prefix = self._root(seq)
        end = seq.num_prompt_tokens - max(window, 1) if seq.num_kept else len(seq.token_ids) - 1
        for i in range(end // self.block_size):
            block = self._cached.get(self._hash(seq, i))
            known = None if block is None else self._prefixes[block]
            if block is None or known is None or not known.is_same(Prefix(prefix, self._tokens_of(seq, i))):
                break
            found.append(block)
            prefix = known
        return found

    def can_allocate(self, num_blocks: int, cached: list[int]) -> bool:
        """Whether `num_blocks` can be had, the blocks of `cached` among them."""
        held = sum(self._ref_counts[block] > 0 for block in cached)
        return num_blocks - held <= len(self._free)

    def allocate(self, seq: Sequence, num_blocks: int, cached: list[int], num_private: int = 0) -> None:
        """Gives `seq` a table of `num_blocks` blocks that begins with `cached`, and reserves `num_private` more."""
        for block in cached:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        table = self.table(seq)
        table.blocks = cached + [self._take() for _ in range(num_blocks - len(cached))]
        table.private = [self._take() for _ in range(num_private)]
        table.num_committed = len(cached)
        table.committed_prefix = self._prefixes[cached[-1]] if cached else self._root(seq)

    def is_full(self, seq: Sequence) -> bool:
        """Whether the next token of `seq` needs another block."""
        return seq.kv_len == len(self.table(seq).blocks) * self.block_size

    def append(self, seq: Sequence) -> int:
        """Adds a block to the table of `seq`; the caller made sure that one is free."""
        block = self._take()
        self.table(seq).blocks.append(block)
        return block

    def commit(self, seq: Sequence) -> None:
        """Makes the full blocks of `seq` that are computed, of known tokens, available to others."""
        if not self.enable_prefix_caching or seq.num_pruned:  # a pruned cache is nobody else's prefix
            return
        table = self.table(seq)
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        for i in range(table.num_committed, num_full):
            block, key = table.blocks[i], self._hash(seq, i)
            table.committed_prefix = Prefix(table.committed_prefix, self._tokens_of(seq, i))
            if key not in self._cached:  # else a twin is cached already, and this one stays private
                self._cached[key] = block
                self._hashes[block] = key
                self._prefixes[block] = table.committed_prefix
            table.num_committed = i + 1

    def prune(self, seq: Sequence) -> None:
        """Leaves `seq` its private blocks only; the others stay cached, where they are hashed."""
        table = self.table(seq)
        private, table.private = table.private, []
        self.release(seq)
        table.blocks = private

    def release(self, seq: Sequence) -> None:
        """Takes all blocks away from `seq`."""
        table = self.table(seq)
        for block in reversed(table.blocks + table.private):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)
        table.blocks, table.private = [], []
        table.num_committed = 0
        table.committed_prefix = None

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        key = self._hashes[block]
        if key is not None:
            del self._cached[key]
            self._hashes[block] = None
            self._prefixes[block] = None
        self._ref_counts[block] = 1
        return block

    def _tokens_of(self, seq: Sequence, i: int) -> bytes:
        return seq.token_ids[i * self.block_size : (i + 1) * self.block_size].tobytes()

    def _root(self, seq: Sequence) -> Prefix:
        return Prefix(None, (seq.cache_salt or "").encode())

    def _hash(self, seq: Sequence, i: int) -> bytes:
        """The hash of the i-th block of `seq`; needs those before it."""
        if i == len(seq.block_hashes):
            parent = seq.block_hashes[-1] if i else root_hash(seq.cache_salt)
            seq.block_hashes.append(block_hash(parent, self._tokens_of(seq, i)))
        return seq.block_hashes[i]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError unless ref counts, free list and hash table agree with `sequences`.

        They are all that hold blocks.
        """
        tables = {seq: self.table(seq) for seq in sequences}
        counts = Counter(block for table in tables.values() for block in table.blocks + table.private)
        assert self._ref_counts == [counts[b] for b in range(self.num_blocks)], "ref counts"
        assert set(self._free) == {b for b in range(self.num_blocks) if not counts[b]}, "free list"
        hashed = {key: b for b, key in enumerate(self._hashes) if key is not None}
        assert hashed == self._cached, "hash table"
        for block, prefix in enumerate(self._prefixes):
            assert (prefix is not None) == (self._hashes[block] is not None), "tokens of hashed blocks"
        for seq, table in tables.items():
            assert len(set(table.blocks)) == len(table.blocks), "a block twice in one table"
            assert len(table.blocks) * self.block_size >= seq.kv_len, "table too short"
            private = table.blocks if seq.num_pruned else table.private
            assert all(counts[b] == 1 and self._hashes[b] is None for b in private), "private blocks"
