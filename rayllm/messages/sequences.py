"""Sequences and their tokens: what passes between a driver, its owner and its clients.

The *owner* is the process that started the engine and admits sequences; *clients* are those that get the tokens.
Clients have a `client_id`, which the owner gives them, and number their own sequences.
"""

from __future__ import annotations

import msgspec

from rayllm.messages.base import Message, Stop
from rayllm.messages.step import Logprobs, ShardFailed, StepOutput
from rayllm.sampling_params import SamplingParams

# owner → driver


class AddClient(Message, frozen=True, array_like=True):
    """From now on, the client's updates go to `address`."""

    client_id: int
    address: str


class ClientGone(Message, frozen=True, array_like=True):
    """The client's process has ended; comes from the transport, and goes on to the owner."""

    client_id: int


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence as its client made it."""

    sequence_id: int
    """Unique within the client."""
    token_ids: bytes
    """The prompt, then what an engine before this one answered, packed by `pack_ids`."""
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    cache_salt: str | None = None
    """Sequences share cached blocks only with those of the same salt."""
    eos_token_ids: list[int] = []
    """What ends it beside the params' `stop_token_ids`, unless they ignore it."""
    grammar: str | None = None
    """What the output must be, in llguidance's text."""


class AddSequence(Message, frozen=True, array_like=True):
    """A sequence to be answered."""

    client_id: int
    new: NewSequence


class Abort(Message, frozen=True, array_like=True):
    """These of the client's sequences are not wanted any more; those that have ended are ignored."""

    client_id: int
    sequence_ids: list[int]


DriverMessage = StepOutput | ShardFailed | AddClient | ClientGone | AddSequence | Abort | Stop

# driver → client


class SequenceUpdate(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought for one sequence."""

    sequence_id: int
    token_ids: list[int]
    finish_reason: str | None = None
    """stop, length or abort."""
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    num_pruned_tokens: int = 0
    """Prompt tokens whose KV was given up."""
    queue_s: float = 0.0
    """How long the sequence waited for its first admission, in seconds."""
    logprobs: list[Logprobs] = msgspec.field(default_factory=list)
    prompt_logprobs: list[Logprobs] = msgspec.field(default_factory=list)
    """What is said of the prompt, told with the first token; the prompt's first token has no entry."""


class Updates(Message, frozen=True, array_like=True):
    """All that one step brought for one client."""

    incarnation: int
    updates: list[SequenceUpdate]


# driver → owner


class Ended(Message, frozen=True, array_like=True):
    """Sequences that a step brought to their end."""

    sequences: list[tuple[int, int]]
    """(client_id, sequence_id)"""


class EngineDied(Message, frozen=True, array_like=True):
    """The driver gives up; its shards end with it."""

    reason: str


OwnerMessage = Ended | ClientGone | EngineDied
