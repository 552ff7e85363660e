"""The scheduler against a brute-force model of the shards."""

from __future__ import annotations

import zlib

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shard_model import EOS, Engine, chunk_sizes, rows_of

from rayllm.scheduling import block_manager, scheduler
from rayllm.scheduling.pruning import MAX_PRUNES, snapkv, streaming

STEM = (1, 2, 1, 1, 3, 2, 2, 1, 3, 3, 1, 2, 3, 1, 1, 2)
"""Most prompts begin with a part of it."""


def tiny_digest(data: bytes) -> bytes:
    """Collides all the time."""
    return bytes((zlib.crc32(data) % 3,))


def policies(block_size):
    limits = st.integers(6, 12)
    return st.builds(snapkv, limits, st.just(block_size), st.integers(2, 5)) | st.builds(
        streaming, limits, st.just(block_size)
    )


@st.composite
def engine_configs(draw):
    max_model_len, block_size = draw(st.integers(8, 32)), draw(st.integers(1, 4))
    least = -(-max_model_len // block_size)
    max_num_seqs = draw(st.integers(1, 5))
    pruning = draw(st.none() | policies(block_size))
    least_batch = max_num_seqs + (pruning.window if pruning else 0)
    return {
        "num_blocks": draw(st.lists(st.just(least) | st.integers(least, 3 * least), min_size=1, max_size=2)),
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(least_batch, least_batch + 24)),
        "max_model_len": max_model_len,
        "enable_prefix_caching": draw(st.booleans()),
        "incarnation": draw(st.integers(0, 3)),
        "pruning": pruning,
    }


class SchedulerMachine(RuleBasedStateMachine):
    """Moves in any order, none to two steps in flight."""

    digest = staticmethod(block_manager.xxhash.xxh3_128_digest)

    @initialize(config=engine_configs(), collide=st.booleans(), max_prunes=st.sampled_from((1, 2, MAX_PRUNES)))
    def start(self, config, collide, max_prunes):
        block_manager.xxhash.xxh3_128_digest = tiny_digest if collide else self.digest
        scheduler.MAX_PRUNES = max_prunes
        self.engine = Engine(**config)

    @rule(data=st.data(), number=st.integers(1, 4))
    def add(self, data, number):
        longest = self.engine.config.max_model_len - 1
        for _ in range(number):
            prompt = (STEM * 2)[: data.draw(st.integers(0, longest))]
            prompt += tuple(data.draw(st.lists(st.integers(1, 3), min_size=not prompt, max_size=3)))
            prompt = prompt[:longest]
            max_tokens = data.draw(st.integers(1, self.engine.config.max_model_len - len(prompt)))
            self.engine.add(
                prompt,
                max_tokens=max_tokens,
                min_tokens=data.draw(st.one_of(st.just(0), st.integers(0, max_tokens))),
                salt=data.draw(st.sampled_from((0, 0, 0, 1, 2))),
                variant=data.draw(st.integers(0, 1)),
                stops=data.draw(st.sampled_from((frozenset({EOS}), frozenset({EOS, 2}), frozenset()))),
                logprobs=data.draw(st.sampled_from((None, None, 0, 2))),
                prompt_logprobs=data.draw(st.sampled_from((None, None, None, 1))),
                snapkv_limit=data.draw(st.sampled_from((None, None, None, "all", 6))),
            )

    @rule(moves=st.lists(st.booleans(), min_size=1, max_size=30))
    def move(self, moves):
        for forward in moves:
            if forward and len(self.engine.answers) < 3:
                self.engine.schedule()
            elif self.engine.answers:
                self.engine.update()
            self.engine.scheduler.check_integrity()

    @precondition(lambda self: self.engine.sequences)
    @rule(data=st.data())
    def abort(self, data):
        """Some of them long finished: that is no error."""
        self.engine.abort(data.draw(st.sampled_from(sorted(self.engine.sequences))))

    @invariant()
    def integrity(self):
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self):
        try:
            if hasattr(self, "engine"):
                self.engine.drain(depth=len(self.engine.sequences) % 3 + 1)
        finally:
            block_manager.xxhash.xxh3_128_digest = self.digest
            scheduler.MAX_PRUNES = MAX_PRUNES


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=12,
    deadline=None,
    report_multiple_bugs=False,
    phases=set(Phase) - {Phase.explain},
)


def small_engine(**config) -> Engine:
    defaults = {"num_blocks": [64], "block_size": 2, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    defaults |= {"max_model_len": 64, "enable_prefix_caching": True, "incarnation": 7}
    return Engine(**{**defaults, **config})


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=9, max_size=20),
    depth=st.integers(1, 3),
    caching=st.booleans(),
    block_size=st.integers(1, 3),
)
def test_preemption_changes_no_output(lengths, depth, caching, block_size):
    """Eight sequences of 21 to 32 tokens want to run in a cache for little more than one."""
    engine = small_engine(
        num_blocks=[-(-40 // block_size)], block_size=block_size, max_model_len=40, enable_prefix_caching=caching
    )
    for i, length in enumerate(lengths):
        engine.add([1 + i % 3] * length, max_tokens=20, stops=frozenset(), variant=i % 2)
    engine.drain(depth)
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_long_prompts_do_not_stall_decoding(depth):
    engine = small_engine(max_model_len=128, num_blocks=[128], max_num_batched_tokens=8, block_size=4)
    for token in (1, 2, 3):
        engine.add([token], max_tokens=100, stops=frozenset())
    while not all(engine.updates.values()):
        engine.schedule()
        engine.update()
    late = engine.add(range(1, 101), max_tokens=4)
    num_chunks = 0
    while not engine.updates[late]:
        if len(engine.answers) < depth and (step := engine.schedule()):
            num_chunks += len(chunk_sizes(step))
            assert step.num_decodes == 3 or num_chunks == 20
            assert chunk_sizes(step) in ([5], [])
        else:
            engine.update()
    assert num_chunks == 20  # of 5 tokens, what three decode rows leave of the budget
    engine.drain(depth)


@pytest.mark.parametrize(("depth", "num_wasted"), [(1, 0), (2, 1), (3, 2)])
def test_an_end_wastes_the_rows_in_flight(depth, num_wasted):
    engine = small_engine()
    stopped = engine.add([1, 2], max_tokens=60)
    full = engine.add([3], max_tokens=7, stops=frozenset())
    assert engine.expected[stopped][1] == "stop"
    assert len(engine.expected[stopped][0]) > 1
    engine.drain(depth)
    samples = engine.shards.num_samples
    assert samples[engine.sequences[stopped].seed] == len(engine.expected[stopped][0]) + num_wasted
    assert samples[engine.sequences[full].seed] == 7


def test_hits_within_the_step_that_computes():
    engine = small_engine()
    for _ in range(2):
        engine.add(STEM, max_tokens=9)
    step = engine.schedule()
    assert [row.position for row in rows_of(step)] == [0, 14]  # the last block holds the last token
    first, second = (start.block_tables[0] for start in step.starts)
    assert first[:7] == second[:7]
    engine.drain(2)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_outputs_are_hit_by_the_next_turn(depth):
    engine = small_engine()
    first = engine.add([1, 2], max_tokens=5, stops=frozenset())
    engine.drain(depth)
    follow_up = engine.add([*engine.sequences[first].token_ids, 3], max_tokens=2)
    engine.drain(depth)
    assert engine.updates[follow_up][0].num_cached_tokens == 6  # of 7: the last output's KV was never computed


def test_prompt_logprobs_take_no_hits_but_leave_blocks():
    engine = small_engine(max_num_batched_tokens=8)
    first = engine.add(STEM, max_tokens=5, prompt_logprobs=2, logprobs=1)
    second = engine.add(STEM, max_tokens=5, prompt_logprobs=0)
    third = engine.add(STEM, max_tokens=5)
    engine.drain(2)
    assert [engine.updates[key][0].num_cached_tokens for key in (first, second, third)] == [0, 0, 14]


@pytest.mark.parametrize("pruning", [None, snapkv(limit=6, block_size=2, window=2)])
@pytest.mark.parametrize("num_moves", range(6))
def test_abort_at_any_time(num_moves, pruning):
    """One that waits, is in its prompt or decodes, with a step in flight or none."""
    engine = small_engine(max_num_seqs=2, max_num_batched_tokens=8, pruning=pruning)
    keys = [engine.add([token] * 14, max_tokens=9, stops=frozenset()) for token in (1, 2, 3)]
    for move in range(num_moves):
        engine.schedule()
        if move % 2:
            engine.update()
    num_updates = {key: len(engine.updates[key]) for key in keys}
    for key in (keys[0], keys[2], keys[0]):
        engine.abort(key)
        engine.scheduler.check_integrity()
    engine.scheduler.abort(5, 5)
    engine.drain(2)
    assert [len(engine.updates[key]) for key in keys] == [num_updates[keys[0]], 9, num_updates[keys[2]]]


def test_abort_while_preempted():
    engine = small_engine(num_blocks=[32], max_num_seqs=8)
    for token in (1, 2, 3, 1):
        engine.add([token] * 10, max_tokens=40, stops=frozenset())
    engine.schedule()
    while not engine.scheduler.num_preemptions:
        if len(engine.answers) == 2:
            engine.update()
        engine.schedule()
    preempted = engine.scheduler.waiting[0]
    assert preempted.num_pending == 1  # its last token is still being computed
    engine.abort((preempted.client_id, preempted.sequence_id))
    engine.drain(2)


def test_a_preempted_sequence_waits_for_its_pending_token():
    engine = small_engine(num_blocks=[4], max_model_len=8)
    first = engine.add([1, 2], max_tokens=3, stops=frozenset())
    engine.add([3, 3], max_tokens=6, stops=frozenset())
    engine.schedule()
    for _ in range(2):
        engine.schedule()
        engine.update()
    # all of `first` is on its way, the other has filled its blocks and none is free
    assert engine.schedule() is None
    assert engine.scheduler.num_preemptions == 1
    engine.abort(first)
    assert engine.schedule() is None
    engine.update()
    assert engine.schedule().starts[0].num_prompt_tokens == 2
    engine.drain(2)


def test_admission_leaves_a_block_to_each_that_runs():
    engine = small_engine(num_blocks=[4], max_model_len=8)
    engine.add([1, 2], max_tokens=3, stops=frozenset())
    engine.add([3] * 6, max_tokens=2, stops=frozenset())
    assert len(engine.schedule().starts) == 1  # three blocks are free, and would do for the prompt alone
    engine.drain(2)
    assert engine.scheduler.num_preemptions == 0


def pruned_engine(**config) -> Engine:
    return small_engine(**{"pruning": snapkv(limit=8, block_size=2, window=4), **config})


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_pruned_prompt_holds_what_it_keeps(depth):
    """And what it said; its other blocks are free for others, and still cached."""
    engine = pruned_engine()
    key = engine.add(range(1, 41), max_tokens=20, stops=frozenset())
    assert len(engine.schedule().prunes) == 0, "32 of 40 tokens"
    step = engine.schedule()
    [prune] = step.prunes
    assert (chunk_sizes(step), prune.row, prune.num_kept, len(prune.block_tables[0])) == ([8], 0, 8, 4)
    assert engine.scheduler.num_free_blocks == 64 - 4
    again = engine.add(range(1, 41), max_tokens=1)
    engine.drain(depth)
    assert engine.updates[again][0].num_cached_tokens == 36, "all whole blocks before the window"
    assert [engine.updates[k][0].num_pruned_tokens for k in (key, again)] == [32, 32]
    assert engine.scheduler.num_pruned_tokens == 64


def test_what_is_not_pruned():
    engine = pruned_engine()
    short = engine.add(range(1, 9), max_tokens=2)
    little = engine.add(range(1, 10), max_tokens=2)
    refused = engine.add(range(1, 40), max_tokens=2, snapkv_limit="all")
    lower = engine.add(range(2, 40), max_tokens=2, snapkv_limit=6)
    engine.drain(2)
    pruned = [engine.updates[key][0].num_pruned_tokens for key in (short, little, refused, lower)]
    assert pruned == [0, 1, 0, 32], "9 tokens are a block more than 8"


def test_the_last_chunk_holds_the_window():
    engine = pruned_engine(max_num_batched_tokens=14, max_num_seqs=2)
    engine.add(range(1, 31), max_tokens=1)
    sizes = chunk_sizes(engine.schedule()) + chunk_sizes(engine.schedule())
    engine.update()
    sizes += chunk_sizes(engine.schedule())
    assert sizes == [14, 12, 4], "not 14, 14, 2"
    engine.drain(1)


def test_a_step_prunes_so_many_at_most():
    """Whole prompts that one step could hold: some wait, all but their windows computed, and lose nothing."""
    engine = pruned_engine(num_blocks=[512], max_num_seqs=20, max_num_batched_tokens=400)
    keys = [engine.add([1 + i] * 12, max_tokens=3, stops=frozenset()) for i in range(20)]
    first, second = engine.schedule(), engine.schedule()
    assert [len(first.prunes), len(second.prunes)] == [MAX_PRUNES, 20 - MAX_PRUNES]
    assert chunk_sizes(first) == [12] * MAX_PRUNES + [8] * (20 - MAX_PRUNES)
    engine.drain(2)
    assert all(engine.updates[key][0].num_pruned_tokens == 4 for key in keys)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(9, 24), min_size=9, max_size=20),
    depth=st.integers(1, 3),
    window=st.integers(2, 4),
    block_size=st.integers(1, 3),
)
def test_preemption_after_pruning_changes_no_output(lengths, depth, window, block_size):
    """The cache has room for one sequence; those that are preempted are pruned again, and go on."""
    engine = small_engine(
        num_blocks=[-(-52 // block_size)],
        block_size=block_size,
        max_model_len=48,
        pruning=snapkv(limit=6, block_size=block_size, window=window),
    )
    for i, length in enumerate(lengths):
        engine.add([1 + i % 3] * length, max_tokens=20, stops=frozenset(), variant=i % 2)
    engine.drain(depth)
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_pruned_tokens >= sum(length - 6 for length in lengths) - len(lengths) * 3


def test_more_sequences_fit():
    """At a fixed cache, at least 0.8 × (L + g) / (limit + g) as many decode together."""

    def together(**config) -> int:
        engine = small_engine(
            num_blocks=[220], block_size=2, max_model_len=128, max_num_seqs=64, max_num_batched_tokens=256, **config
        )
        for i in range(40):
            engine.add([1 + i % 3, *[2 + i] * 99], max_tokens=20, stops=frozenset())
        most = 0
        while engine.scheduler.sequences or engine.answers:
            if len(engine.answers) < 2 and (step := engine.schedule()):
                most = max(most, step.num_decodes)
            else:
                engine.update()
        return most

    gain = together(pruning=snapkv(limit=10, block_size=2, window=4)) / together()
    assert gain >= 0.8 * (100 + 20) / (10 + 20)


def test_min_tokens_travel_as_banned_tokens():
    engine = small_engine()
    engine.add([1], min_tokens=3, stops=frozenset({9, EOS}))
    engine.add([1], stops=frozenset({9, EOS}))
    assert [start.banned_token_ids for start in engine.schedule().starts] == [[EOS, 9], []]


def test_nothing_to_do():
    assert small_engine().scheduler.schedule() is None


def test_an_answer_out_of_turn_is_refused():
    engine = small_engine()
    engine.add([1])
    engine.schedule()
    engine.schedule()
    engine.answers.popleft()
    with pytest.raises(AssertionError, match="out of turn"):
        engine.update()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_blocks": [64, 31]}, "KV cache must hold at least one sequence of max_model_len"),
        ({"max_num_batched_tokens": 7}, "max_num_batched_tokens must be at least max_num_seqs"),
    ],
)
def test_what_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        small_engine(**config)
