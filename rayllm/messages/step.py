"""A step: all that passes between a driver and its shards, as plain data.

A step is self-contained. Its rows say which tokens are computed and where their keys and values go, so that shards keep
what a sequence is (tokens, block tables, sampling parameters) and no count of what was computed. Both carry the
engine's incarnation, so that an answer from before a restart is recognised. A *lane* is the index of a running
sequence's state on the shards, 0 ≤ lane < max_num_seqs.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec.structs import astuple

from rayllm.messages.base import Message
from rayllm.sampling_params import SamplingParams

ROW_FIELDS = ("lane", "position", "num_tokens", "num_samples")
"""The int32 numbers with which a row begins: its lane, the position of its first token, how many tokens it has, and
from how many of them, the last ones, the next token is sampled."""
GROUP_FIELDS = ("first_slot", "kv_len")
"""The numbers that follow for each KV group: the slot of the row's first token, counted through the lane's block table,
and how many slots its last token attends to, its own among them."""


def row(
    lane: int, position: int, num_tokens: int, num_samples: int, slots: Iterable[tuple[int, int]]
) -> tuple[int, ...]:
    """The numbers of one row; `slots` are (first_slot, kv_len) of each KV group."""
    return lane, position, num_tokens, num_samples, *(number for pair in slots for number in pair)


# driver → shards


class LaneStart(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters a lane: new, or resumed after a preemption with all its tokens."""

    lane: int
    token_ids: bytes
    """The known tokens, packed by `pack_ids`."""
    num_prompt_tokens: int
    block_tables: list[list[int]]
    """The blocks of each KV group."""
    params: SamplingParams
    seed: int
    banned_token_ids: list[int]
    """Tokens that are not sampled before `params.min_tokens` output tokens."""
    prompt_logprobs: int | None
    """How many to report for each prompt token of this prefill; None: none."""
    grammar: str | None = None
    """What the output must be, in llguidance's text."""


class NewBlock(msgspec.Struct, frozen=True, array_like=True):
    """Entry `column` of a lane's block table in one KV group."""

    group: int
    lane: int
    column: int
    block: int


class Prune(msgspec.Struct, frozen=True, array_like=True):
    """A prompt, all of it computed with this step, keeps `num_kept` tokens, which move to blocks of their own; from the
    next step on, its lane has only these."""

    row: int
    """The row with the prompt's last chunk."""
    num_kept: int
    block_tables: list[list[int]]
    """The lane's new blocks in each KV group."""


class StepInput(Message, frozen=True, array_like=True):
    """One step's work. What is new comes first: sequences, then blocks."""

    incarnation: int
    step_id: int
    starts: list[LaneStart]
    new_blocks: list[NewBlock]
    rows: bytes
    """int32 in native order, row by row: `ROW_FIELDS`, then `GROUP_FIELDS` for each KV group. A lane has one row."""
    num_decodes: int
    """So many rows come first and decode: one token each, after the prompt. The others are chunks."""
    prunes: list[Prune] = msgspec.field(default_factory=list)


# shard 0 → driver


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """What is said of one position: the token itself first, then the likeliest ones; natural logarithms."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """1 for the likeliest token."""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Entries for consecutive prompt positions, the first of them `start`, that a row computed."""

    row: int
    start: int
    entries: list[Logprobs]


class StepTimes(msgspec.Struct, frozen=True, array_like=True):
    """Seconds that a step took on rank 0."""

    launch_s: float = 0.0
    """Python was busy until all was handed to the device."""
    device_s: float = 0.0
    """The device was busy."""
    prune_s: float = 0.0
    """The part of `device_s` that pruning took."""

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


class StepOutput(Message, frozen=True, array_like=True):
    """One token for each sample, in order of rows."""

    incarnation: int
    step_id: int
    token_ids: list[int]
    logprobs: dict[int, Logprobs] = msgspec.field(default_factory=dict)
    """What is said of the tokens of sequences that asked, by index into `token_ids`."""
    prompt_logprobs: list[PromptLogprobs] = msgspec.field(default_factory=list)
    times: StepTimes = StepTimes()
    ends: dict[int, str] = msgspec.field(default_factory=dict)
    """Why sequences end whose grammar does with this token, by index into `token_ids`: stop, or length."""


class ShardFailed(Message, frozen=True, array_like=True):
    """A shard has ended, or is about to; comes from itself, or from the driver's own watch."""

    incarnation: int
    reason: str
