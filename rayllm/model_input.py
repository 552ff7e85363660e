"""A step as the model takes it: the shard's lanes and the step's rows made into tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rayllm.lanes import Lanes
from rayllm.step import StepInput


@dataclass(frozen=True)
class Rows:
    """A step's rows on the host: decode rows first, then chunks. All arrays are int64, [R]."""

    lanes: np.ndarray
    num_tokens: np.ndarray
    starts: np.ndarray
    """Tokens of the lane computed before."""
    samples: np.ndarray
    """bool: the row reaches its lane's last token, so its output is sampled from."""
    num_decodes: int

    @property
    def kv_lens(self) -> np.ndarray:
        return self.starts + self.num_tokens

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
    lanes.num_computed_tokens[row_lanes] += num_tokens
    lanes.num_tokens[row_lanes[samples]] += 1
    return Rows(row_lanes, num_tokens, starts, samples, num_decodes)


@dataclass(frozen=True)
class ModelInput:
    """What the model's layers read. T tokens in R rows, the first `num_decodes` of one token each; P chunks."""

    token_ids: torch.Tensor
    """[T] int32."""
    positions: torch.Tensor
    """[T] int64, for RoPE."""
    slot_mapping: torch.Tensor
    """[T] int64: where in the KV cache each token's keys and values go."""
    block_tables: torch.Tensor
    """[R, blocks of the longest row] int32."""
    kv_lens: torch.Tensor
    """[R] int32: slots that the row's last token attends to, its own among them."""
    cu_seqlens_q: torch.Tensor
    """[P + 1] int32: borders of the chunks' tokens, counted from the first chunk's first."""
    num_decodes: int
    max_seqlen_q: int
    """Of the chunks."""
    max_kv_len: int
    has_context: bool
    """Whether a chunk attends to tokens that came before it."""


def gather(lanes: Lanes, token_lanes: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and slots, [T] each, of the tokens at `positions` [T] of lanes `token_lanes` [T]."""
    token_ids = lanes.token_ids[token_lanes, positions]
    blocks = lanes.block_tables[token_lanes, positions // lanes.block_size].long()
    return token_ids, blocks * lanes.block_size + positions % lanes.block_size


def make_input(rows: Rows, lanes: Lanes) -> ModelInput:
    """One copy to the device brings all that the host knows; the rest is gathered there."""
    ends = rows.ends
    token_lanes = np.repeat(rows.lanes, rows.num_tokens)
    positions = np.arange(len(token_lanes)) + np.repeat(rows.starts - ends + rows.num_tokens, rows.num_tokens)
    cu_seqlens_q = np.append(0, ends[rows.num_decodes :] - rows.num_decodes)
    parts = (token_lanes, positions, rows.lanes, rows.kv_lens, cu_seqlens_q)
    device_parts = lanes.device.put(np.concatenate(parts)).split([len(part) for part in parts])
    max_kv_len = int(rows.kv_lens.max())
    token_ids, slot_mapping = gather(lanes, device_parts[0], device_parts[1])
    return ModelInput(
        token_ids=token_ids,
        positions=device_parts[1],
        slot_mapping=slot_mapping,
        block_tables=lanes.block_tables[device_parts[2], : -(-max_kv_len // lanes.block_size)],
        kv_lens=device_parts[3].int(),
        cu_seqlens_q=device_parts[4].int(),
        num_decodes=rows.num_decodes,
        max_seqlen_q=int(rows.num_tokens[rows.num_decodes :].max(initial=0)),
        max_kv_len=max_kv_len,
        has_context=bool(rows.starts[rows.num_decodes :].any()),
    )
