"""Continuous batching under one token budget.

`schedule()` decides a step, `update()` takes its result in; the driver lets two steps lie between, or three short ones,
so that the shards never wait for a decision. There is no prefill phase and no decode phase: a step gives each running
sequence that decodes its one token, then fills the budget with chunks of prompts, those of running ones first.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from rayllm.config import blocks_for
from rayllm.messages.sequences import SequenceUpdate
from rayllm.messages.step import LaneStart, Logprobs, NewBlock, Prune, StepInput, StepOutput, row
from rayllm.scheduling.block_manager import BlockManager
from rayllm.scheduling.pruning import MAX_PRUNES, PruningPolicy
from rayllm.scheduling.sequence import BlockTable, Sequence, SequenceStatus


@dataclass(eq=False, slots=True)
class Plan:
    """A step under construction."""

    rows: list[int] = field(default_factory=list)
    """The numbers of `StepInput.rows`; every KV group here keeps every token."""
    sequences: list[Sequence] = field(default_factory=list)
    """The sequence of each row."""
    sampled: list[Sequence] = field(default_factory=list)
    """The sequences that get a token, in order of rows."""
    starts: list[LaneStart] = field(default_factory=list)
    new_blocks: list[NewBlock] = field(default_factory=list)
    pruned: list[int] = field(default_factory=list)
    """Rows whose prompts are complete with this step, and pruned."""

    def add_chunk(self, seq: Sequence, num_tokens: int) -> None:
        """Adds the row of the next `num_tokens` tokens of `seq`, which count as computed from here on. It samples if no
        known or pending token is left."""
        slots = [(seq.kv_len, seq.kv_len + num_tokens)] * len(seq.block_tables)
        is_last = seq.num_computed_tokens + num_tokens == seq.num_tokens
        self.rows += row(seq.lane, seq.num_computed_tokens, num_tokens, int(is_last), slots)
        self.sequences.append(seq)
        seq.num_computed_tokens += num_tokens
        if is_last:
            self.sampled.append(seq)
            seq.num_pending += 1


@dataclass(frozen=True)
class StepInFlight:
    """A step that was sent and is not answered yet."""

    step_id: int
    sequences: list[Sequence]
    """The sequence of each row."""
    sampled: list[Sequence]
    """The sequences that get a token, in order of rows."""


class Scheduler:
    """Owns all sequences of one engine: first come, first served; the last come is preempted first.

    `num_blocks` are the sizes of the KV groups' pools. Raises `ValueError` when a pool cannot hold one sequence of
    `max_model_len` tokens, or when one step cannot hold one token of every running sequence.
    """

    def __init__(
        self,
        *,
        num_blocks: SequenceOf[int],
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        incarnation: int = 0,
        pruning: PruningPolicy | None = None,
    ):
        if min(num_blocks) * block_size < max_model_len:
            raise ValueError("the KV cache must hold at least one sequence of max_model_len tokens")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        self.pools = [
            BlockManager(number, block_size, enable_prefix_caching, group) for group, number in enumerate(num_blocks)
        ]
        """One for each KV group."""
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.incarnation = incarnation
        self.pruning = pruning
        self.sequences: dict[tuple[int, int], Sequence] = {}
        """All that are not finished, by (client_id, sequence_id)."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """They are in order of arrival, all of them earlier than those that wait."""
        self.in_flight: deque[StepInFlight] = deque()
        self.num_prefilled_tokens = 0
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.num_preemptions = 0
        self.num_pruned_tokens = 0
        self.num_pruned_blocks = 0
        self.max_num_seqs = max_num_seqs
        self._free_lanes = list(reversed(range(max_num_seqs)))
        self._num_steps = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, in the KV group that has fewest."""
        return min(pool.num_free_blocks for pool in self.pools)

    def add(self, seq: Sequence) -> None:
        """Takes in a sequence, which waits until there is room."""
        seq.block_tables = [BlockTable() for _ in self.pools]
        if seq.wants_prompt_logprobs:
            seq.prompt_logprobs = [None] * seq.num_prompt_tokens
        if self.pruning is not None:
            seq.num_kept = self._num_kept(seq, self.pruning)
        self.sequences[seq.client_id, seq.sequence_id] = seq
        self.waiting.append(seq)

    def abort_all(self, client_id: int) -> None:
        """Aborts whatever the client has asked for."""
        for owner, sequence_id in list(self.sequences):
            if owner == client_id:
                self.abort(client_id, sequence_id)

    def abort(self, client_id: int, sequence_id: int) -> None:
        """Frees the sequence's blocks at once. One that is unknown (it just finished) is ignored."""
        if seq := self.sequences.get((client_id, sequence_id)):
            self._finish(seq)

    def _num_kept(self, seq: Sequence, pruning: PruningPolicy) -> int:
        """0 also when the cache can never hold the prompt and, beside it, what is kept and said."""
        kept = pruning.num_kept(seq.num_prompt_tokens, seq.params.snapkv_limit)
        size = self.block_size
        peak = blocks_for(seq.num_prompt_tokens, size) + blocks_for(kept + seq.max_tokens, size)
        return kept if all(peak <= pool.num_blocks for pool in self.pools) else 0

    # ---- schedule

    def schedule(self) -> StepInput | None:
        """The next step; None when there is nothing to do, or nothing before a step in flight is answered."""
        plan = Plan()
        prefills = self._add_decodes(plan)
        num_decodes = len(plan.sequences)
        budget = self.max_num_batched_tokens - num_decodes
        for seq in prefills:
            if seq.status is SequenceStatus.RUNNING:
                budget -= self._add_chunk(plan, seq, budget)
        while budget and (admitted := self._admit()):
            plan.starts.append(_lane_start(admitted))
            budget -= self._add_chunk(plan, admitted, budget)
        if not plan.sequences:
            return None
        prunes = [self._prune(index, plan.sequences[index]) for index in plan.pruned]
        self._num_steps += 1
        self.in_flight.append(StepInFlight(self._num_steps, plan.sequences, plan.sampled))
        return StepInput(
            incarnation=self.incarnation,
            step_id=self._num_steps,
            starts=plan.starts,
            new_blocks=plan.new_blocks,
            rows=array("i", plan.rows).tobytes(),
            num_decodes=num_decodes,
            prunes=prunes,
        )

    def _add_decodes(self, plan: Plan) -> list[Sequence]:
        """Adds a row for each running sequence with one token to compute, with a slot for it; preempts for want of
        blocks. Returns the running sequences that have more.

        Hundreds of sequences pass here in every step, so that their properties and `row` are spelled out.
        """
        prefills: list[Sequence] = []
        rows, block_size, num_groups = plan.rows, self.block_size, len(self.pools)
        for seq in tuple(self.running):
            if seq.status is not SequenceStatus.RUNNING:  # preempted in this very loop
                continue
            position = seq.num_computed_tokens
            if position + 1 != len(seq.token_ids) + seq.num_pending or (seq.num_kept and seq.awaits_pruning):
                prefills.append(seq)
            elif position + 1 < seq.num_prompt_tokens + seq.max_tokens:  # else all its tokens are pending
                slot = position - seq.num_pruned
                if not slot % block_size and not self._grow(plan, seq):
                    break
                rows += (seq.lane, position, 1, 1, *(slot, slot + 1) * num_groups)
                plan.sequences.append(seq)
                seq.num_pending += 1
                seq.num_computed_tokens = position + 1
                if not (position + 1) % block_size:
                    self._commit(seq)
        plan.sampled += plan.sequences
        return prefills

    def _grow(self, plan: Plan, seq: Sequence) -> bool:
        """Gives `seq` room for its next token in every KV group; False if it had to be preempted itself."""
        for group, pool in enumerate(self.pools):
            if pool.is_full(seq):
                while not pool.num_free_blocks:
                    self._preempt(self.running[-1])
                    if seq.status is not SequenceStatus.RUNNING:
                        return False
                column = len(pool.table(seq).blocks)
                plan.new_blocks.append(NewBlock(group, seq.lane, column, pool.append(seq)))
        return True

    def _add_chunk(self, plan: Plan, seq: Sequence, budget: int) -> int:
        """Adds the chunk of `seq` that the budget has room for; returns its size, perhaps 0. A prompt's last chunk has
        the whole window that prunes it, and waits while the step prunes `MAX_PRUNES` others."""
        size = min(seq.num_chunkable, budget)
        if self.pruning is not None and seq.awaits_pruning:
            window, rest = max(self.pruning.window, 1), seq.num_chunkable - size
            if rest < window and (rest or len(plan.pruned) == MAX_PRUNES):
                size = max(seq.num_chunkable - window, 0)
            elif not rest:
                plan.pruned.append(len(plan.sequences))
        if size:
            self.num_prefilled_tokens += size
            plan.add_chunk(seq, size)
            self._commit(seq)  # from here on, its blocks can be hit by those admitted next
        return size

    def _prune(self, index: int, seq: Sequence) -> Prune:
        """The prompt of `seq`, whose row has this index, is computed when this step is: its blocks are free for the
        next."""
        for pool in self.pools:
            self.num_pruned_blocks += len(pool.table(seq).blocks) - blocks_for(seq.num_kept, self.block_size)
            pool.prune(seq)
        seq.num_pruned = seq.num_prompt_tokens - seq.num_kept
        self.num_pruned_tokens += seq.num_pruned
        return Prune(index, seq.num_kept, [table.blocks.copy() for table in seq.block_tables])

    def _admit(self) -> Sequence | None:
        """Lets the first waiting sequence run if its blocks can be had, and one more for each that runs."""
        if not self.waiting or not self._free_lanes or self.waiting[0].num_pending:
            return None
        seq = self.waiting[0]
        hits = [pool.find_cached(seq, self.pruning.window if self.pruning else 0) for pool in self.pools]
        num_hits = min(map(len, hits))  # the longest prefix that every KV group can serve
        hits = [hit[:num_hits] for hit in hits]
        num_blocks, num_private = blocks_for(seq.num_tokens, self.block_size), 0
        if seq.num_kept:
            num_blocks = blocks_for(seq.num_prompt_tokens, self.block_size)
            num_private = blocks_for(seq.num_kept + seq.num_tokens - seq.num_prompt_tokens, self.block_size)
        needed = num_blocks + num_private + len(self.running)
        if not all(pool.can_allocate(needed, hit) for pool, hit in zip(self.pools, hits, strict=True)):
            return None
        self.waiting.popleft()
        for pool, hit in zip(self.pools, hits, strict=True):
            pool.allocate(seq, num_blocks, hit, num_private)
        seq.num_computed_tokens = num_hits * self.block_size
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = seq.num_computed_tokens
            self.num_cached_tokens += seq.num_cached_tokens
            seq.queue_s = time.monotonic() - seq.arrival
        seq.lane = self._free_lanes.pop()
        seq.status = SequenceStatus.RUNNING
        self.running.append(seq)
        return seq

    def _commit(self, seq: Sequence) -> None:
        for pool in self.pools:
            pool.commit(seq)

    def _preempt(self, seq: Sequence) -> None:
        """The sequence gives all its blocks back and waits, first in the queue, to be computed again."""
        self._leave(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._free_lanes.append(seq.lane)
        for pool in self.pools:
            pool.release(seq)
        seq.num_computed_tokens = seq.num_pruned = 0

    # ---- update

    def update(self, output: StepOutput) -> list[tuple[int, SequenceUpdate]]:
        """Takes in the answer to the oldest step in flight; returns (client_id, update) of sequences it moved."""
        step = self.in_flight.popleft()
        answered = (output.incarnation, output.step_id)
        assert answered == (self.incarnation, step.step_id), "an answer out of turn"
        assert len(output.token_ids) == len(step.sampled), "one token for each row that samples"
        for part in output.prompt_logprobs:
            seq = step.sequences[part.row]
            if seq.prompt_logprobs:
                seq.prompt_logprobs[part.start : part.start + len(part.entries)] = part.entries
        updates = []
        for i, (seq, token_id) in enumerate(zip(step.sampled, output.token_ids, strict=True)):
            seq.num_pending -= 1
            if seq.status is SequenceStatus.FINISHED:  # it ended, or was aborted, while this row was computed
                continue
            updates.append((seq.client_id, self._append(seq, token_id, output.logprobs.get(i), output.ends.get(i))))
        self.num_output_tokens += len(updates)
        return updates

    def _append(
        self, seq: Sequence, token_id: int, logprobs: Logprobs | None, grammar_end: str | None
    ) -> SequenceUpdate:
        seq.token_ids.append(token_id)
        num_tokens = len(seq.token_ids)
        if not num_tokens % self.block_size and seq.status is SequenceStatus.RUNNING:
            self._commit(seq)
        num_output_tokens = num_tokens - seq.num_prompt_tokens
        stopped = token_id in seq.stop_token_ids and num_output_tokens >= seq.params.min_tokens
        finish_reason = "stop" if stopped else grammar_end
        if finish_reason is None and num_output_tokens >= seq.max_tokens:
            finish_reason = "length"
        if finish_reason:
            self._finish(seq)
        prompt_logprobs: list[Logprobs] = []
        if seq.prompt_logprobs:
            prompt_logprobs = [entry for entry in seq.prompt_logprobs if entry is not None]
            seq.prompt_logprobs = []
        return SequenceUpdate(
            sequence_id=seq.sequence_id,
            token_ids=[token_id],
            finish_reason=finish_reason,
            stop_token_id=token_id if stopped else None,
            num_cached_tokens=seq.num_cached_tokens,
            num_pruned_tokens=seq.num_prompt_tokens - seq.num_kept if seq.num_kept else 0,
            queue_s=seq.queue_s,
            logprobs=[logprobs] if logprobs else [],
            prompt_logprobs=prompt_logprobs,
        )

    def _finish(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self._leave(seq)
        else:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        del self.sequences[seq.client_id, seq.sequence_id]

    def check_integrity(self) -> None:
        """Raises AssertionError if sequences, queues, lanes and blocks disagree."""
        assert set(self.sequences.values()) == {*self.running, *self.waiting}, "queues"
        lanes = [seq.lane for seq in self.running] + self._free_lanes
        assert sorted(lanes) == list(range(self.max_num_seqs)), "lanes"
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING, "running"
            assert seq.num_computed_tokens <= seq.num_tokens, "computed"
            assert not seq.num_pending or seq.num_tokens - seq.num_computed_tokens <= 1, "pending rows"
        for seq in self.waiting:
            assert seq.status is SequenceStatus.WAITING, "waiting"
            assert not any(table.blocks for table in seq.block_tables), "blocks of a waiting sequence"
            assert not seq.num_computed_tokens, "computed tokens of a waiting sequence"
        for pool in self.pools:
            pool.check_integrity(self.running)


def _lane_start(seq: Sequence) -> LaneStart:
    return LaneStart(
        lane=seq.lane,
        token_ids=seq.token_ids.tobytes(),
        num_prompt_tokens=seq.num_prompt_tokens,
        block_tables=[table.blocks.copy() for table in seq.block_tables],
        params=seq.params,
        seed=seq.seed,
        banned_token_ids=sorted(seq.stop_token_ids) if seq.params.min_tokens else [],
        prompt_logprobs=seq.params.prompt_logprobs if seq.wants_prompt_logprobs else None,
        grammar=seq.grammar,
    )
