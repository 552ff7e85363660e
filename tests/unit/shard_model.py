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
from typing import NamedTuple

import msgspec

from rayllm.messages.sequences import SequenceUpdate
from rayllm.messages.step import LaneStart, Logprobs, PromptLogprobs, Prune, StepInput, StepOutput
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
    tables: list[list[int]]
    """Its blocks in each KV group."""
    num_computed: int = 0
    kept: list[int] | None = None
    """Positions of the prompt that a pruned lane has KV of, by slot."""

    def positions(self, end: int) -> list[int]:
        """The token position that each of the lane's slots holds, in order, when all before `end` is computed."""
        if self.kept is None:
            return list(range(end))
        return self.kept + list(range(self.start.num_prompt_tokens, end))


def kept_of(prompt: tuple[int, ...], number: int, window: int) -> list[int]:
    """The last `window` positions, and others that the prompt decides."""
    rest = sorted(range(len(prompt) - window), key=lambda i: zlib.crc32(bytes((i, *(t % 256 for t in prompt)))))
    return sorted([*rest[: number - window], *range(len(prompt) - window, len(prompt))])


class Row(NamedTuple):
    """The numbers of one row, as `StepInput.rows` has them."""

    lane: int
    position: int
    num_tokens: int
    num_samples: int
    slots: tuple[tuple[int, int], ...]
    """(first_slot, kv_len) in each KV group."""


def rows_of(step: StepInput, num_groups: int = 1) -> list[Row]:
    numbers = array("i", step.rows)
    width = 4 + 2 * num_groups
    assert len(numbers) % width == 0, "whole rows"
    rows = [numbers[start : start + width].tolist() for start in range(0, len(numbers), width)]
    return [Row(*row[:4], tuple(zip(row[4::2], row[5::2], strict=True))) for row in rows]


def decode_lanes(step: StepInput, num_groups: int = 1) -> list[int]:
    return [row.lane for row in rows_of(step, num_groups)[: step.num_decodes]]


def chunk_sizes(step: StepInput, num_groups: int = 1) -> list[int]:
    return [row.num_tokens for row in rows_of(step, num_groups)[step.num_decodes :]]


@dataclass
class Shards:
    """Knows only what the messages say, and checks that rows say what a count of the lanes' tokens would. The KV of a
    token is the salt and all tokens up to it."""

    block_size: int
    num_groups: int
    window: int = 0
    lanes: dict[int, Lane] = field(default_factory=dict)
    memory: dict[tuple[int, int], tuple] = field(default_factory=dict)
    """By (KV group, slot)."""
    num_samples: Counter[int] = field(default_factory=Counter)
    """By seed, which no two sequences of a test share."""

    def execute(self, step: StepInput) -> StepOutput:
        rows = rows_of(step, self.num_groups)
        firsts = {row.lane: row.position for row in rows}
        assert len(firsts) == len(rows), "a lane has one row in a step"
        for start in step.starts:
            tables = [list(table) for table in start.block_tables]
            self.lanes[start.lane] = Lane(start, tuple(array("i", start.token_ids)), tables, firsts.get(start.lane, -1))
        for new in step.new_blocks:
            table = self.lanes[new.lane].tables[new.group]
            assert new.column == len(table), "a block behind the last"
            table.append(new.block)
        assert len(step.prunes) <= scheduler.MAX_PRUNES, "room for so many windows"

        written: Counter[tuple[int, int]] = Counter()
        for i, row in enumerate(rows):
            lane = self.lanes[row.lane]
            if lane.num_computed < 0:  # it was admitted, but the step had no room for it
                lane.num_computed = row.position
            end = row.position + row.num_tokens
            assert (i < step.num_decodes) <= (row.num_tokens == 1 <= row.num_samples), "decode rows come first"
            assert row.num_tokens >= 1
            assert row.position == lane.num_computed, "tokens are computed in order"
            assert end <= len(lane.tokens), "a row beyond its lane's tokens"
            assert row.num_samples == (end == len(lane.tokens)), "the last token is sampled from"
            positions = lane.positions(end)
            assert set(row.slots) == {(len(positions) - row.num_tokens, len(positions))}, "slots"
            for group in range(self.num_groups):
                for index, position in list(enumerate(positions))[-row.num_tokens :]:
                    written[self.slot(lane, group, index)] += 1
                    self.memory[self.slot(lane, group, index)] = self.kv(lane, position)
        assert all(count == 1 for count in written.values()), "two rows write one slot"
        for row in rows:
            lane = self.lanes[row.lane]
            for group in range(self.num_groups):
                for index, position in enumerate(lane.positions(row.position + row.num_tokens)):
                    found = self.memory.get(self.slot(lane, group, index))
                    assert found == self.kv(lane, position), "a row reads foreign KV"

        token_ids, logprobs, prompt_logprobs = [], {}, []
        for i, row in enumerate(rows):
            lane = self.lanes[row.lane]
            start, lane.num_computed = lane.start, row.position + row.num_tokens
            if start.prompt_logprobs is not None and i >= step.num_decodes:
                reported = range(row.position + 1, min(lane.num_computed + 1, start.num_prompt_tokens))
                entries = [logprobs_of(lane.tokens, position, start.prompt_logprobs) for position in reported]
                prompt_logprobs.append(PromptLogprobs(i, row.position + 1, entries))
            if row.num_samples:
                is_early = len(lane.tokens) - start.num_prompt_tokens < start.params.min_tokens
                token = sample(start.seed, lane.tokens, set(start.banned_token_ids) if is_early else set())
                lane.tokens += (token,)
                if start.params.logprobs is not None:
                    position = len(lane.tokens) - 1
                    logprobs[len(token_ids)] = logprobs_of(lane.tokens, position, start.params.logprobs)
                token_ids.append(token)
                self.num_samples[start.seed] += 1
        for prune in step.prunes:
            self.prune(self.lanes[rows[prune.row].lane], prune, rows[prune.row].num_tokens)
        return StepOutput(step.incarnation, step.step_id, token_ids, logprobs, prompt_logprobs)

    def prune(self, lane: Lane, prune: Prune, chunk_size: int) -> None:
        """Copies what is kept; the blocks it goes to are in no other table."""
        length = lane.start.num_prompt_tokens
        assert lane.kept is None, "a prompt is pruned once"
        assert lane.num_computed == length, "a prompt is pruned when it is computed"
        assert chunk_size >= self.window, "the window's queries are in the last chunk"
        for old, new in zip(lane.tables, prune.block_tables, strict=True):
            assert not set(new) & set(old), "other blocks than the prompt's"
        kept = kept_of(lane.tokens[:length], prune.num_kept, self.window)
        groups = range(self.num_groups)
        content = [[self.memory[self.slot(lane, group, position)] for position in kept] for group in groups]
        lane.tables, lane.kept = [list(table) for table in prune.block_tables], kept
        for group in groups:
            for index, kv in enumerate(content[group]):
                self.memory[self.slot(lane, group, index)] = kv

    def slot(self, lane: Lane, group: int, index: int) -> tuple[int, int]:
        block = lane.tables[group][index // self.block_size]
        return group, block * self.block_size + index % self.block_size

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
        self.num_groups = len(config["num_blocks"])
        self.shards = Shards(config["block_size"], self.num_groups, pruning.window if pruning else 0)
        self.answers: deque[bytes] = deque()
        self.sequences: dict[tuple[int, int], Sequence] = {}
        self.expected: dict[tuple[int, int], tuple[list[int], str]] = {}
        self.updates: dict[tuple[int, int], list[SequenceUpdate]] = {}
        self.aborted: set[tuple[int, int]] = set()
        self.num_cached: dict[int, int | None] = {}
        """Tokens that were there already at the first admission, by seed; None if its window had to wait."""
        self.num_steps = 0
        self.depth = 0
        """Most steps that were in flight at once."""

    def add(self, prompt, *, max_tokens=4, salt=0, variant=0, stops=frozenset({EOS}), **params):
        """Returns the key of the sequence: (client, sequence)."""
        number = len(self.sequences)
        key = (number % 2, number // 2)
        seq = Sequence(
            client_id=key[0],
            sequence_id=key[1],
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
        assert not any(table.blocks for table in self.sequences[key].block_tables), "an abort frees the blocks at once"

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
        lengths = [(lanes[s.lane].tables, len(lanes[s.lane].positions(lanes[s.lane].num_computed))) for s in ready]
        needs = [
            sum(length == len(tables[group]) * block_size for tables, length in lengths)
            for group in range(self.num_groups)
        ]
        num_free = [group.num_free_blocks for group in self.scheduler.pools]
        num_preemptions = self.scheduler.num_preemptions

        step = self.scheduler.schedule()
        seeds = [seq.seed for seq in (*self.scheduler.running, *self.scheduler.waiting)]
        assert seeds == sorted(seeds), "first come, first served"
        if step is None:
            assert self.answers or not self.scheduler.sequences, "the engine is stuck"
            return None
        self.num_steps += 1
        assert step.incarnation == self.config.incarnation
        assert step.step_id == self.num_steps
        started = {start.lane for start in step.starts}
        stayed = [seq for seq in self.scheduler.running if seq.lane not in started]
        assert stayed == running[: len(stayed)], "the last come is preempted first"
        assert self.scheduler.num_preemptions - num_preemptions == len(running) - len(stayed)
        is_short = any(need > free for need, free in zip(needs, num_free, strict=True))
        assert len(stayed) == len(running) or is_short, "a preemption without need"
        rows = rows_of(step, self.num_groups)
        decodes = [row.lane for row in rows[: step.num_decodes]]
        assert decodes == [seq.lane for seq in ready if seq in stayed], "a decode row was left out"
        assert sum(row.num_tokens for row in rows) <= self.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert all(0 <= seq.lane < self.config.max_num_seqs for seq in self.scheduler.running)
        firsts = {row.lane: row.position for row in rows}
        for start in step.starts:  # a window that does not fit into this step has no row in it
            self.num_cached.setdefault(start.seed, firsts.get(start.lane))

        step = msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=StepInput)
        self.answers.append(msgspec.msgpack.encode(self.shards.execute(step)))
        self.depth = max(self.depth, len(self.answers))
        return step

    def update(self) -> None:
        finished = {key for key in self.sequences if self.is_finished(key)}
        output = msgspec.msgpack.decode(self.answers.popleft(), type=StepOutput)
        for client, update in self.scheduler.update(output):
            key = (client, update.sequence_id)
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
        assert self.num_cached[seq.seed] in (None, update.num_cached_tokens)
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
        assert [group.num_free_blocks for group in self.scheduler.pools] == self.config.num_blocks
        # the first of those present gets a token's work from every step, whatever the others do
        most = sum(seq.num_prompt_tokens + seq.max_tokens + 4 for seq in self.sequences.values())
        assert self.num_steps <= most, "a sequence starved"
        for key in self.sequences.keys() - self.aborted:
            tokens, reason = self.expected[key]
            assert [update.token_ids[0] for update in self.updates[key]] == tokens
            wasted = self.shards.num_samples[self.sequences[key].seed] - len(tokens)
            assert wasted <= (self.depth - 1) * (reason == "stop"), "wasted rows"
