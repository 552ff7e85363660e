"""Causal attention of prompt chunks of several sequences over the KV cache."""

# mypy: allow-untyped-defs
from __future__ import annotations

import os
from functools import cache

import torch
import torch.nn.functional as F

from rayllm_kernels._triton import jit, tl, triton
from rayllm_kernels.paged_kv import PagedKV

_LOG2_E = 1.4426950408889634  # the kernel uses powers of two, which the GPU computes directly


def prefill_attention_reference(
    q: torch.Tensor, kv: PagedKV, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, scale: float
) -> torch.Tensor:
    """See `prefill_attention`. One call of torch's SDPA per sequence."""
    k_cache, v_cache, block_tables, kv_lens, _ = kv
    block_size = k_cache.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts = cu_seqlens_q.tolist()
    for row, (start, end, kv_len) in enumerate(zip(starts[:-1], starts[1:], kv_lens.tolist(), strict=True)):
        if start == end:
            continue
        blocks = block_tables[row, : -(-kv_len // block_size)]
        keys, values = (cache.index_select(0, blocks).flatten(0, 1)[:kv_len] for cache in (k_cache, v_cache))
        context, mask = kv_len - (end - start), None
        if context:
            mask = torch.ones(end - start, kv_len, dtype=torch.bool, device=q.device).tril_(context)
        # SDPA takes [batch, heads, tokens, D].
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q[start:end], keys, values))
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        out[start:end] = attended.squeeze(0).transpose(0, 1)
    return out


@jit
def _attend(
    query,
    query_position,
    acc,
    maximum,
    total,
    start,
    end,
    k,
    v,
    k_stride_token,
    v_stride_token,
    block_table,
    log2_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One online-softmax pass of a query tile over keys start … end; MASKED where the tile's diagonal or the
    end of the keys may fall into it."""
    dim = tl.arange(0, HEAD_DIM_PADDED)[None, :]
    for tile in range(start, end, TILE_N):
        position = tile + tl.arange(0, TILE_N)
        block = tl.load(block_table + position // BLOCK_SIZE, mask=position < end, other=0).to(tl.int64)
        token = block * BLOCK_SIZE + position % BLOCK_SIZE
        mask = dim < HEAD_DIM
        if MASKED:
            mask = mask & (position < end)[:, None]
        key = tl.load(k + token[:, None] * k_stride_token + dim, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
        if MASKED:
            scores = tl.where(position[None, :] <= query_position[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        shrink = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum[:, None])
        value = tl.load(v + token[:, None] * v_stride_token + dim, mask=mask, other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
        maximum = new_maximum
    return acc, maximum, total


@jit(do_not_specialize=["block_tables", "kv_lens", "table_stride"])  # slices of a step's rows, aligned or not
def _prefill_kernel(
    q,
    k,
    v,
    block_tables,
    cu_seqlens_q,
    kv_lens,
    out,
    log2_scale,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    table_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """One tile of one chunk's queries, one head. k and v are the caches, [slots, Hkv, D]."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = tl.num_programs(2) - 1 - tl.program_id(2)  # the last queries have the most keys: start them first
    chunk_start = tl.load(cu_seqlens_q + chunk).to(tl.int64)
    query_len = (tl.load(cu_seqlens_q + chunk + 1) - chunk_start).to(tl.int32)
    if tile * TILE_M >= query_len:
        return
    kv_len = tl.load(kv_lens + chunk)

    row = tile * TILE_M + tl.arange(0, TILE_M)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    mask = (row < query_len)[:, None] & (dim < HEAD_DIM)[None, :]
    q += (chunk_start + row)[:, None] * q_stride_token + head * q_stride_head + dim[None, :]
    query = tl.load(q, mask=mask, other=0.0)
    k += head // GROUP * k_stride_head
    v += head // GROUP * v_stride_head
    block_table = block_tables + chunk.to(tl.int64) * table_stride

    # Keys before `diagonal` are seen by every query of the tile; rows past the chunk's end see the last key.
    first = kv_len - query_len + tile * TILE_M
    query_position = tl.minimum(kv_len - query_len + row, kv_len - 1)
    diagonal = (first + 1) // TILE_N * TILE_N
    end = tl.minimum(first + TILE_M, kv_len)
    maximum = tl.full((TILE_M,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    acc = tl.zeros((TILE_M, HEAD_DIM_PADDED), tl.float32)
    acc, maximum, total = _attend(
        query, query_position, acc, maximum, total, 0, diagonal, k, v, k_stride_token, v_stride_token,
        block_table, log2_scale, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, TILE_N, MASKED=False,
    )  # fmt: skip
    acc, maximum, total = _attend(
        query, query_position, acc, maximum, total, diagonal, end, k, v, k_stride_token, v_stride_token,
        block_table, log2_scale, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, TILE_N, MASKED=True,
    )  # fmt: skip
    acc = acc / total[:, None]
    out += ((chunk_start + row)[:, None] * HEADS + head) * HEAD_DIM + dim[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=mask)


def _prefill_attention_triton(
    q: torch.Tensor, kv: PagedKV, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, scale: float
) -> torch.Tensor:
    k_cache, v_cache, block_tables, kv_lens, _ = kv
    tokens, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    k, v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    if q.dtype == torch.float32:  # no tensor cores: large tiles spill
        tile_m, tile_n, num_stages = 32, 16, 1
    else:
        tile_m, tile_n, num_stages = 128, 64 if head_dim <= 128 else 32, 2
    _prefill_kernel[(heads, len(kv_lens), triton.cdiv(max_seqlen_q, tile_m))](
        q,
        k,
        v,
        block_tables,
        cu_seqlens_q,
        kv_lens,
        out,
        scale * _LOG2_E,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        block_tables.stride(0),
        HEADS=heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        TILE_M=tile_m,
        TILE_N=tile_n,
        num_warps=8,
        num_stages=num_stages,
    )
    return out


_FLASH_MIN_SEQLEN = 1024
"""FlashAttention-4 compiles, for seconds, another kernel where chunks are known to be short, which gains nothing."""


@cache
def _flash_attn_4_refusal(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashAttention-4 cannot be used, or None."""
    capability = torch.cuda.get_device_capability()
    where = "compute capability {}.{}".format(*capability)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-4 takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if capability[0] not in (9, 10, 11):
        return f"FlashAttention-4 reads no block tables on {where}"
    if head_dim % 8 or head_dim > (256 if capability[0] == 9 else 128):
        return f"FlashAttention-4 has no head dimension {head_dim} on {where}"
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # what it compiles is kept on disk
    try:
        import flash_attn.cute  # noqa: F401
    except (ImportError, RuntimeError, OSError, KeyError) as error:  # half of its packages; nowhere to keep its kernels
        return f"FlashAttention-4 cannot be imported ({error})".splitlines()[0]
    return None


def _prefill_attention_flash(
    q: torch.Tensor, kv: PagedKV, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, scale: float
) -> torch.Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    out, _ = flash_attn_varlen_func(
        q,
        kv.k_cache,
        kv.v_cache,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=kv.kv_lens,
        page_table=kv.block_tables,
        max_seqlen_q=max(max_seqlen_q, _FLASH_MIN_SEQLEN),
        max_seqlen_k=kv.max_kv_len,
        softmax_scale=scale,
        causal=True,
    )
    return out


def prefill_backend(dtype: torch.dtype, head_dim: int = 128) -> str:
    """What `prefill_attention` runs on here, in one line: "flash_attn_4", or "triton" or "torch" and why."""
    if not torch.cuda.is_available():
        return "torch: there is no GPU"
    refusal = _flash_attn_4_refusal(dtype, head_dim)
    return "flash_attn_4" if refusal is None else f"triton: {refusal}"


def prefill_attention(
    q: torch.Tensor, kv: PagedKV, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, scale: float
) -> torch.Tensor:
    """Attention of P chunks, one after the other: query i of chunk p sees its sequence's keys
    0 … kv_lens[p] − qlen_p + i.

    q: [T, Hq, D], contiguous along D. kv: the cache of the P sequences, whose unused slots must be finite (zeros will
    do: FlashAttention-4 multiplies them by a weight of 0). cu_seqlens_q: [P + 1] int32, where each chunk starts, and
    where the last ends. max_seqlen_q: an upper bound of the chunks' lengths, known to the host. Returns [T, Hq, D] in
    q's dtype; rows before the first chunk and after the last are left undefined.

    On CUDA the launch depends on shapes and host numbers alone, so that a graph can capture it.
    """
    if not q.is_cuda:
        op = prefill_attention_reference
    elif _flash_attn_4_refusal(q.dtype, q.shape[2]) is None:
        op = _prefill_attention_flash
    else:
        op = _prefill_attention_triton
    return op(q, kv, cu_seqlens_q, max_seqlen_q, scale)
