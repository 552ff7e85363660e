"""One sequence: what the driver knows of it."""

from __future__ import annotations

import enum
import time
from array import array
from dataclasses import dataclass, field

from rayllm.messages.step import Logprobs
from rayllm.sampling_params import SamplingParams


class SequenceStatus(enum.Enum):
    """Where a sequence is in the scheduler."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True, eq=False, slots=True)
class Prefix:
    """The tokens of one full block and, through its parents, all before it; the root holds the cache salt."""

    parent: Prefix | None
    token_ids: bytes
    """int32 in native order, as `pack_ids` gives them."""

    def is_same(self, other: Prefix) -> bool:
        """Compares up to the first object that both share, most often the parent."""
        a: Prefix | None = self
        b: Prefix | None = other
        while a is not b:
            if a is None or b is None or a.token_ids != b.token_ids:
                return False
            a, b = a.parent, b.parent
        return True


@dataclass(eq=False, slots=True)
class BlockTable:
    """A sequence's blocks in one KV group."""

    blocks: list[int] = field(default_factory=list)
    """They are in order of slots: slot i is slot i % block_size of block i // block_size of this list."""
    private: list[int] = field(default_factory=list)
    """Blocks for what is kept of the prompt, reserved until it is computed."""
    num_committed: int = 0
    """Leading blocks that were offered to the prefix cache."""
    committed_prefix: Prefix | None = None
    """The prefix that ends with the last of them."""


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens, progress and blocks. The driver owns `token_ids`; KV can always be computed again from them."""

    client_id: int
    sequence_id: int
    token_ids: array[int]
    """Prompt and known output, int32."""
    params: SamplingParams
    seed: int
    max_tokens: int
    """`params.max_tokens`, cut at the end of the context."""
    stop_token_ids: frozenset[int]
    """Tokens that end the sequence, the end-of-sequence tokens among them unless ignored."""
    grammar: str | None = None
    """What the output must be, in llguidance's text."""
    cache_salt: str | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    lane: int = -1
    num_prompt_tokens: int = -1
    """-1: all of `token_ids`."""
    num_computed_tokens: int = 0
    """Tokens whose KV exists once all steps sent are done."""
    num_cached_tokens: int = -1
    """Prompt tokens that the prefix cache held at the first admission; -1 before it."""
    arrival: float = field(default_factory=time.monotonic)
    queue_s: float = 0.0
    """Seconds from arrival to the first admission."""
    num_kept: int = 0
    """Prompt tokens that keep their KV when the prompt is computed; 0: the prompt is not pruned."""
    num_pruned: int = 0
    """Computed tokens that have no KV any more."""
    num_pending: int = 0
    """Tokens that steps in flight will sample."""
    block_tables: list[BlockTable] = field(default_factory=list)
    """One for each KV group."""
    block_hashes: list[bytes] = field(default_factory=list)
    """The hashes of the full blocks of `token_ids`, as far as computed."""
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 0:
            self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.token_ids) + self.num_pending

    @property
    def kv_len(self) -> int:
        """Slots that its computed tokens occupy."""
        return self.num_computed_tokens - self.num_pruned

    @property
    def awaits_pruning(self) -> bool:
        """Its prompt is to be pruned, and is not yet."""
        return self.num_kept > 0 and not self.num_pruned

    @property
    def num_chunkable(self) -> int:
        """Tokens that chunks may compute now: a prompt that will be pruned ends one."""
        end = self.num_prompt_tokens if self.awaits_pruning else self.num_tokens
        return end - self.num_computed_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt are still to be told."""
        return self.params.prompt_logprobs is not None and len(self.token_ids) == self.num_prompt_tokens
