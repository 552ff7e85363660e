"""Where the router's policy sends what; `tests/serve/test_replicas.py` has it at work."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest

from deployments.router import MARGIN, Policy, _depth, hashes_of
from rayllm.messages.base import pack_ids
from rayllm.messages.sequences import NewSequence
from rayllm.sampling_params import SamplingParams
from rayllm.scheduling.block_manager import BlockManager
from rayllm.scheduling.sequence import BlockTable, Sequence

BLOCK = 4
IDLE = dict.fromkeys("abc", 0)


def prompt(rng: random.Random, num_blocks: int, after: list[bytes] | None = None) -> list[bytes]:
    """Hashes."""
    return (after or []) + [rng.randbytes(16) for _ in range(num_blocks)]


def busy(engine: str, number: int) -> dict[str, int]:
    return IDLE | {engine: number}


@pytest.mark.parametrize("salt", [None, "salt"])
def test_hashes_are_those_of_the_block_table(rng: random.Random, salt: str | None):
    tokens = [rng.randrange(1000) for _ in range(5 * BLOCK + 2)]
    own = array("i", tokens)
    seq = Sequence(0, 0, own, SamplingParams(), seed=0, max_tokens=9, stop_token_ids=frozenset(), cache_salt=salt)
    seq.block_tables = [BlockTable()]
    manager = BlockManager(8, BLOCK)
    manager.allocate(seq, -(-len(tokens) // BLOCK), [])
    seq.num_computed_tokens = len(tokens)
    manager.commit(seq)
    assert (
        hashes_of(NewSequence(0, pack_ids(tokens), len(tokens), SamplingParams(), 0, salt), BLOCK) == seq.block_hashes
    )
    assert len(seq.block_hashes) == 5


def test_a_cached_prompt_outweighs_the_margin(rng: random.Random):
    policy, hashes = Policy(), prompt(rng, 8)
    first = policy.choose(IDLE, hashes)
    assert {policy.choose(busy(first, MARGIN - 1), hashes) for _ in range(5)} == {first}
    second = policy.choose(busy(first, MARGIN + 1), hashes)
    assert second != first
    assert policy.choose(busy(first, 1), hashes) == second, "now both have it, and the less busy one gets it"
    assert policy.choose(busy(second, 1), hashes) == first
    many = dict.fromkeys("abc", 100)
    assert policy.choose(many | {first: 120, second: 121}, hashes) == first, "a quarter of the mean is more than 8"


def test_a_part_counts_as_a_part(rng: random.Random):
    policy, system = Policy(), prompt(rng, 2)
    first = policy.choose(IDLE, system)
    longer = prompt(rng, 6, after=system)
    policy.choose(busy(first, 50), system)
    second = next(engine for engine in "abc" if engine != first and _depth(system, policy._blocks[engine]))
    conversation = policy.choose(IDLE, longer)
    assert conversation in (first, second), "both have the beginning"
    assert policy.choose(busy(conversation, MARGIN // 2), longer) == conversation
    assert policy.choose(busy(conversation, MARGIN), longer) != conversation


def test_what_is_new_goes_the_same_way_from_every_process(rng: random.Random):
    """Whatever order it comes in, and each engine gets its part."""
    prompts = [prompt(rng, 8) for _ in range(600)]
    one, other = Policy(), Policy()
    chosen = [one.choose(IDLE, hashes) for hashes in prompts]
    order = rng.sample(range(600), 600)
    again = {i: other.choose(IDLE, prompts[i]) for i in order}
    assert sum(chosen[i] == again[i] for i in order) > 0.9 * 600
    assert max(Counter(chosen).values()) < 0.45 * 600
    few = Policy()
    for number, hashes in enumerate(prompts[:20], start=1):
        few.choose(IDLE, hashes)
        assert max(map(len, few._blocks.values())) <= 8 * (1.25 * number / 3 + 1)


def test_an_engine_that_goes_moves_only_what_it_had(rng: random.Random):
    policy, prompts = Policy(), [prompt(rng, 8) for _ in range(100)]
    before = [policy.choose(IDLE, hashes) for hashes in prompts]
    policy.forget_others("ab")
    after = [policy.choose({"a": 0, "b": 0}, hashes) for hashes in prompts]
    assert all(was in (now, "c") for was, now in zip(before, after, strict=True))
    assert policy._blocks.keys() == {"a", "b"}


def test_sessions(rng: random.Random):
    policy = Policy()
    homes = {name: policy.choose(IDLE, prompt(rng, 4), name) for name in map(str, range(50))}
    assert set(homes.values()) == set("abc")
    assert all(Policy().choose(IDLE, prompt(rng, 4), name) == home for name, home in homes.items())
    home = homes["7"]
    assert policy.choose(busy(home, MARGIN - 1), prompt(rng, 4), "7") == home
    elsewhere = policy.choose(busy(home, MARGIN + 1), prompt(rng, 4), "7")
    assert elsewhere != home
    assert policy.choose(IDLE, prompt(rng, 4), "7") == home


def test_without_a_full_block_the_least_busy_is_taken():
    assert Policy().choose({"a": 2, "b": 1, "c": 3}, []) == "b"


def test_memory_is_bounded(rng: random.Random):
    policy, last = Policy(max_remembered=20), prompt(rng, 8)
    for _ in range(50):
        policy.choose({"a": 0}, prompt(rng, 8))
    policy.choose({"a": 0}, last)
    assert len(policy._blocks["a"]) == 20
    assert _depth(last, policy._blocks["a"]) == 8
