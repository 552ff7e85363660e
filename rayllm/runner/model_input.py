"""A step as the model takes it: its rows packed on the host, one copy to the device, the rest gathered there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch

from rayllm.config import blocks_for
from rayllm.messages.step import GROUP_FIELDS, ROW_FIELDS, StepInput
from rayllm.runner.lanes import Lanes


@dataclass(frozen=True)
class Rows:
    """A step's R rows on the host, decode rows first, then chunks; all arrays are int32."""

    lanes: np.ndarray
    """[R]"""
    positions: np.ndarray
    """[R]: the position of each row's first token."""
    num_tokens: np.ndarray
    """[R]"""
    num_samples: np.ndarray
    """[R]: 1 where the row's last token is sampled from, else 0."""
    first_slots: np.ndarray
    """[groups, R]: the slot of each row's first token."""
    kv_lens: np.ndarray
    """[groups, R]: how many slots the row's last token attends to, its own among them."""
    pruned: np.ndarray
    """[W]: the rows whose prompts the step prunes."""
    num_decodes: int

    @classmethod
    def of(cls, step: StepInput, num_groups: int) -> Rows:
        """The rows of `step`, for a model with so many KV groups."""
        width = len(ROW_FIELDS) + len(GROUP_FIELDS) * num_groups
        columns = np.frombuffer(step.rows, np.int32).reshape(-1, width).T
        lanes, positions, num_tokens, num_samples = columns[: len(ROW_FIELDS)]
        of_groups = columns[len(ROW_FIELDS) :].reshape(num_groups, len(GROUP_FIELDS), -1)
        return cls(
            lanes=lanes,
            positions=positions,
            num_tokens=num_tokens,
            num_samples=num_samples,
            first_slots=of_groups[:, 0],
            kv_lens=of_groups[:, 1],
            pruned=np.array([prune.row for prune in step.prunes], np.int32),
            num_decodes=step.num_decodes,
        )

    @cached_property
    def ends(self) -> np.ndarray:
        """[R]: the index of the first token after each row's, in the step's flat tokens."""
        return np.cumsum(self.num_tokens)

    @cached_property
    def sampled(self) -> np.ndarray:
        """[S]: the rows that are sampled from."""
        return np.flatnonzero(self.num_samples)

    @cached_property
    def sample_lanes(self) -> np.ndarray:
        """[S]"""
        return self.lanes[self.sampled]

    @cached_property
    def sample_positions(self) -> np.ndarray:
        """[S]: where in their lanes the sampled tokens go."""
        return (self.positions + self.num_tokens)[self.sampled]


@dataclass(frozen=True)
class Shape:
    """Sizes of a step, its own or those it is padded to: all that a CUDA graph fixes."""

    num_tokens: int
    num_decodes: int
    num_chunks: int
    num_samples: int
    max_seqlen_q: int
    """The longest chunk may have so many tokens."""
    max_kv_len: int
    num_prunes: int

    @classmethod
    def of(cls, rows: Rows) -> Shape:
        """The step's own sizes, without padding."""
        n = rows.num_decodes
        return cls(
            num_tokens=int(rows.ends[-1]),
            num_decodes=n,
            num_chunks=len(rows.lanes) - n,
            num_samples=len(rows.sampled),
            max_seqlen_q=int(rows.num_tokens[n:].max(initial=0)),
            max_kv_len=int(rows.kv_lens.max()),
            num_prunes=len(rows.pruned),
        )

    @classmethod
    def of_decodes(cls, number: int, max_kv_len: int) -> Shape:
        """A step of so many rows that decode, and nothing else."""
        return cls(
            num_tokens=number,
            num_decodes=number,
            num_chunks=0,
            num_samples=number,
            max_seqlen_q=0,
            max_kv_len=max_kv_len,
            num_prunes=0,
        )

    def parts(self, num_groups: int) -> dict[str, int]:
        """The arrays that `pack` joins, in order, and their lengths."""
        num_rows = self.num_decodes + self.num_chunks
        return {
            "lanes": self.num_tokens,
            "positions": self.num_tokens,
            "slots": num_groups * self.num_tokens,
            "row_lanes": num_rows,
            "kv_lens": num_groups * num_rows,
            "cu_seqlens_q": self.num_chunks + 1,
            "sample_tokens": self.num_samples,
            "sample_lanes": self.num_samples,
            "sample_positions": self.num_samples,
            "window_ends": self.num_prunes,
        }

    def packed_size(self, num_groups: int) -> int:
        """Length of `pack`'s array."""
        return sum(self.parts(num_groups).values())


@lru_cache(maxsize=256)  # of the shapes of graphs, and of the latest steps that have none
def _places(shape: Shape, num_groups: int) -> dict[str, slice]:
    """Where each part lies in `pack`'s array."""
    ends = accumulate(shape.parts(num_groups).values())
    return {
        name: slice(end - length, end)
        for (name, length), end in zip(shape.parts(num_groups).items(), ends, strict=True)
    }


def pack(rows: Rows, shape: Shape, padding: int) -> np.ndarray:
    """All that the host knows of a step, padded to `shape`, as one int64 array for `unpack`.

    Padding tokens and samples belong to the lane `padding`: the tokens are its first one, and what is drawn, which may
    be no token, goes to its second place. Padding rows have no keys.
    """
    num_groups = len(rows.kv_lens)
    places = _places(shape, num_groups)
    packed = np.zeros(places["window_ends"].stop, np.int64)
    part = {name: packed[place] for name, place in places.items()}
    for name in ("lanes", "row_lanes", "sample_lanes"):
        part[name][:] = padding
    part["sample_positions"][:] = 1
    n, num_chunks, num_samples = rows.num_decodes, len(rows.lanes) - rows.num_decodes, len(rows.sampled)
    ends = rows.ends
    num_tokens = int(ends[-1]) if len(ends) else 0

    part["lanes"][:num_tokens] = np.repeat(rows.lanes, rows.num_tokens)
    index = np.arange(num_tokens)
    starts = ends - rows.num_tokens
    part["positions"][:num_tokens] = index + np.repeat(rows.positions - starts, rows.num_tokens)
    for group, slots in enumerate(part["slots"].reshape(num_groups, -1)):
        slots[:num_tokens] = index + np.repeat(rows.first_slots[group] - starts, rows.num_tokens)

    chunk_rows = slice(shape.num_decodes, shape.num_decodes + num_chunks)
    for padded, values in (
        (part["row_lanes"], rows.lanes),
        *zip(part["kv_lens"].reshape(num_groups, -1), rows.kv_lens, strict=True),
    ):
        padded[:n], padded[chunk_rows] = values[:n], values[n:]
    part["cu_seqlens_q"][:] = num_tokens
    part["cu_seqlens_q"][0] = n
    part["cu_seqlens_q"][1 : num_chunks + 1] = ends[n:]

    part["sample_tokens"][:num_samples] = ends[rows.sampled] - 1
    part["sample_lanes"][:num_samples] = rows.sample_lanes
    part["sample_positions"][:num_samples] = rows.sample_positions
    part["window_ends"][: len(rows.pruned)] = ends[rows.pruned]
    return packed


def pack_padding(shape: Shape, padding: int, num_groups: int) -> np.ndarray:
    """A step of `shape` that does nothing, as `pack` gives it."""
    none, none_of_groups = np.empty(0, np.int32), np.empty((num_groups, 0), np.int32)
    rows = Rows(none, none, none, none, none_of_groups, none_of_groups, pruned=none, num_decodes=0)
    return pack(rows, shape, padding)


@dataclass(frozen=True)
class GroupInput:
    """What the attention of one KV group reads."""

    slot_mapping: torch.Tensor
    """[T] int64: where in the KV cache each token's keys and values go."""
    block_tables: torch.Tensor
    """[D + P, blocks of the longest row] int32."""
    kv_lens: torch.Tensor
    """[D + P] int32: slots that the row's last token attends to, its own among them."""


@dataclass(frozen=True)
class ModelInput:
    """What the model's layers and the sampler read: T tokens; D decode rows, then P chunks; S samples."""

    shape: Shape
    token_ids: torch.Tensor
    """[T] int32."""
    positions: torch.Tensor
    """[T] int64, for RoPE."""
    groups: tuple[GroupInput, ...]
    """One for each KV group."""
    cu_seqlens_q: torch.Tensor
    """[P + 1] int32: where each chunk's tokens begin."""
    sample_tokens: torch.Tensor
    """[S] int64: the tokens whose hidden states are sampled from."""
    sample_lanes: torch.Tensor
    """[S] int64."""
    sample_positions: torch.Tensor
    """[S] int64: where in their lanes the sampled tokens go."""
    window_ends: torch.Tensor
    """[W] int64: the token after the last one of each prompt that is pruned; 0 is padding."""


def unpack(packed: torch.Tensor, shape: Shape, lanes: Lanes) -> ModelInput:
    """The step's tensors, from `pack`'s array on the device and the lanes' state."""
    part = {name: packed[place] for name, place in _places(shape, len(lanes.block_tables)).items()}
    return ModelInput(
        shape=shape,
        token_ids=lanes.token_ids[part["lanes"], part["positions"]],
        positions=part["positions"],
        groups=tuple(_group_inputs(part, shape, lanes)),
        cu_seqlens_q=part["cu_seqlens_q"].int(),
        sample_tokens=part["sample_tokens"],
        sample_lanes=part["sample_lanes"],
        sample_positions=part["sample_positions"],
        window_ends=part["window_ends"],
    )


def _group_inputs(part: dict[str, torch.Tensor], shape: Shape, lanes: Lanes) -> Iterator[GroupInput]:
    size, num_groups = lanes.block_size, len(lanes.block_tables)
    columns = blocks_for(shape.max_kv_len, size)
    slots, kv_lens = (part[name].view(num_groups, -1) for name in ("slots", "kv_lens"))
    for table, own_slots, own_lens in zip(lanes.block_tables, slots, kv_lens.int(), strict=True):
        blocks = table[part["lanes"], own_slots // size].long()
        yield GroupInput(
            slot_mapping=blocks * size + own_slots % size,
            block_tables=table[part["row_lanes"], :columns],
            kv_lens=own_lens,
        )
