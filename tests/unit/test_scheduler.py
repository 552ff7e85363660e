"""The scheduler against a brute-force model of the shards: what each row reads must be the KV of its own tokens."""

from __future__ import annotations

import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rayllm import block_manager
from rayllm.sampling_params import SamplingParams
from rayllm.scheduler import Scheduler
from rayllm.sequence import Sequence
from rayllm.step import LaneStart, Logprobs, PromptLogprobs, SequenceUpdate, StepInput, StepOutput

EOS = 0
SALTS = (None, "salt", "pepper")
STEM = (1, 2, 1, 1, 3, 2, 2, 1, 3, 3, 1, 2, 3, 1, 1, 2)
"""Most prompts begin with a part of it."""


def sample(seed: int, token_ids: tuple[int, ...], num_prompt_tokens: int, min_tokens: int, banned: set[int]) -> int:
    """A pure function of what the model would see; only one bit of the seed counts, so that outputs coincide too."""
    draw = zlib.crc32(bytes((seed % 2, *token_ids))) % 12
    token = EOS if draw == 0 else 1 + draw % 3
    while token in banned and len(token_ids) - num_prompt_tokens < min_tokens:
        token = (token + 1) % 4
    return token


def generate(seq: Sequence) -> tuple[list[int], str]:
    """The output of `seq` and its finish reason, computed alone."""
    tokens = tuple(seq.token_ids)
    while True:
        banned = set(seq.stop_token_ids)
        token = sample(seq.seed, tokens, seq.num_prompt_tokens, seq.params.min_tokens, banned)
        tokens += (token,)
        if token in seq.stop_token_ids:
            return list(tokens[seq.num_prompt_tokens :]), "stop"
        if len(tokens) == seq.num_prompt_tokens + seq.max_tokens:
            return list(tokens[seq.num_prompt_tokens :]), "length"


def salt_of(seed: int) -> int:
    return seed // 2 % len(SALTS)


@dataclass
class Lane:
    start: LaneStart
    tokens: tuple[int, ...]
    table: list[int]
    num_computed: int


@dataclass
class Shards:
    """Knows only what the messages say. The KV of a token is the salt and all tokens up to it."""

    block_size: int
    lanes: dict[int, Lane] = field(default_factory=dict)
    memory: dict[int, tuple] = field(default_factory=dict)
    num_samples: Counter[int] = field(default_factory=Counter)
    """By seed, which no two sequences of a test share."""

    def execute(self, step: StepInput) -> StepOutput:
        for start in step.starts:
            tokens, table = tuple(start.token_ids), list(start.block_table)
            self.lanes[start.lane] = Lane(start, tokens, table, start.num_computed_tokens)
        for lane, block in zip(step.new_blocks[::2], step.new_blocks[1::2], strict=True):
            self.lanes[lane].table.append(block)
        chunks = list(zip(step.chunks[::2], step.chunks[1::2], strict=True))
        rows = [(self.lanes[lane], n) for lane, n in [(lane, 1) for lane in step.decode_lanes] + chunks]
        assert len({id(lane) for lane, _ in rows}) == len(rows), "a lane has one row in a step"

        written: Counter[int] = Counter()
        for lane, n in rows:
            assert n >= 1
            for position in range(lane.num_computed, lane.num_computed + n):
                assert position < len(lane.tokens), "a row beyond its lane's tokens"
                written[self.slot(lane, position)] += 1
                self.memory[self.slot(lane, position)] = self.kv(lane, position)
        assert all(count == 1 for count in written.values()), "two rows write one slot"
        for lane, n in rows:
            for position in range(lane.num_computed + n):
                assert self.memory[self.slot(lane, position)] == self.kv(lane, position), "a row reads foreign KV"

        token_ids, logprobs, prompt_logprobs = [], {}, []
        for i, (lane, n) in enumerate(rows):
            start, first = lane.start, lane.num_computed
            lane.num_computed += n
            chunk = i - len(step.decode_lanes)
            if start.prompt_logprobs is not None and chunk >= 0:
                reported = range(first + 1, min(lane.num_computed + 1, start.num_prompt_tokens))
                entries = [logprobs_of(lane.tokens, position, start.prompt_logprobs) for position in reported]
                prompt_logprobs.append(PromptLogprobs(chunk, first + 1, entries))
            if lane.num_computed == len(lane.tokens):
                banned = set(start.banned_token_ids)
                token = sample(start.seed, lane.tokens, start.num_prompt_tokens, start.params.min_tokens, banned)
                lane.tokens += (token,)
                if start.params.logprobs is not None:
                    position = len(lane.tokens) - 1
                    logprobs[len(token_ids)] = logprobs_of(lane.tokens, position, start.params.logprobs)
                token_ids.append(token)
                self.num_samples[start.seed] += 1
        return StepOutput(step.incarnation, step.step, token_ids, logprobs, prompt_logprobs)

    def slot(self, lane: Lane, position: int) -> int:
        return lane.table[position // self.block_size] * self.block_size + position % self.block_size

    def kv(self, lane: Lane, position: int) -> tuple:
        return (salt_of(lane.start.seed), *lane.tokens[: position + 1])


def logprobs_of(tokens: tuple[int, ...], position: int, number: int) -> Logprobs:
    return Logprobs([tokens[position]] * (1 + number), [-float(position)] * (1 + number), 1 + position)


class Engine:
    """Scheduler and shards together, with up to two steps between them; checks every move."""

    def __init__(self, **config):
        self.config = SimpleNamespace(**config)
        self.scheduler = Scheduler(**config)
        self.shards = Shards(config["block_size"])
        self.answers: deque[bytes] = deque()
        self.sequences: dict[tuple[int, int], Sequence] = {}
        self.expected: dict[tuple[int, int], tuple[list[int], str]] = {}
        self.updates: dict[tuple[int, int], list[SequenceUpdate]] = {}
        self.aborted: set[tuple[int, int]] = set()
        self.first_starts: dict[int, LaneStart] = {}
        self.num_steps = 0

    def add(self, prompt, *, max_tokens=4, salt=0, variant=0, stops=frozenset({EOS}), **params) -> tuple[int, int]:
        number = len(self.sequences)
        key = (number % 2, number // 2)
        seq = Sequence(
            client=key[0],
            sequence=key[1],
            token_ids=list(prompt),
            params=SamplingParams(max_tokens=max_tokens, **params),
            seed=(number * len(SALTS) + salt) * 2 + variant,
            max_tokens=max_tokens,
            stop_token_ids=stops,
            cache_salt=SALTS[salt],
        )
        assert len(prompt) + max_tokens <= self.config.max_model_len
        self.sequences[key], self.expected[key], self.updates[key] = seq, generate(seq), []
        self.scheduler.add(seq)
        return key

    def abort(self, key: tuple[int, int]) -> None:
        if not self.is_finished(key):
            self.aborted.add(key)
        self.scheduler.abort(*key)
        assert not self.sequences[key].block_table, "an abort frees the blocks at once"

    def is_finished(self, key: tuple[int, int]) -> bool:
        return key in self.aborted or bool(self.updates[key] and self.updates[key][-1].finish_reason)

    def schedule(self) -> StepInput | None:
        running, lanes = list(self.scheduler.running), self.shards.lanes
        ready = [
            seq
            for seq in running
            if len(lanes[seq.lane].tokens) == lanes[seq.lane].num_computed + 1
            and len(lanes[seq.lane].tokens) < seq.num_prompt_tokens + seq.max_tokens
        ]
        needs = sum(lanes[s.lane].num_computed == len(lanes[s.lane].table) * self.config.block_size for s in ready)
        num_free, num_preemptions = self.scheduler.blocks.num_free_blocks, self.scheduler.num_preemptions

        step = self.scheduler.schedule()
        if step is None:
            assert self.answers or not self.scheduler.sequences, "the engine is stuck"
            return None
        self.num_steps += 1
        assert step.incarnation == self.config.incarnation
        assert step.step == self.num_steps
        started = {start.lane for start in step.starts}
        stayed = [seq for seq in self.scheduler.running if seq.lane not in started]
        assert stayed == running[: len(stayed)], "the last come is preempted first"
        assert self.scheduler.num_preemptions - num_preemptions == len(running) - len(stayed)
        assert len(stayed) == len(running) or needs > num_free, "a preemption without need"
        assert step.decode_lanes == [seq.lane for seq in ready if seq in stayed], "a decode row was left out"
        assert len(step.decode_lanes) + sum(step.chunks[1::2]) <= self.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert all(0 <= seq.lane < self.config.max_num_seqs for seq in self.scheduler.running)
        for start in step.starts:
            if start.seed not in self.first_starts:
                assert not self.first_starts or start.seed > max(self.first_starts), "first come, first served"
                self.first_starts[start.seed] = start

        step = msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=StepInput)
        self.answers.append(msgspec.msgpack.encode(self.shards.execute(step)))
        return step

    def update(self) -> None:
        finished = {key for key in self.sequences if self.is_finished(key)}
        output = msgspec.msgpack.decode(self.answers.popleft(), type=StepOutput)
        for client, update in self.scheduler.update(output):
            key = (client, update.sequence)
            assert key not in finished, "an update of a finished sequence"
            self._check(key, update)
            self.updates[key].append(update)

    def _check(self, key: tuple[int, int], update: SequenceUpdate) -> None:
        """Compares with what `generate` foretold."""
        seq, (tokens, reason), index = self.sequences[key], self.expected[key], len(self.updates[key])
        is_last = index == len(tokens) - 1
        assert update.token_ids == [tokens[index]]
        assert update.finish_reason == (reason if is_last else None)
        assert update.stop_token_id == (tokens[-1] if is_last and reason == "stop" else None)
        assert update.num_cached_tokens == self.first_starts[seq.seed].num_computed_tokens
        all_tokens, wanted = (*seq.token_ids[: seq.num_prompt_tokens], *tokens), seq.params.prompt_logprobs
        if seq.params.logprobs is not None:
            position = seq.num_prompt_tokens + index
            assert update.logprobs == [logprobs_of(all_tokens, position, seq.params.logprobs)]
        if wanted is not None:
            reported = range(1, seq.num_prompt_tokens) if index == 0 else ()
            assert update.prompt_logprobs == [logprobs_of(all_tokens, i, wanted) for i in reported]
            assert update.num_cached_tokens == 0
        assert update.num_cached_tokens < seq.num_prompt_tokens
        assert update.num_cached_tokens % self.config.block_size == 0
        assert self.config.enable_prefix_caching or update.num_cached_tokens == 0

    def drain(self, depth: int) -> None:
        """Runs until all are finished, with `depth` steps in flight at most."""
        while self.scheduler.sequences or self.answers:
            if len(self.answers) >= depth or not self.schedule():
                self.update()
            self.scheduler.check_integrity()
        self.check_drained()

    def check_drained(self) -> None:
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert not self.scheduler.in_flight
        assert self.scheduler.blocks.num_free_blocks == self.config.num_blocks
        # the first of those present gets a token's work from every step, whatever the others do
        most = sum(seq.num_prompt_tokens + seq.max_tokens + 4 for seq in self.sequences.values())
        assert self.num_steps <= most, "a sequence starved"
        for key in self.sequences.keys() - self.aborted:
            tokens, reason = self.expected[key]
            assert [update.token_ids[0] for update in self.updates[key]] == tokens
            wasted = self.shards.num_samples[self.sequences[key].seed] - len(tokens)
            assert wasted <= (reason == "stop"), "wasted rows"


def tiny_digest(data: bytes) -> bytes:
    """Collides all the time."""
    return bytes((zlib.crc32(data) % 3,))


@st.composite
def engine_configs(draw):
    max_model_len, block_size = draw(st.integers(8, 32)), draw(st.integers(1, 4))
    least = -(-max_model_len // block_size)
    max_num_seqs = draw(st.integers(1, 5))
    return {
        "num_blocks": draw(st.one_of(st.just(least), st.integers(least, 3 * least))),
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(max_num_seqs, max_num_seqs + 24)),
        "max_model_len": max_model_len,
        "enable_prefix_caching": draw(st.booleans()),
        "incarnation": draw(st.integers(0, 3)),
    }


class SchedulerMachine(RuleBasedStateMachine):
    """Moves in any order, none to two steps in flight."""

    digest = staticmethod(block_manager.xxhash.xxh3_128_digest)

    @initialize(config=engine_configs(), collide=st.booleans())
    def start(self, config, collide):
        block_manager.xxhash.xxh3_128_digest = tiny_digest if collide else self.digest
        self.engine = Engine(**config)

    @rule(data=st.data(), number=st.integers(1, 4))
    def add(self, data, number):
        for _ in range(number):
            longest = self.engine.config.max_model_len - 1
            stem = STEM * 2
            prompt = stem[: data.draw(st.integers(0, longest))]
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
            )

    @rule(moves=st.lists(st.booleans(), min_size=1, max_size=30))
    def move(self, moves):
        for forward in moves:
            if forward and len(self.engine.answers) < 2:
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
        if hasattr(self, "engine"):
            self.engine.drain(depth=len(self.engine.sequences) % 2 + 1)
            block_manager.xxhash.xxh3_128_digest = self.digest


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=12, deadline=None)
