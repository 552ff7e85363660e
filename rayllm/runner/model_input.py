"""A step as the model takes it: its rows packed on the host, one copy to the device, the rest gathered there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rayllm.messages.step import StepInput
from rayllm.runner.lanes import Lanes


@dataclass(frozen=True)
class Rows:
    """A step's rows on the host: decode rows first, then chunks. All arrays are [R]."""

    lanes: np.ndarray
    num_tokens: np.ndarray
    starts: np.ndarray
    """Tokens of the lane computed before."""
    num_pruned: np.ndarray
    """Of those, the ones without KV."""
    samples: np.ndarray
    """bool: the row reaches its lane's last token, so its output is sampled from."""
    pruned: np.ndarray
    """Not [R]: indices of the rows whose prompts the step prunes, in its order."""
    num_decodes: int

    @property
    def kv_lens(self) -> np.ndarray:
        """Slots that the row's last token attends to, its own among them."""
        return self.starts + self.num_tokens - self.num_pruned

    @property
    def ends(self) -> np.ndarray:
        """Index of the first token after each row's, in the step's flat tokens."""
        return np.cumsum(self.num_tokens)


def take_rows(step: StepInput, lanes: Lanes) -> Rows:
    """The rows of `step`; moves the lanes' lengths to what they are after it."""
    chunks = np.array(step.chunks, np.int64).reshape(-1, 2)
    num_decodes = len(step.decode_lanes)
    row_lanes = np.concatenate((np.array(step.decode_lanes, np.int64), chunks[:, 0]))
    num_tokens = np.concatenate((np.ones(num_decodes, np.int64), chunks[:, 1]))
    starts = lanes.num_computed_tokens[row_lanes]
    samples = starts + num_tokens == lanes.num_tokens[row_lanes]
    num_pruned = lanes.num_pruned_tokens[row_lanes]
    row_of = {lane: row for row, lane in enumerate(row_lanes.tolist())} if step.prunes else {}
    pruned = np.array([row_of[prune.lane] for prune in step.prunes], np.int64)
    lanes.num_computed_tokens[row_lanes] += num_tokens
    lanes.num_tokens[row_lanes[samples]] += 1
    return Rows(row_lanes, num_tokens, starts, num_pruned, samples, pruned, num_decodes)


@dataclass(frozen=True)
class Shape:
    """Sizes of a step, its own or those it is padded to: all that a CUDA graph fixes."""

    num_tokens: int
    num_decodes: int
    num_chunks: int
    num_samples: int
    max_seqlen_q: int
    """Of the chunks."""
    max_kv_len: int
    num_prunes: int

    @classmethod
    def of(cls, rows: Rows) -> Shape:
        """The step's own sizes, without padding."""
        n = rows.num_decodes
        return cls(
            num_tokens=int(rows.num_tokens.sum()),
            num_decodes=n,
            num_chunks=len(rows.lanes) - n,
            num_samples=int(rows.samples.sum()),
            max_seqlen_q=int(rows.num_tokens[n:].max(initial=0)),
            max_kv_len=int(rows.kv_lens.max()),
            num_prunes=len(rows.pruned),
        )

    @property
    def sections(self) -> list[int]:
        """Lengths of the arrays that `pack` joins."""
        num_rows = self.num_decodes + self.num_chunks
        return [
            self.num_tokens,
            self.num_tokens,
            num_rows,
            num_rows,
            self.num_chunks + 1,
            self.num_samples,
            self.num_samples,
            self.num_prunes,
        ]


def pack(rows: Rows, shape: Shape, padding: int) -> np.ndarray:
    """All that the host knows of a step, padded to `shape`, as one int64 array for `unpack`.

    Padding tokens and samples belong to the lane `padding`, padding rows have no keys.
    """
    sections = np.zeros(sum(shape.sections), np.int64)
    tokens, positions, row_lanes, kv_lens, cu_seqlens_q, sample_rows, sample_lanes, window_ends = np.split(
        sections, np.cumsum(shape.sections)[:-1]
    )
    tokens[:], row_lanes[:], sample_lanes[:] = padding, padding, padding
    n, ends = rows.num_decodes, rows.ends
    num_tokens, num_chunks, num_samples = int(rows.num_tokens.sum()), len(rows.lanes) - n, int(rows.samples.sum())
    tokens[:num_tokens] = np.repeat(rows.lanes, rows.num_tokens)
    first = rows.starts - ends + rows.num_tokens
    positions[:num_tokens] = np.arange(num_tokens) + np.repeat(first, rows.num_tokens)
    chunk_rows = slice(shape.num_decodes, shape.num_decodes + num_chunks)
    for section, values in ((row_lanes, rows.lanes), (kv_lens, rows.kv_lens)):
        section[:n], section[chunk_rows] = values[:n], values[n:]
    cu_seqlens_q[:] = num_tokens
    cu_seqlens_q[0] = n
    cu_seqlens_q[1 : num_chunks + 1] = ends[n:]
    sample_rows[:num_samples] = ends[rows.samples] - 1
    sample_lanes[:num_samples] = rows.lanes[rows.samples]
    window_ends[: len(rows.pruned)] = ends[rows.pruned]
    return sections


def pack_padding(shape: Shape, padding: int) -> np.ndarray:
    """A step of `shape` that does nothing, as `pack` gives it."""
    empty = np.empty(0, np.int64)
    return pack(Rows(empty, empty, empty, empty, samples=empty > 0, pruned=empty, num_decodes=0), shape, padding)


@dataclass(frozen=True)
class ModelInput:
    """What the model's layers and the sampler read: T tokens; D decode rows, then P chunks; S samples."""

    shape: Shape
    token_ids: torch.Tensor
    """[T] int32."""
    positions: torch.Tensor
    """[T] int64, for RoPE."""
    slot_mapping: torch.Tensor
    """[T] int64: where in the KV cache each token's keys and values go."""
    block_tables: torch.Tensor
    """[D + P, blocks of the longest row] int32."""
    kv_lens: torch.Tensor
    """[D + P] int32: slots that the row's last token attends to, its own among them."""
    cu_seqlens_q: torch.Tensor
    """[P + 1] int32: where each chunk's tokens begin."""
    sample_rows: torch.Tensor
    """[S] int64: the tokens whose hidden states are sampled from."""
    sample_lanes: torch.Tensor
    """[S] int64."""
    sample_positions: torch.Tensor
    """[S] int64: where in their lanes the sampled tokens go."""
    window_ends: torch.Tensor
    """[W] int64: the token after the last one of each prompt that is pruned; 0 is padding."""


def unpack(packed: torch.Tensor, shape: Shape, lanes: Lanes) -> ModelInput:
    """The step's tensors, from `pack`'s array on the device and the lanes' state."""
    parts = packed.split(shape.sections)
    tokens, positions, row_lanes, kv_lens, cu_seqlens_q, sample_rows, sample_lanes, window_ends = parts
    slots = positions - lanes.slot_offsets[tokens]
    blocks = lanes.block_tables[tokens, slots // lanes.block_size].long()
    return ModelInput(
        shape=shape,
        token_ids=lanes.token_ids[tokens, positions],
        positions=positions,
        slot_mapping=blocks * lanes.block_size + slots % lanes.block_size,
        block_tables=lanes.block_tables[row_lanes, : -(-shape.max_kv_len // lanes.block_size)],
        kv_lens=kv_lens.int(),
        cu_seqlens_q=cu_seqlens_q.int(),
        sample_rows=sample_rows,
        sample_lanes=sample_lanes,
        sample_positions=positions[sample_rows] + 1,
        window_ends=window_ends,
    )
