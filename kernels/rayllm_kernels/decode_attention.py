"""Attention of one query token per sequence over the KV cache."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from rayllm_kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait, jit, tl, triton
from rayllm_kernels.paged_kv import PagedKV

_LOG2_E = 1.4426950408889634  # the kernels use powers of two, which the GPU computes directly


def decode_attention_reference(
    q: torch.Tensor,
    kv: PagedKV,
    scale: float,
    items: DecodeItems | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `decode_attention`. Gathers each sequence's keys, padded to `max_kv_len`, for torch's SDPA."""
    k_cache, v_cache, block_tables, kv_lens, max_kv_len = kv
    batch, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    # The query heads of a KV group are rows of one attention problem.
    grouped = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    blocks = block_tables[:, : -(-max_kv_len // block_size)]

    def gather(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        keys = cache.index_select(0, rows.flatten())  # copies whole rows, indexing would copy numbers
        return keys.view(batch, -1, num_kv_heads, head_dim)[:, :max_kv_len].transpose(1, 2)

    mask = torch.arange(max_kv_len, device=q.device) < kv_lens.unsqueeze(1)
    if mask.all():
        k, v = (gather(cache, blocks) for cache in (k_cache, v_cache))
        result = F.scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(q.shape)
        return result if out is None else out.copy_(result)
    slots = (blocks.unsqueeze(2) * block_size + torch.arange(block_size, device=q.device)).flatten(1)[:, :max_kv_len]
    # Past a sequence's end its first slot is read again: the table may hold garbage there, an unused slot NaN.
    slots = slots.where(mask, slots[:, :1] * mask[:, :1])
    k, v = (gather(cache.flatten(0, 1), slots) for cache in (k_cache, v_cache))
    result = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask[:, None, None], scale=scale).reshape(q.shape)
    out = torch.empty_like(result) if out is None else out
    return out.copy_(result.where(mask[:, :1, None], out))


@jit(do_not_specialize=["batch", "num_items", "min_split"])
def _divide_kernel(
    kv_lens,
    items,
    batch,
    num_items,
    min_split,
    ROUND: tl.constexpr,
    BATCH_PADDED: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Which keys each item attends to: sequences are cut into splits of one size, no more of them than there are items.

    `ceil(n / size)` summed over the sequences is at most the sum of n / size plus the number of sequences.
    """
    seq = tl.arange(0, BATCH_PADDED)
    kv_len = tl.load(kv_lens + seq, mask=seq < batch, other=0)
    size = tl.maximum(tl.cdiv(tl.sum(kv_len), num_items - batch), min_split)
    size = tl.cdiv(size, ROUND) * ROUND
    count = tl.cdiv(kv_len, size)
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_before = tl.cumsum(count)[None, :] <= item[:, None]
    owner = tl.sum(is_before.to(tl.int32), axis=1)
    first = tl.sum(tl.where(is_before, count[None, :], 0), axis=1)
    mask = item < num_items
    owner_len = tl.load(kv_lens + owner, mask=owner < batch, other=0)
    start = (item - first) * size
    tl.store(items + item, tl.where(owner < batch, owner, -1), mask=mask)
    tl.store(items + num_items + item, start, mask=mask)
    tl.store(items + 2 * num_items + item, tl.minimum(start + size, owner_len), mask=mask)
    tl.store(items + 3 * num_items + item, first, mask=mask)
    tl.store(items + 4 * num_items + item, tl.cdiv(owner_len, size), mask=mask)


@jit
def _combine(
    out,
    split_out,
    split_lse,
    first,
    count,
    first_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The outputs of a sequence's splits, items `first` and after, weighted by their log-sum-exps."""
    group, dim = tl.arange(0, GROUP_PADDED), tl.arange(0, HEAD_DIM_PADDED)
    mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    maximum = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    acc = tl.zeros((GROUP_PADDED, HEAD_DIM_PADDED), tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        row = (first + part).to(tl.int64)[:, None] * HEADS + first_head + group[None, :]
        is_part = (part < count)[:, None] & (group < GROUP)[None, :]
        lse = tl.load(split_lse + row, mask=is_part, other=float("-inf"))
        offsets = row[:, :, None] * HEAD_DIM + dim[None, None, :]
        outputs = tl.load(split_out + offsets, mask=is_part[:, :, None] & mask[None, :, :], other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(lse, axis=0))
        shrink = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(lse - new_maximum[None, :])
        total = total * shrink + tl.sum(weights, axis=0)
        acc = acc * shrink[:, None] + tl.sum(outputs * weights[:, :, None], axis=0)
        maximum = new_maximum
    out += (first_head + group)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["table_stride", "num_items"])  # they change from step to step
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    items,
    arrivals,
    out,
    split_out,
    split_lse,
    log2_scale,
    q_stride_seq,
    q_stride_head,
    table_stride,
    num_items,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One item, a split of one sequence's keys, for the query heads of one KV head."""
    kv_head, item = tl.program_id(0), tl.program_id(1)
    seq = tl.load(items + item).to(tl.int64)  # an ordinary kernel lies between that and this one
    start = tl.load(items + num_items + item)
    end = tl.load(items + 2 * num_items + item)
    first = tl.load(items + 3 * num_items + item)
    count = tl.load(items + 4 * num_items + item)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    if seq < 0:
        return

    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.arange(0, GROUP_PADDED)[:, None]
    dim = tl.arange(0, HEAD_DIM_PADDED)[None, :]
    head = kv_head * GROUP + row
    q_mask = (row < GROUP) & (dim < HEAD_DIM)
    query = tl.load(q + seq * q_stride_seq + head * q_stride_head + dim, mask=q_mask, other=0.0)

    block_tables += seq * table_stride
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
    acc = acc / total[:, None]

    out += seq * HEADS * HEAD_DIM
    if count == 1:
        tl.store(out + head * HEAD_DIM + dim, acc.to(out.dtype.element_ty), mask=q_mask)
    else:
        split_row = item.to(tl.int64) * HEADS + head
        tl.store(split_out + split_row * HEAD_DIM + dim, acc, mask=q_mask)
        tl.store(split_lse + split_row, (maximum + tl.log2(total))[:, None], mask=row < GROUP)
        tl.debug_barrier()  # all threads have stored before one says so
        arrivals += seq * KV_HEADS + kv_head
        if tl.atomic_add(arrivals, 1, sem="acq_rel") == count - 1:  # the last split puts them all together
            tl.store(arrivals, 0)
            _combine(
                out, split_out, split_lse, first, count, kv_head * GROUP,
                HEADS, GROUP, PARTS_GROUP, HEAD_DIM, HEAD_DIM_PADDED, PARTS,
            )  # fmt: skip


class DecodeItems(NamedTuple):
    """How the decode attention of one step is divided among programs, on the device; the same for all layers."""

    items: torch.Tensor
    """[5, N] int32: an item's sequence, −1 for none, its first key and the one after its last; the first item of that
    sequence, and how many it has."""
    arrivals: torch.Tensor
    """[B, Hkv] int32: splits that have arrived; zeros before and after each layer."""


class _Plan(NamedTuple):
    num_items: int
    min_split: int  # keys
    tile: int  # keys


def _plan(batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> _Plan:
    """How to launch; measured on an H100 with 8 KV heads.

    There are more items than sequences, so that the GPU does not wait at the end for one long sequence among short
    ones; but few splits are best where the sequences alone fill it. Every item is a program for each KV head.
    """
    num_items = batch + min(-(-256 // kv_heads) * batch, max(2048 // kv_heads, 2 * batch))
    min_split = min(max(64, 24 * batch), 1024)
    if dtype == torch.float32:  # no tensor cores: large tiles spill
        return _Plan(num_items, min_split, tile=16)
    return _Plan(num_items, min_split, tile=64 if head_dim <= 128 else 32)


def _divide_triton(kv_lens: torch.Tensor, plan: _Plan, kv_heads: int) -> DecodeItems:
    batch = len(kv_lens)
    items = torch.empty(5, plan.num_items, dtype=torch.int32, device=kv_lens.device)
    batch_padded = max(256, triton.next_power_of_2(batch))  # one compilation for all smaller ones
    chunk = max(1, 2**15 // batch_padded)
    _divide_kernel[(triton.cdiv(plan.num_items, chunk),)](
        kv_lens,
        items,
        batch,
        plan.num_items,
        plan.min_split,
        ROUND=64,
        BATCH_PADDED=batch_padded,
        ITEMS=chunk,
    )
    # The zeros' kernel lies between: `_decode_kernel` reads items before the kernel just before it has ended.
    return DecodeItems(items, torch.zeros(batch, kv_heads, dtype=torch.int32, device=kv_lens.device))


def _decode_attention_triton(
    q: torch.Tensor,
    kv: PagedKV,
    scale: float,
    items: DecodeItems | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    k_cache, v_cache, block_tables, kv_lens, _ = kv
    batch, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    if out is None:
        out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    plan = _plan(batch, kv_heads, head_dim, q.dtype)
    work, arrivals = items or _divide_triton(kv_lens, plan, kv_heads)
    num_items = work.shape[1]
    group, head_dim_padded = (triton.next_power_of_2(n) for n in (heads // kv_heads, head_dim))
    _decode_kernel[(kv_heads, num_items)](
        q,
        k_cache,
        v_cache,
        block_tables,
        work,
        arrivals,
        out,
        torch.empty(num_items, heads, head_dim, dtype=torch.float32, device=q.device),
        torch.empty(num_items, heads, dtype=torch.float32, device=q.device),
        scale * _LOG2_E,
        *q.stride()[:2],
        block_tables.stride(0),
        num_items,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=head_dim_padded,
        GROUP_PADDED=max(16, group),
        BLOCK_SIZE=block_size,
        TILE=plan.tile,
        PARTS=max(2, 4096 // (group * head_dim_padded)),
        PARTS_GROUP=group,
        num_warps=4,
        num_stages=2,
        **dependent_launch(q.device),
    )
    return out


def divide_decodes(kv_lens: torch.Tensor, k_cache: torch.Tensor) -> DecodeItems | None:
    """What `decode_attention` shares among the layers of a step with `kv_lens` [B] int32; None where it needs nothing.

    `k_cache` is any layer's. On CUDA the launch depends on shapes alone.
    """
    if not kv_lens.is_cuda or not len(kv_lens):
        return None
    kv_heads, head_dim = k_cache.shape[2:]
    return _divide_triton(kv_lens, _plan(len(kv_lens), kv_heads, head_dim, k_cache.dtype), kv_heads)


def decode_attention(
    q: torch.Tensor,
    kv: PagedKV,
    scale: float,
    items: DecodeItems | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q · Kᵀ · scale) · V over each sequence's cached keys, one query each.

    q: [B, Hq, D], contiguous along D. CUDA does not need `kv.max_kv_len`. items: from `divide_decodes`, by default made
    here. Returns [B, Hq, D] in q's dtype, in `out` if that is given, contiguous; a sequence without keys leaves its row
    there as it was.

    On CUDA the launch depends on nothing but the arguments' shapes, so that a graph can capture it: FlashDecoding
    (pytorch.org/blog/flash-decoding), with splits of one size for all sequences, and the last of a sequence's splits
    to end combines them.
    """
    op = _decode_attention_triton if q.is_cuda else decode_attention_reference
    return op(q, kv, scale, items, out)
