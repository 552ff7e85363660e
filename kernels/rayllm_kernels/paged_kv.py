"""The KV cache as attention reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PagedKV(NamedTuple):
    """Keys and values of one layer in blocks, and where B sequences find theirs."""

    k_cache: torch.Tensor
    """[num_blocks, block_size, Hkv, D], contiguous."""
    v_cache: torch.Tensor
    """Like `k_cache`."""
    block_tables: torch.Tensor
    """[B, max_blocks] int32, anything past a sequence's end."""
    kv_lens: torch.Tensor
    """[B] int32: keys of each sequence; those of the queries' own tokens are stored already."""
    max_kv_len: int
    """An upper bound of `kv_lens` that the host knows, at most max_blocks · block_size."""
