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

from rayllm.messages.sequences import SequenceUpdate
from rayllm.messages.step import LaneStart, Logprobs, NewBlock, Prune, StepInput, StepOutput
from rayllm.scheduling.block_manager import BlockManager
from rayllm.scheduling.pruning import MAX_PRUNES, PruningPolicy
from rayllm.scheduling.sequence import BlockTable, Sequence, SequenceStatus


@dataclass(eq=False, slots=True)
class Step:
    """A step, from its first row until it is answered."""

    rows: list[int] = field(default_factory=list)
    """The numbers of `StepInput.rows`; every KV group here keeps every token."""
    sequences: list[Sequence] = field(default_factory=list)
    """The sequence of each row."""
    sampled: list[Sequence] = field(default_factory=list)
    """Those that get a token, in order of rows."""
    num_decodes: int = 0
    starts: list[LaneStart] = field(default_factory=list)
    new_blocks: list[NewBlock] = field(default_factory=list)
    pruned: list[int] = field(default_factory=list)
    """Rows whose prompts are complete with this step, and pruned."""
    step_id: int = 0

    def add_chunk(self, seq: Sequence, num_tokens: int) -> None:
        """Adds the row of the next `num_tokens` tokens of `seq`, which count as computed from here on. It samples if no
        known or pending token is left."""
        slots = seq.kv_len, seq.kv_len + num_tokens
        is_last = seq.num_computed_tokens + num_tokens == seq.num_tokens
        self.rows += (seq.lane, seq.num_computed_tokens, num_tokens, int(is_last), *slots * len(seq.block_tables))
        self.sequences.append(seq)
        seq.num_computed_tokens += num_tokens
        if is_last:
            self.sampled.append(seq)
            seq.num_pending += 1


class Scheduler:
    """Owns all sequences of one engine: first come, first served; the last come is preempted first.

    `num_blocks`: the size of each KV group's pool. Raises `ValueError` when a pool cannot hold one sequence of
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
        self.groups = [
            BlockManager(number, block_size, enable_prefix_caching, group) for group, number in enumerate(num_blocks)
        ]
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.incarnation = incarnation
        self.pruning = pruning
        self.sequences: dict[tuple[int, int], Sequence] = {}
        """All that are not finished, by (client_id, sequence_id)."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival, all of them earlier than those that wait."""
        self.in_flight: deque[Step] = deque()
        self.num_preemptions = 0
        self.num_pruned_tokens = 0
        self.num_pruned_blocks = 0
        self.max_num_seqs = max_num_seqs
        self._free_lanes = list(reversed(range(max_num_seqs)))
        self._num_steps = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, of all groups."""
        return sum(group.num_free_blocks for group in self.groups)

    def add(self, seq: Sequence) -> None:
        seq.block_tables = [BlockTable() for _ in self.groups]
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
        peak = self._blocks_for(seq.num_prompt_tokens) + self._blocks_for(kept + seq.max_tokens)
        return kept if all(peak <= group.num_blocks for group in self.groups) else 0

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ---- schedule

    def schedule(self) -> StepInput | None:
        """The next step; None when there is nothing to do, or nothing before a step in flight is answered."""
        step = Step()
        prefills = self._add_decodes(step)
        step.num_decodes = len(step.sequences)
        budget = self.max_num_batched_tokens - step.num_decodes
        for seq in prefills:
            if seq.status is SequenceStatus.RUNNING:
                budget -= self._add_chunk(step, seq, budget)
        while budget and (admitted := self._admit()):
            step.starts.append(_lane_start(admitted))
            budget -= self._add_chunk(step, admitted, budget)
        if not step.sequences:
            return None
        prunes = [self._prune(step, row) for row in step.pruned]
        self._num_steps += 1
        step.step_id = self._num_steps
        self.in_flight.append(step)
        return StepInput(
            incarnation=self.incarnation,
            step_id=step.step_id,
            starts=step.starts,
            new_blocks=step.new_blocks,
            rows=array("i", step.rows).tobytes(),
            num_decodes=step.num_decodes,
            prunes=prunes,
        )

    def _add_decodes(self, step: Step) -> list[Sequence]:
        """Adds a row for each running sequence with one token to compute, with a slot for it; preempts for want of
        blocks. Returns the running sequences that have more.

        Hundreds of sequences pass here in every step, so that properties are spelled out.
        """
        prefills: list[Sequence] = []
        rows, block_size, num_groups = step.rows, self.block_size, len(self.groups)
        for seq in tuple(self.running):
            if seq.status is not SequenceStatus.RUNNING:  # preempted in this very loop
                continue
            position = seq.num_computed_tokens
            if position + 1 != len(seq.token_ids) + seq.num_pending or (seq.num_kept and seq.awaits_pruning):
                prefills.append(seq)
            elif position + 1 < seq.num_prompt_tokens + seq.max_tokens:  # else all its tokens are pending
                slot = position - seq.num_pruned
                if not slot % block_size and not self._grow(step, seq):
                    break
                rows += (seq.lane, position, 1, 1, *(slot, slot + 1) * num_groups)
                step.sequences.append(seq)
                seq.num_pending += 1
                seq.num_computed_tokens = position + 1
                if not (position + 1) % block_size:
                    self._commit(seq)
        step.sampled += step.sequences
        return prefills

    def _grow(self, step: Step, seq: Sequence) -> bool:
        """Gives `seq` room for its next token in every group; False if it had to be preempted itself."""
        for group in self.groups:
            if group.is_full(seq):
                while not group.num_free_blocks:
                    self._preempt(self.running[-1])
                    if seq.status is not SequenceStatus.RUNNING:
                        return False
                column = len(group.table(seq).blocks)
                step.new_blocks.append(NewBlock(group.group, seq.lane, column, group.append(seq)))
        return True

    def _add_chunk(self, step: Step, seq: Sequence, budget: int) -> int:
        """Adds the chunk of `seq` that the budget has room for; returns its size, perhaps 0. A prompt's last chunk has
        the whole window that prunes it, and waits while the step prunes `MAX_PRUNES` others."""
        size = min(seq.num_chunkable, budget)
        if self.pruning is not None and seq.awaits_pruning:
            window, rest = max(self.pruning.window, 1), seq.num_chunkable - size
            if rest < window and (rest or len(step.pruned) == MAX_PRUNES):
                size = max(seq.num_chunkable - window, 0)
            elif not rest:
                step.pruned.append(len(step.sequences))
        if size:
            step.add_chunk(seq, size)
            self._commit(seq)  # from here on, its blocks can be hit by those admitted next
        return size

    def _prune(self, step: Step, row: int) -> Prune:
        """The prompt of the row has been computed when this step has: its blocks are free for the next."""
        seq = step.sequences[row]
        for group in self.groups:
            self.num_pruned_blocks += len(group.table(seq).blocks) - group.blocks_for(seq.num_kept)
            group.prune(seq)
        seq.num_pruned = seq.num_prompt_tokens - seq.num_kept
        self.num_pruned_tokens += seq.num_pruned
        return Prune(row, seq.num_kept, [table.blocks.copy() for table in seq.block_tables])

    def _admit(self) -> Sequence | None:
        """Lets the first waiting sequence run if its blocks can be had, and one more for each that runs."""
        if not self.waiting or not self._free_lanes or self.waiting[0].num_pending:
            return None
        seq = self.waiting[0]
        hits = [group.find_cached(seq, self.pruning.window if self.pruning else 0) for group in self.groups]
        num_hits = min(map(len, hits))  # the longest prefix that every group can serve
        hits = [hit[:num_hits] for hit in hits]
        num_private = self._blocks_for(seq.num_kept + seq.num_tokens - seq.num_prompt_tokens) if seq.num_kept else 0
        num_blocks = self._blocks_for(seq.num_prompt_tokens if seq.num_kept else seq.num_tokens)
        needed = num_blocks + num_private + len(self.running)
        if not all(group.can_allocate(needed, hit) for group, hit in zip(self.groups, hits, strict=True)):
            return None
        self.waiting.popleft()
        for group, hit in zip(self.groups, hits, strict=True):
            group.allocate(seq, num_blocks, hit, num_private)
        seq.num_computed_tokens = num_hits * self.block_size
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = seq.num_computed_tokens
            seq.queue_s = time.monotonic() - seq.arrival
        seq.lane = self._free_lanes.pop()
        seq.status = SequenceStatus.RUNNING
        self.running.append(seq)
        return seq

    def _commit(self, seq: Sequence) -> None:
        for group in self.groups:
            group.commit(seq)

    def _preempt(self, seq: Sequence) -> None:
        """The sequence gives all its blocks back and waits, first in the queue, to be computed again."""
        self._leave(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._free_lanes.append(seq.lane)
        for group in self.groups:
            group.release(seq)
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
            updates.append((seq.client_id, self._append(seq, token_id, output.logprobs.get(i))))
        return updates

    def _append(self, seq: Sequence, token_id: int, logprobs: Logprobs | None) -> SequenceUpdate:
        seq.token_ids.append(token_id)
        num_tokens = len(seq.token_ids)
        if not num_tokens % self.block_size and seq.status is SequenceStatus.RUNNING:
            self._commit(seq)
        num_output_tokens = num_tokens - seq.num_prompt_tokens
        stopped = token_id in seq.stop_token_ids and num_output_tokens >= seq.params.min_tokens
        finish_reason = "stop" if stopped else "length" if num_output_tokens >= seq.max_tokens else None
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
        for group in self.groups:
            group.check_integrity(self.running)


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
    )
