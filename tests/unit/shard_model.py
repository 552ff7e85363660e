"""Brute-force model of the shards, and an engine of scheduler and model that checks every move.

A row must read, through its block table, the KV of its own tokens and nothing else: that shows at once a block used
twice, a wrong hit, a stale block and a wasted row that does harm. What a pruned lane keeps is a function of its prompt.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import msgspec

from rayllm.messages.step import (
    LaneStart,
    Logprobs,
    PromptLogprobs,
    Prune,
    SequenceUpdate,
    StepInput,
    StepOutput,
)
from rayllm.sampling_params import SamplingParams
from rayllm.scheduling import scheduler
from rayllm.scheduling.scheduler import Scheduler
from rayllm.scheduling.sequence import Sequence

EOS = 0
SALTS = (None, "salt", "pepper")


def sample(seed: int, token_ids: tuple[int, ...], banned: set[int]) -> int:
    """A pure function of what the model would see; one bit of the seed counts, so that outputs coincide too."""
    draw = zlib.crc32(bytes((seed % 2, *(token % 256 for token in token_ids)))) % 12
    token = EOS if draw == 0 else 1 + draw % 3
    while token in banned:
        token = (token + 1) % 4
    return token


def generate(seq: Sequence) -> tuple[list[int], str]:
    """The output of `seq` and its finish reason, computed alone."""
    tokens = tuple(seq.token_ids)
    while True:
        is_early = len(tokens) - seq.num_prompt_tokens < seq.params.min_tokens
        token = sample(seq.seed, tokens, set(seq.stop_token_ids) if is_early else set())
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
    kept: list[int] | None = None
    """Positions of the prompt that a pruned lane has KV of, by slot."""

    def positions(self, end: int) -> list[int]:
        """Of the lane's slots, in order, when all before `end` is computed."""
        if self.kept is None:
            return list(range(end))
        return self.kept + list(range(self.start.num_prompt_tokens, end))


def kept_of(prompt: tuple[int, ...], number: int, window: int) -> list[int]:
    """The last `window` positions, and others that the prompt decides."""
    rest = sorted(range(len(prompt) - window), key=lambda i: zlib.crc32(bytes((i, *(t % 256 for t in prompt)))))
    return sorted([*rest[: number - window], *range(len(prompt) - window, len(prompt))])


@dataclass
class Shards:
    """Knows only what the messages say. The KV of a token is the salt and all tokens up to it."""

    block_size: int
    window: int = 0
    lanes: dict[int, Lane] = field(default_factory=dict)
    memory: dict[int, tuple] = field(default_factory=dict)
    num_samples: Counter[int] = field(default_factory=Counter)
    """By seed, which no two sequences of a test share."""

    def execute(self, step: StepInput) -> StepOutput:
        for start in step.starts:
            tokens, table = tuple(array("i", start.token_ids)), list(start.block_table)
            self.lanes[start.lane] = Lane(start, tokens, table, start.num_computed_tokens)
        for lane, block in zip(step.new_blocks[::2], step.new_blocks[1::2], strict=True):
            self.lanes[lane].table.append(block)
        chunks = list(zip(step.chunks[::2], step.chunks[1::2], strict=True))
        rows = [(self.lanes[lane], n) for lane, n in [(lane, 1) for lane in step.decode_lanes] + chunks]
        assert len({id(lane) for lane, _ in rows}) == len(rows), "a lane has one row in a step"
        assert len(step.prunes) <= scheduler.MAX_PRUNES, "room for so many windows"

        written: Counter[int] = Counter()
        for lane, n in rows:
            assert n >= 1
            end = lane.num_computed + n
            assert end <= len(lane.tokens), "a row beyond its lane's tokens"
            for index, position in list(enumerate(lane.positions(end)))[-n:]:
                written[self.slot(lane, index)] += 1
                self.memory[self.slot(lane, index)] = self.kv(lane, position)
        assert all(count == 1 for count in written.values()), "two rows write one slot"
        for lane, n in rows:
            for index, position in enumerate(lane.positions(lane.num_computed + n)):
                found = self.memory.get(self.slot(lane, index))
                assert found == self.kv(lane, position), "a row reads foreign KV"

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
                is_early = len(lane.tokens) - start.num_prompt_tokens < start.params.min_tokens
                token = sample(start.seed, lane.tokens, set(start.banned_token_ids) if is_early else set())
                lane.tokens += (token,)
                if start.params.logprobs is not None:
                    position = len(lane.tokens) - 1
                    logprobs[len(token_ids)] = logprobs_of(lane.tokens, position, start.params.logprobs)
                token_ids.append(token)
                self.num_samples[start.seed] += 1
        sizes = {id(self.lanes[lane]): n for lane, n in chunks}
        for prune in step.prunes:
            self.prune(self.lanes[prune.lane], prune, sizes[id(self.lanes[prune.lane])])
        return StepOutput(step.incarnation, step.step, token_ids, logprobs, prompt_logprobs)

    def prune(self, lane: Lane, prune: Prune, chunk_size: int) -> None:
        """Copies what is kept; the blocks it goes to are in no other table."""
        length = lane.start.num_prompt_tokens
        assert lane.kept is None, "a prompt is pruned once"
        assert lane.num_computed == length, "a prompt is pruned when it is computed"
        assert chunk_size >= self.window, "the window's queries are in the last chunk"
        assert not set(prune.block_table) & set(lane.table), "other blocks than the prompt's"
        kept = kept_of(lane.tokens[:length], prune.num_kept, self.window)
        content = [self.memory[self.slot(lane, position)] for position in kept]
        lane.table, lane.kept = list(prune.block_table), kept
        for index, kv in enumerate(content):
            self.memory[self.slot(lane, index)] = kv

    def slot(self, lane: Lane, index: int) -> int:
        return lane.table[index // self.block_size] * self.block_size + index % self.block_size

    def kv(self, lane: Lane, position: int) -> tuple:
        return (salt_of(lane.start.seed), *lane.tokens[: position + 1])


def logprobs_of(tokens: tuple[int, ...], position: int, number: int) -> Logprobs:
    return Logprobs([tokens[position]] * (1 + number), [-float(position)] * (1 + number), 1 + position)


class Engine:
    """Scheduler and shards together, with steps between them; checks every move."""

    def __init__(self, **config):
        self.config = SimpleNamespace(**config)
        self.scheduler = Scheduler(**config)
        pruning = config.get("pruning")
        self.shards = Shards(config["block_size"], pruning.window if pruning else 0)
        self.answers: deque[bytes] = deque()
        self.sequences: dict[tuple[int, int], Sequence] = {}
        self.expected: dict[tuple[int, int], tuple[list[int], str]] = {}
        self.updates: dict[tuple[int, int], list[SequenceUpdate]] = {}
        self.aborted: set[tuple[int, int]] = set()
        self.first_starts: dict[int, LaneStart] = {}
        self.num_steps = 0
        self.depth = 0
        """Most steps that were in flight at once."""

    def add(self, prompt, *, max_tokens=4, salt=0, variant=0, stops=frozenset({EOS}), **params):
        """Returns the key of the sequence: (client, sequence)."""
        number = len(self.sequences)
        key = (number % 2, number // 2)
        seq = Sequence(
            client=key[0],
            sequence=key[1],
            token_ids=array("i", prompt),
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
            and bool(seq.num_kept) == (lanes[seq.lane].kept is not None)
        ]
        block_size = self.config.block_size
        lengths = [len(lanes[seq.lane].positions(lanes[seq.lane].num_computed)) for seq in ready]
        tables = [len(lanes[seq.lane].table) for seq in ready]
        needs = sum(length == table * block_size for length, table in zip(lengths, tables, strict=True))
        num_free, num_preemptions = self.scheduler.blocks.num_free_blocks, self.scheduler.num_preemptions

        step = self.scheduler.schedule()
        seeds = [seq.seed for seq in (*self.scheduler.running, *self.scheduler.waiting)]
        assert seeds == sorted(seeds), "first come, first served"
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
                self.first_starts[start.seed] = start

        step = msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=StepInput)
        self.answers.append(msgspec.msgpack.encode(self.shards.execute(step)))
        self.depth = max(self.depth, len(self.answers))
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
            assert wasted <= (self.depth - 1) * (reason == "stop"), "wasted rows"
