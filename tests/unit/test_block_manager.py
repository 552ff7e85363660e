"""The block manager against a model that knows every block's whole prefix and hashes nothing."""

from __future__ import annotations

from array import array
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rayllm.sampling_params import SamplingParams
from rayllm.scheduling import block_manager
from rayllm.scheduling.block_manager import BlockManager
from rayllm.scheduling.sequence import BlockTable, Sequence

NO_LOGPROBS = SamplingParams()
PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=10)
SALTS = st.sampled_from((None, None, None, "salt"))


def make_sequence(token_ids, salt=None, params=NO_LOGPROBS) -> Sequence:
    own = array("i", token_ids)
    seq = Sequence(0, 0, own, params, seed=0, max_tokens=99, stop_token_ids=frozenset(), cache_salt=salt)
    seq.block_tables = [BlockTable()]
    return seq


def blocks_of(seq: Sequence) -> list[int]:
    return seq.block_tables[0].blocks


def run(manager: BlockManager, token_ids, salt=None) -> Sequence:
    """A sequence that holds its blocks, all computed."""
    seq = make_sequence(token_ids, salt)
    manager.allocate(seq, -(-len(token_ids) // manager.block_size), manager.find_cached(seq))
    seq.num_computed_tokens = len(token_ids)
    manager.commit(seq)
    return seq


class BlockMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 12), block_size=st.integers(1, 3), caching=st.sampled_from((True, True, False))
    )
    def start(self, num_blocks, block_size, caching):
        self.manager = BlockManager(num_blocks, block_size, caching)
        self.caching, self.block_size, self.clock = caching, block_size, 0
        self.sequences: list[Sequence] = []
        self.num_offered: dict[Sequence, int] = {}
        self.cached: dict[tuple, int] = {}
        self.freed = {block: (0, 0) for block in range(num_blocks)}
        """Free blocks: when, and minus the index in the table they were freed from."""

    def prefix(self, seq: Sequence, i: int) -> tuple:
        return (seq.cache_salt, *seq.token_ids[: (i + 1) * self.block_size])

    def expected_hits(self, seq: Sequence) -> list[int]:
        hits = []
        if self.caching and seq.params.prompt_logprobs is None:
            # a block may not hold the last token, which has to be computed
            while len(seq.token_ids) > (len(hits) + 1) * self.block_size and self.prefix(seq, len(hits)) in self.cached:
                hits.append(self.cached[self.prefix(seq, len(hits))])
        return hits

    def take(self, block: int) -> None:
        """Checks that `block` was the one to evict."""
        hashed = set(self.cached.values())
        if unhashed := self.freed.keys() - hashed:
            assert block in unhashed
        else:
            assert block == min(self.freed, key=self.freed.__getitem__)
        del self.freed[block]
        self.cached = {prefix: cached for prefix, cached in self.cached.items() if cached != block}

    def commit(self, seq: Sequence) -> None:
        self.manager.commit(seq)
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        for i in range(self.num_offered[seq], num_full if self.caching else 0):
            self.cached.setdefault(self.prefix(seq, i), blocks_of(seq)[i])
            self.num_offered[seq] = i + 1

    @rule(token_ids=PROMPTS, salt=SALTS, logprobs=st.sampled_from((None, None, 1)), reserve=st.integers(0, 3))
    def admit(self, token_ids, salt, logprobs, reserve):
        seq = make_sequence(token_ids, salt, SamplingParams(prompt_logprobs=logprobs))
        hits = self.manager.find_cached(seq)
        assert hits == self.expected_hits(seq)
        num_blocks = -(-len(token_ids) // self.block_size)
        fits = len(self.freed.keys() - set(hits)) >= num_blocks + reserve - len(hits)
        assert self.manager.can_allocate(num_blocks + reserve, hits) == fits
        if fits:
            self.manager.allocate(seq, num_blocks, hits)
            assert blocks_of(seq)[: len(hits)] == hits
            assert len(blocks_of(seq)) == num_blocks
            for block in hits:
                self.freed.pop(block, None)
            for block in blocks_of(seq)[len(hits) :]:
                self.take(block)
            seq.num_computed_tokens = len(hits) * self.block_size
            self.num_offered[seq] = len(hits)
            self.sequences.append(seq)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), number=st.integers(1, 6))
    def compute(self, data, number):
        """Computes known tokens, and one that is not known yet."""
        seq = data.draw(st.sampled_from(self.sequences))
        seq.num_computed_tokens = min(seq.num_computed_tokens + number, len(seq.token_ids) + 1)
        while seq.num_computed_tokens > len(blocks_of(seq)) * self.block_size:
            if not self.freed:
                seq.num_computed_tokens = len(blocks_of(seq)) * self.block_size
                break
            self.take(self.manager.append(seq))
        self.commit(seq)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), token_ids=st.lists(st.integers(1, 2), min_size=1, max_size=4))
    def learn(self, data, token_ids):
        seq = data.draw(st.sampled_from(self.sequences))
        seq.token_ids.extend(token_ids)
        self.commit(seq)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data):
        seq = data.draw(st.sampled_from(self.sequences))
        table = list(blocks_of(seq))
        self.sequences.remove(seq)
        self.manager.release(seq)
        assert blocks_of(seq) == []
        self.clock += 1
        held = Counter(block for other in self.sequences for block in blocks_of(other))
        self.freed |= {block: (self.clock, -i) for i, block in enumerate(table) if not held[block]}

    @rule(token_ids=PROMPTS, salt=SALTS)
    def look(self, token_ids, salt):
        seq = make_sequence(token_ids, salt)
        assert self.manager.find_cached(seq) == self.expected_hits(seq)

    @invariant()
    def agree(self):
        if hasattr(self, "manager"):
            self.manager.check_integrity(self.sequences)
            assert self.manager.num_free_blocks == len(self.freed)
            for seq in self.sequences:
                longer = make_sequence([*seq.token_ids, 3], seq.cache_salt)
                assert self.manager.find_cached(longer) == self.expected_hits(longer)


TestBlockManager = BlockMachine.TestCase
TestBlockManager.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    phases=set(Phase) - {Phase.explain},
)


def test_eviction_order():
    manager = BlockManager(num_blocks=6, block_size=2)
    first, second = run(manager, [1, 1, 2, 2, 3]), run(manager, [4, 4, 5, 5, 6])
    (a, b, unhashed_1), (c, d, unhashed_2) = blocks_of(first), blocks_of(second)
    manager.release(second)
    manager.release(first)
    hit = run(manager, [4, 4, 7])  # used again, and thereby more recently than `first`
    assert blocks_of(hit)[0] == c
    manager.release(hit)
    taker = make_sequence(range(100, 112))
    manager.allocate(taker, 6, [])
    assert set(blocks_of(taker)[:2]) == {unhashed_1, unhashed_2}
    assert blocks_of(taker)[2:] == [d, b, a, c]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_one_prompt_token_is_computed(length):
    manager = BlockManager(num_blocks=8, block_size=4)
    seq = run(manager, range(length))
    assert manager.find_cached(make_sequence(range(length))) == blocks_of(seq)[: (length - 1) // 4]


def test_salts_share_nothing():
    manager = BlockManager(num_blocks=16, block_size=2)
    tables = {salt: blocks_of(run(manager, range(5), salt)) for salt in (None, "a", "b")}
    for salt, table in tables.items():
        assert manager.find_cached(make_sequence(range(5), salt)) == table[:2]
    assert manager.find_cached(make_sequence(range(5), "c")) == []
    assert len({block for table in tables.values() for block in table}) == 9


def test_can_allocate_counts_hits():
    manager = BlockManager(num_blocks=4, block_size=1)
    seq = run(manager, [1, 2, 3])
    hits = manager.find_cached(make_sequence([1, 2, 9, 9, 9]))
    assert hits == blocks_of(seq)[:2]
    assert manager.can_allocate(3, hits)  # held hits cost nothing, one block is free
    assert not manager.can_allocate(4, hits)
    manager.release(seq)
    assert manager.can_allocate(4, hits)  # free hits are among the four free blocks
    assert not manager.can_allocate(5, hits)


@pytest.mark.parametrize("kept", [0, 4], ids=["all blocks alike", "blocks of like tokens alike"])
def test_hash_collisions_do_not_hit(monkeypatch, kept):
    """Digests that forget what came before (or all): tokens decide, those of earlier blocks too."""
    monkeypatch.setattr(block_manager.xxhash, "xxh3_128_digest", lambda data: data[len(data) - kept :])
    manager = BlockManager(num_blocks=32, block_size=1)
    first = run(manager, [1, 5, 6, 7])
    manager.check_integrity([first])
    assert manager.find_cached(make_sequence([2, 5, 6])) == []
    assert manager.find_cached(make_sequence([1, 5, 6], "salt")) == []
    second = run(manager, [2, 5, 6, 7])  # its 2 is cached, the rest stands under the hashes of `first`
    assert manager.find_cached(make_sequence([2, 5, 6])) == blocks_of(second)[: 1 if kept else 0]
    assert manager.find_cached(make_sequence([1, 5, 6])) == blocks_of(first)[: 2 if kept else 1]
    manager.check_integrity([first, second])


def test_collision_after_the_parent_was_evicted(monkeypatch):
    """A block outlives the cached twin of its parent; the parent's hash then comes to stand for other tokens."""
    digests = {b"": b"root"}

    def digest(data: bytes) -> bytes:
        """1 and 2 as first tokens collide."""
        return digests.setdefault(data, b"same" if data[-4:] in (b"\1\0\0\0", b"\2\0\0\0") else bytes([len(digests)]))

    monkeypatch.setattr(block_manager.xxhash, "xxh3_128_digest", digest)
    manager = BlockManager(num_blocks=3, block_size=1)
    owner, twin = run(manager, [1]), run(manager, [1])
    twin.token_ids.append(5)
    twin.num_computed_tokens = 2
    manager.append(twin)
    manager.commit(twin)
    manager.release(owner)
    other = run(manager, [2])  # in the block of `owner`
    assert manager.find_cached(make_sequence([2, 5, 6])) == blocks_of(other)
    manager.check_integrity([twin, other])


def test_caching_off():
    manager = BlockManager(num_blocks=8, block_size=2, enable_prefix_caching=False)
    seq = run(manager, range(8))
    manager.release(seq)
    assert manager.find_cached(make_sequence(range(8))) == []
    manager.check_integrity([])


def test_integrity_check_sees_damage():
    def damaged(damage):
        manager = BlockManager(num_blocks=4, block_size=2)
        seq = run(manager, range(4))
        manager.check_integrity([seq])
        damage(manager, seq)
        with pytest.raises(AssertionError):
            manager.check_integrity([seq])

    damaged(lambda manager, seq: blocks_of(seq).pop())
    damaged(lambda manager, seq: blocks_of(seq).append(blocks_of(seq)[0]))
    damaged(lambda manager, seq: manager._free.popitem())
    damaged(lambda manager, seq: manager._cached.popitem())
    damaged(lambda manager, seq: setattr(seq, "num_computed_tokens", 5))
