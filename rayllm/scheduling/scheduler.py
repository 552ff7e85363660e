"""Continuous batching under one token budget.

`schedule()` decides a step, `update()` takes its result in; the driver lets two steps lie between, or three short ones,
so that the shards never wait for a decision. There is no prefill phase and no decode phase: a step gives each running
sequence that decodes its one token, then fills the budget with chunks of prompts, those of running ones first.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from rayllm.messages.step import LaneStart, Logprobs, Prune, SequenceUpdate, StepInput, StepOutput
from rayllm.scheduling.block_manager import BlockManager
from rayllm.scheduling.pruning import MAX_PRUNES, PruningPolicy
from rayllm.scheduling.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class StepInFlight:
    """A step that was sent and is not answered yet."""

    step: int
    sampled: list[Sequence]
    """Those that get a token, in order of rows."""
    chunked: list[Sequence]


class Scheduler:
    """Owns all sequences of one engine: first come, first served; the last come is preempted first.

    Raises `ValueError` when the cache cannot hold one sequence of `max_model_len` tokens, or when one step
    cannot hold one token of every running sequence.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        incarnation: int = 0,
        pruning: PruningPolicy | None = None,
    ):
        if num_blocks * block_size < max_model_len:
            raise ValueError("the KV cache must hold at least one sequence of max_model_len tokens")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.incarnation = incarnation
        self.pruning = pruning
        self.sequences: dict[tuple[int, int], Sequence] = {}
        """All that are not finished, by (client, sequence)."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival, all of them earlier than those that wait."""
        self.in_flight: deque[StepInFlight] = deque()
        self.num_preemptions = 0
        self.num_pruned_tokens = 0
        self.num_pruned_blocks = 0
        self.max_num_seqs = max_num_seqs
        self._free_lanes = list(reversed(range(max_num_seqs)))
        self._step = 0

    def add(self, seq: Sequence) -> None:
        if seq.wants_prompt_logprobs:
            seq.prompt_logprobs = [None] * seq.num_prompt_tokens
        if self.pruning is not None:
            seq.num_kept = self._num_kept(seq, self.pruning)
        self.sequences[seq.client, seq.sequence] = seq
        self.waiting.append(seq)

    def abort_all(self, client: int) -> None:
        """Aborts whatever the client has asked for."""
        for owner, sequence in list(self.sequences):
            if owner == client:
                self.abort(client, sequence)

    def abort(self, client: int, sequence: int) -> None:
        """Frees the sequence's blocks at once. One that is unknown (it just finished) is ignored."""
        if seq := self.sequences.get((client, sequence)):
            self._finish(seq)

    def _num_kept(self, seq: Sequence, pruning: PruningPolicy) -> int:
        """0 also when the cache can never hold the prompt and, beside it, what is kept and said."""
        kept = pruning.num_kept(seq.num_prompt_tokens, seq.params.snapkv_limit)
        blocks_for = self.blocks.blocks_for
        peak = blocks_for(seq.num_prompt_tokens) + blocks_for(kept + seq.max_tokens)
        return kept if peak <= self.blocks.num_blocks else 0

    # ---- schedule

    def schedule(self) -> StepInput | None:
        """The next step; None when there is nothing to do, or nothing before a step in flight is answered."""
        new_blocks: list[int] = []
        decodes, prefills = self._choose_decodes(new_blocks)
        budget = self.max_num_batched_tokens - len(decodes)
        chunks: list[tuple[Sequence, int]] = []
        to_prune: list[Sequence] = []
        for seq in prefills:
            if seq.status is SequenceStatus.RUNNING:
                budget -= self._take_chunk(seq, budget, chunks, to_prune)
        starts: list[LaneStart] = []
        while budget and (admitted := self._admit()):
            starts.append(self._lane_start(admitted))
            budget -= self._take_chunk(admitted, budget, chunks, to_prune)
        if not decodes and not chunks:
            return None
        prunes = [self._prune(seq) for seq in to_prune]

        sampled = decodes + [seq for seq, _ in chunks if seq.num_computed_tokens == seq.num_tokens]
        for seq in sampled:
            seq.num_pending += 1
        self._step += 1
        self.in_flight.append(StepInFlight(self._step, sampled, [seq for seq, _ in chunks]))
        return StepInput(
            incarnation=self.incarnation,
            step=self._step,
            starts=starts,
            new_blocks=new_blocks,
            decode_lanes=[seq.lane for seq in decodes],
            chunks=[number for seq, num_tokens in chunks for number in (seq.lane, num_tokens)],
            prunes=prunes,
        )

    def _take_chunk(
        self, seq: Sequence, budget: int, chunks: list[tuple[Sequence, int]], to_prune: list[Sequence]
    ) -> int:
        """Adds the chunk of `seq` that the budget has room for; returns its size, perhaps 0. A prompt's last chunk has
        the whole window that prunes it, and waits while the step prunes `MAX_PRUNES` others."""
        size = min(seq.num_chunkable, budget)
        if self.pruning is not None and seq.num_kept and not seq.num_pruned:
            window, rest = max(self.pruning.window, 1), seq.num_chunkable - size
            if rest < window and (rest or len(to_prune) == MAX_PRUNES):
                size = max(seq.num_chunkable - window, 0)
            elif not rest:
                to_prune.append(seq)
        if size:
            chunks.append((seq, size))
            self._advance(seq, size)  # from here on, its blocks can be hit by those admitted next
        return size

    def _prune(self, seq: Sequence) -> Prune:
        """The prompt of `seq` has been computed when this step has: its blocks are free for the next."""
        num_blocks = len(seq.block_table) - self.blocks.blocks_for(seq.num_kept)
        self.blocks.prune(seq)
        seq.num_pruned = seq.num_prompt_tokens - seq.num_kept
        self.num_pruned_tokens += seq.num_pruned
        self.num_pruned_blocks += num_blocks
        return Prune(seq.lane, seq.num_kept, seq.block_table.copy())

    def _choose_decodes(self, new_blocks: list[int]) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences with one token to compute, each given a slot, and those with more; preempts for want of
        blocks."""
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for seq in tuple(self.running):
            if seq.status is not SequenceStatus.RUNNING:  # preempted in this very loop
                continue
            if not seq.is_decoding:
                prefills.append(seq)
                continue
            if seq.is_complete:
                continue
            if seq.kv_len == len(seq.block_table) * self.blocks.block_size:
                while not self.blocks.num_free_blocks and seq.status is SequenceStatus.RUNNING:
                    self._preempt(self.running[-1])
                if seq.status is not SequenceStatus.RUNNING:
                    break
                new_blocks += (seq.lane, self.blocks.append(seq))
            decodes.append(seq)
            self._advance(seq, 1)
        return decodes, prefills

    def _admit(self) -> Sequence | None:
        """Lets the first waiting sequence run if its blocks can be had, and one more for each that runs."""
        if not self.waiting or not self._free_lanes or self.waiting[0].num_pending:
            return None
        seq = self.waiting[0]
        cached = self.blocks.find_cached(seq, self.pruning.window if self.pruning else 0)
        num_private = 0
        if seq.num_kept:
            num_private = self.blocks.blocks_for(seq.num_kept + seq.num_tokens - seq.num_prompt_tokens)
        num_blocks = self.blocks.blocks_for(seq.num_prompt_tokens if seq.num_kept else seq.num_tokens)
        if not self.blocks.can_allocate(num_blocks + num_private + len(self.running), cached):
            return None
        self.waiting.popleft()
        self.blocks.allocate(seq, num_blocks, cached, num_private)
        seq.num_computed_tokens = len(cached) * self.blocks.block_size
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = seq.num_computed_tokens
            seq.queue_s = time.monotonic() - seq.arrival
        seq.lane = self._free_lanes.pop()
        seq.status = SequenceStatus.RUNNING
        self.running.append(seq)
        return seq

    def _lane_start(self, seq: Sequence) -> LaneStart:
        return LaneStart(
            lane=seq.lane,
            token_ids=seq.token_ids.tobytes(),
            num_prompt_tokens=seq.num_prompt_tokens,
            num_computed_tokens=seq.num_computed_tokens,
            block_table=seq.block_table.copy(),
            params=seq.params,
            seed=seq.seed,
            banned_token_ids=sorted(seq.stop_token_ids) if seq.params.min_tokens else [],
            prompt_logprobs=seq.params.prompt_logprobs if seq.wants_prompt_logprobs else None,
        )

    def _advance(self, seq: Sequence, num_tokens: int) -> None:
        seq.num_computed_tokens += num_tokens
        self.blocks.commit(seq)

    def _preempt(self, seq: Sequence) -> None:
        """The sequence gives all its blocks back and waits, first in the queue, to be computed again."""
        self._leave(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._free_lanes.append(seq.lane)
        self.blocks.release(seq)
        seq.num_computed_tokens = seq.num_pruned = 0

    # ---- update

    def update(self, output: StepOutput) -> list[tuple[int, SequenceUpdate]]:
        """Takes in the answer to the oldest step in flight; returns (client, update) of sequences it moved."""
        in_flight = self.in_flight.popleft()
        answered = (output.incarnation, output.step)
        assert answered == (self.incarnation, in_flight.step), "an answer out of turn"
        assert len(output.token_ids) == len(in_flight.sampled), "one token for each row that samples"
        for part in output.prompt_logprobs:
            seq = in_flight.chunked[part.chunk]
            if seq.prompt_logprobs:
                seq.prompt_logprobs[part.start : part.start + len(part.entries)] = part.entries
        updates = []
        for i, (seq, token_id) in enumerate(zip(in_flight.sampled, output.token_ids, strict=True)):
            seq.num_pending -= 1
            if seq.status is SequenceStatus.FINISHED:  # it ended, or was aborted, while this row was computed
                continue
            updates.append((seq.client, self._append(seq, token_id, output.logprobs.get(i))))
        return updates

    def _append(self, seq: Sequence, token_id: int, logprobs: Logprobs | None) -> SequenceUpdate:
        seq.token_ids.append(token_id)
        if seq.status is SequenceStatus.RUNNING:
            self.blocks.commit(seq)
        num_output_tokens = len(seq.token_ids) - seq.num_prompt_tokens
        stopped = token_id in seq.stop_token_ids and num_output_tokens >= seq.params.min_tokens
        finish_reason = "stop" if stopped else "length" if num_output_tokens >= seq.max_tokens else None
        if finish_reason:
            self._finish(seq)
        prompt_logprobs: list[Logprobs] = []
        if seq.prompt_logprobs:
            prompt_logprobs = [entry for entry in seq.prompt_logprobs if entry is not None]
            seq.prompt_logprobs = []
        return SequenceUpdate(
            sequence=seq.sequence,
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
        del self.sequences[seq.client, seq.sequence]

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
            assert not seq.block_table, "blocks of a waiting sequence"
            assert not seq.num_computed_tokens, "computed tokens of a waiting sequence"
        self.blocks.check_integrity(self.running)
