"""Attention of one query token per sequence over the KV cache."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from rayllm_kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait, jit, tl, triton

_LOG2_E = 1.4426950408889634  # the kernels use powers of two, which the GPU computes directly
_MAX_SPLITS = 128


def decode_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_kv_len: int,
) -> torch.Tensor:
    """See `decode_attention`. Gathers each sequence's keys, padded to `max_kv_len`, for torch's SDPA."""
    batch, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    # The query heads of a KV group are rows of one attention problem.
    q = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    blocks = block_tables[:, : -(-max_kv_len // block_size)]

    def gather(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        keys = cache.index_select(0, rows.flatten())  # copies whole rows, indexing would copy numbers
        return keys.view(batch, -1, num_kv_heads, head_dim)[:, :max_kv_len].transpose(1, 2)

    mask = torch.arange(max_kv_len, device=q.device) < kv_lens.unsqueeze(1)
    if mask.all():
        k, v = (gather(cache, blocks) for cache in (k_cache, v_cache))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).reshape(batch, num_heads, head_dim)
    slots = (blocks.unsqueeze(2) * block_size + torch.arange(block_size, device=q.device)).flatten(1)[:, :max_kv_len]
    # Past a sequence's end its first slot is read again: the table may hold garbage there, an unused slot NaN.
    slots = slots.where(mask, slots[:, :1] * mask[:, :1])
    k, v = (gather(cache.flatten(0, 1), slots) for cache in (k_cache, v_cache))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=scale)
    return out.masked_fill_(~mask[:, 0, None, None, None], 0).reshape(batch, num_heads, head_dim)


@jit
def _split_size(kv_len, splits, min_split, TILE: tl.constexpr):
    """Keys in each split of a sequence: whole tiles, never so few that a split costs more than it saves."""
    return tl.cdiv(tl.maximum(tl.cdiv(kv_len, splits), min_split), TILE) * TILE


@jit(do_not_specialize=["table_stride", "splits", "min_split"])  # they change from step to step
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    kv_lens,
    out,
    split_out,
    split_lse,
    log2_scale,
    q_stride_seq,
    q_stride_head,
    table_stride,
    splits,
    min_split,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One split of one sequence's keys for the query heads of one KV head."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    kv_head, seq, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_len = tl.load(kv_lens + seq)
    split_size = _split_size(kv_len, splits, min_split, TILE)
    start = split * split_size
    if (start >= kv_len) & (split > 0):  # split 0 of an empty sequence goes on, to write its zeros
        return
    end = tl.minimum(start + split_size, kv_len)

    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, GROUP_PADDED)[:, None]
    dim = tl.arange(0, HEAD_DIM_PADDED)[None, :]
    head = kv_head * GROUP + row
    q_mask = (row < GROUP) & (dim < HEAD_DIM)
    query = tl.load(q + seq.to(tl.int64) * q_stride_seq + head * q_stride_head + dim, mask=q_mask, other=0.0)

    block_tables += seq.to(tl.int64) * table_stride
    maximum = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    acc = tl.zeros((GROUP_PADDED, HEAD_DIM_PADDED), tl.float32)
    for tile in range(start, end, TILE):
        position = tile + tl.arange(0, TILE)
        block = tl.load(block_tables + position // BLOCK_SIZE, mask=position < end, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        offsets = (slot[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim
        mask = (position < end)[:, None] & (dim < HEAD_DIM)
        key = tl.load(k_cache + offsets, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
        scores = tl.where((position < end)[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        shrink = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])
        value = tl.load(v_cache + offsets, mask=mask, other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        maximum = new_maximum
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]

    out_row = seq.to(tl.int64) * HEADS + head
    if kv_len <= split_size:
        tl.store(out + out_row * HEAD_DIM + dim, acc.to(out.dtype.element_ty), mask=q_mask)
    else:
        out_row = out_row * splits + split
        tl.store(split_out + out_row * HEAD_DIM + dim, acc, mask=q_mask)
        tl.store(split_lse + out_row, (maximum + tl.log2(total))[:, None], mask=row < GROUP)


@jit(do_not_specialize=["splits", "min_split"])
def _combine_kernel(
    split_out,
    split_lse,
    kv_lens,
    out,
    splits,
    min_split,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The splits' outputs of one query head, weighted by their log-sum-exps."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    head, seq = tl.program_id(0), tl.program_id(1)
    kv_len = tl.load(kv_lens + seq)
    split_size = _split_size(kv_len, splits, min_split, TILE)
    if kv_len <= split_size:  # its only split has written the output itself
        return
    out_row = seq.to(tl.int64) * HEADS + head
    split = tl.arange(0, SPLITS_PADDED)
    used = split * split_size < kv_len
    lse = tl.load(split_lse + out_row * splits + split, mask=used, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    offsets = (out_row * splits + split)[:, None] * HEAD_DIM + dim[None, :]
    parts = tl.load(split_out + offsets, mask=used[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    result = tl.sum(parts * weights[:, None], axis=0)
    tl.store(out + out_row * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


class _Plan(NamedTuple):
    splits: int  # of one sequence, at most
    min_split: int  # keys
    tile: int  # keys
    num_warps: int


def _plan(pairs: int, max_kv_len: int, head_dim: int, dtype: torch.dtype) -> _Plan:
    """How to launch for `pairs` of sequence and KV head.

    About 2,048 programs fill the GPU. Large batches get several splits all the same, so that the GPU does not
    wait at the end for one long sequence among short ones. Small tiles leave room for many programs on each
    SM; with few programs each must have more in flight.
    """
    min_split = min(max(64, triton.next_power_of_2(pairs) // 2), 1024)
    splits = min(max(8, 2048 // pairs), _MAX_SPLITS, triton.cdiv(max_kv_len, min_split))
    if dtype == torch.float32:  # no tensor cores: large tiles spill
        return _Plan(splits, min_split, tile=16, num_warps=4)
    if pairs >= 1024 or head_dim > 128:
        return _Plan(splits, min_split, tile=32, num_warps=2)
    return _Plan(splits, min_split, tile=64, num_warps=4)


def _decode_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_kv_len: int,
) -> torch.Tensor:
    batch, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    plan = _plan(batch * kv_heads, max_kv_len, head_dim, q.dtype)
    split_out = torch.empty(batch, heads, plan.splits, head_dim, dtype=torch.float32, device=q.device)
    split_lse = torch.empty(batch, heads, plan.splits, dtype=torch.float32, device=q.device)
    shared = {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": triton.next_power_of_2(head_dim),
        "TILE": plan.tile,
        **dependent_launch(q.device),
    }
    _decode_kernel[(kv_heads, batch, plan.splits)](
        q,
        k_cache,
        v_cache,
        block_tables,
        kv_lens,
        out,
        split_out,
        split_lse,
        scale * _LOG2_E,
        *q.stride()[:2],
        block_tables.stride(0),
        plan.splits,
        plan.min_split,
        KV_HEADS=kv_heads,
        GROUP_PADDED=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_SIZE=block_size,
        num_warps=plan.num_warps,
        num_stages=2,
        **shared,
    )
    if plan.splits > 1:
        _combine_kernel[(heads, batch)](
            split_out,
            split_lse,
            kv_lens,
            out,
            plan.splits,
            plan.min_split,
            SPLITS_PADDED=16 if plan.splits <= 16 else _MAX_SPLITS,
            **shared,
        )
    return out


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    max_kv_len: int,
) -> torch.Tensor:
    """softmax(q · Kᵀ · scale) · V over each sequence's cached keys; the newest token's are already stored.

    q: [B, Hq, D], contiguous along D. k_cache, v_cache: [num_blocks, block_size, Hkv, D], contiguous.
    block_tables: [B, max_blocks] int32, anything past a sequence's end. kv_lens: [B] int32; 0 gives zeros.
    max_kv_len: an upper bound of `kv_lens` known to the host, at most max_blocks · block_size. Returns
    [B, Hq, D] in q's dtype.

    On CUDA the launch depends on nothing but the arguments' shapes and `max_kv_len`, so that a graph can
    capture it: FlashDecoding (pytorch.org/blog/flash-decoding), with splits that follow the lengths.
    """
    op = _decode_attention_triton if q.is_cuda else decode_attention_reference
    return op(q, k_cache, v_cache, block_tables, kv_lens, scale, max_kv_len)
