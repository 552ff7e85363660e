"""Writes a step's keys and values into the KV cache."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch

from rayllm_kernels._triton import jit, tl, triton


def store_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `store_kv`."""
    written = slot_mapping >= 0
    if not written.all():
        k, v, slot_mapping = k[written], v[written], slot_mapping[written]
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.view(-1, *new.shape[1:]).index_copy_(0, slot_mapping, new)


@jit
def _store_kv_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        offsets = tl.arange(0, WIDTH_PADDED)
        mask = offsets < WIDTH
        head, dim = offsets // HEAD_DIM, offsets % HEAD_DIM
        key = tl.load(k + token * k_stride_token + head * k_stride_head + dim, mask=mask)
        value = tl.load(v + token * v_stride_token + head * v_stride_head + dim, mask=mask)
        tl.store(k_cache + slot * WIDTH + offsets, key, mask=mask)
        tl.store(v_cache + slot * WIDTH + offsets, value, mask=mask)


def _store_kv_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    tokens, heads, head_dim = k.shape
    if tokens == 0:
        return
    width = heads * head_dim
    _store_kv_kernel[(tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        *k.stride()[:2],
        *v.stride()[:2],
        HEAD_DIM=head_dim,
        WIDTH=width,
        WIDTH_PADDED=triton.next_power_of_2(width),
    )


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes `k[t]` and `v[t]` into slot `slot_mapping[t]` of their caches, in place.

    k, v: [T, Hkv, D], contiguous along D. k_cache, v_cache: [num_blocks, block_size, Hkv, D], contiguous.
    slot_mapping: [T] int64, block · block_size + offset; −1 is padding and is not written.
    """
    op = _store_kv_triton if k.is_cuda else store_kv_reference
    op(k, v, k_cache, v_cache, slot_mapping)
