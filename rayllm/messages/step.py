"""What crosses between processes: plain data, encoded by msgspec.

`StepInput` and `StepOutput` are all that passes between driver and shards; the rest passes between the driver, its
owner (the process that started the engine and admits requests) and its clients (those that get the tokens). What
answers a step carries the engine's incarnation, so that one from before a restart is recognised. A *lane* is the
index of a running sequence's state on the shards, 0 ≤ lane < max_num_seqs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import msgspec
from msgspec.structs import astuple

from rayllm.sampling_params import SamplingParams

BYTES_OF_ID = 4


def pack_ids(token_ids: Iterable[int]) -> bytes:
    """Token ids as int32 in native order, `array("i", …)` again at the other end: thousands of them cross at once, and
    lists decode a hundred times slower."""
    return array("i", token_ids).tobytes()


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of all messages; the tag tells them apart in one inbox."""


# driver → shards


class LaneStart(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters a lane: new, or resumed after a preemption with all its tokens."""

    lane: int
    token_ids: bytes
    """Of `pack_ids`."""
    num_prompt_tokens: int
    num_computed_tokens: int
    block_table: list[int]
    params: SamplingParams
    seed: int
    banned_token_ids: list[int]
    """Not to be sampled before `params.min_tokens` output tokens."""
    prompt_logprobs: int | None
    """How many to report for each prompt token of this prefill; None: none."""


class Prune(msgspec.Struct, frozen=True, array_like=True):
    """When this step is computed, `num_kept` tokens of the lane's prompt, all of it computed, move to blocks of their
    own; from the next step on, the lane has only these."""

    lane: int
    num_kept: int
    block_table: list[int]


class StepInput(Message, frozen=True, array_like=True):
    """One step's work, as a difference: shards keep each lane's tokens, block table and number of computed tokens.

    Rows are the decode lanes, one token each, then the chunks. A row samples when it reaches its lane's last token.
    """

    incarnation: int
    step: int
    starts: list[LaneStart]
    new_blocks: list[int]
    """Flat pairs (lane, block): the block is appended to the lane's table."""
    decode_lanes: list[int]
    chunks: list[int]
    """Flat pairs (lane, number of tokens)."""
    prunes: list[Prune] = []


# shard 0 → driver


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one position: the token itself first, then the likeliest ones; natural logarithms."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """1 for the likeliest token."""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of consecutive prompt positions, the first of them `start`, in the chunk of this index."""

    chunk: int
    start: int
    entries: list[Logprobs]


class StepTimes(msgspec.Struct, frozen=True, array_like=True):
    """Seconds that a step took on rank 0."""

    launch_s: float = 0.0
    """Of Python, until all was handed to the device."""
    device_s: float = 0.0
    """On the device."""
    prune_s: float = 0.0
    """Of `device_s`, for pruning."""

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


class StepOutput(Message, frozen=True, array_like=True):
    """One token per row that samples, in order of rows."""

    incarnation: int
    step: int
    token_ids: list[int]
    logprobs: dict[int, Logprobs] = {}
    """By index into `token_ids`, for sequences that asked."""
    prompt_logprobs: list[PromptLogprobs] = []
    times: StepTimes = StepTimes()


class ShardFailed(Message, frozen=True, array_like=True):
    incarnation: int
    reason: str


# client → driver


class AddClient(Message, frozen=True, array_like=True):
    client: int
    address: str


class ClientGone(Message, frozen=True, array_like=True):
    """The client's process has ended; comes from the transport, and goes on to the owner."""

    client: int


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    sequence: int
    """Unique within the client."""
    token_ids: bytes
    """Of `pack_ids`: the prompt, then what an engine before this one answered."""
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    cache_salt: str | None = None
    """Sequences share cached blocks only with those of the same salt."""


class AddSequence(Message, frozen=True, array_like=True):
    client: int
    new: NewSequence


class Abort(Message, frozen=True, array_like=True):
    client: int
    sequences: list[int]


class Stop(Message, frozen=True, array_like=True):
    """Ends the driver's loop."""


DriverMessage = StepOutput | ShardFailed | AddClient | ClientGone | AddSequence | Abort | Stop

# driver → client


class SequenceUpdate(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought for one sequence."""

    sequence: int
    token_ids: list[int]
    finish_reason: str | None = None
    """stop, length or abort."""
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    num_pruned_tokens: int = 0
    """Of the prompt, whose KV was given up."""
    queue_s: float = 0.0
    """How long the sequence waited for its first admission."""
    logprobs: list[Logprobs] = []
    prompt_logprobs: list[Logprobs] = []
    """With the first token only; the entry of the prompt's first token is left out."""


class Updates(Message, frozen=True, array_like=True):
    incarnation: int
    updates: list[SequenceUpdate]


# driver → owner


class Ended(Message, frozen=True, array_like=True):
    """Sequences that a step brought to their end."""

    sequences: list[tuple[int, int]]
    """(client, sequence)"""


class EngineDied(Message, frozen=True, array_like=True):
    reason: str


OwnerMessage = Ended | ClientGone | EngineDied
