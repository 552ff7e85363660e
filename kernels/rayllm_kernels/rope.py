"""Rotary position embedding, fused with what stands around it: the per-head normalisation that some models put before
it, and the store of the step's keys and values into the KV cache."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import NamedTuple

import torch

from rayllm_kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait, jit, tl, triton
from rayllm_kernels.norm import rms_norm


class Rope(NamedTuple):
    """How queries and keys are rotated."""

    positions: torch.Tensor
    """[T] int64."""
    cos_sin_cache: torch.Tensor
    """[max_pos, D] float32: D/2 cosines, then D/2 sines."""
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None
    """(weight of q's norm [D], of k's [D], eps): each head is normalised first, as `rms_norm` does."""


def apply_rope_reference(q: torch.Tensor, k: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotated (q, k); see `rope_and_store`."""
    if rope.norms is not None:
        q_weight, k_weight, eps = rope.norms
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    pair = (2, q.shape[-1] // 2)
    cos, sin = rope.cos_sin_cache.index_select(0, rope.positions).unflatten(-1, (1, *pair)).split(1, dim=2)
    x = torch.cat((q, k), dim=1).float().unflatten(-1, pair)
    rotated = x * cos
    rotated[:, :, :1].addcmul_(x[:, :, 1:], sin, value=-1)
    rotated[:, :, 1:].addcmul_(x[:, :, :1], sin)
    q_rotated, k_rotated = rotated.flatten(2).to(q.dtype).split((q.shape[1], k.shape[1]), dim=1)
    return q_rotated, k_rotated


def rope_and_store_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """See `rope_and_store`."""
    q, k = apply_rope_reference(q, k, rope)
    written = slot_mapping >= 0
    if not written.all():
        k, v, slot_mapping = k[written], v[written], slot_mapping[written]
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.view(-1, *new.shape[1:]).index_copy_(0, slot_mapping, new)
    return q


@jit
def _rotate(
    x,
    out,
    weight,
    heads,
    stride_head,
    out_stride_head,
    cos,
    sin,
    eps,
    HALF: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    half,
    NORM: tl.constexpr,
):
    head = tl.arange(0, HEADS_PADDED)[:, None]
    mask = (head < heads) & (half < HALF)
    x += head * stride_head + half
    x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF) + eps)[:, None]
        x1 *= scale * tl.load(weight + half, mask=half < HALF, other=0.0).to(tl.float32)
        x2 *= scale * tl.load(weight + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
    out += head * out_stride_head + half
    tl.store(out, (x1 * cos - x2 * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (x2 * cos + x1 * sin).to(out.dtype.element_ty), mask=mask)


@jit
def _rope_and_store_kernel(
    q,
    k,
    v,
    positions,
    cos_sin_cache,
    q_weight,
    k_weight,
    eps,
    k_cache,
    v_cache,
    slot_mapping,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_HEADS_PADDED: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One token: its queries in place, its keys and values to its slot."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    HEAD_DIM: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    half = tl.arange(0, HALF_PADDED)[None, :]
    cos_sin_cache += tl.load(positions + token) * HEAD_DIM + half
    cos = tl.load(cos_sin_cache, mask=half < HALF)
    sin = tl.load(cos_sin_cache + HALF, mask=half < HALF)
    q += token * q_stride_token
    k += token * k_stride_token
    v += token * v_stride_token
    k_cache += slot * (KV_HEADS * HEAD_DIM)
    v_cache += slot * (KV_HEADS * HEAD_DIM)
    _rotate(q, q, q_weight, Q_HEADS, q_stride_head, q_stride_head, cos, sin, eps, HALF, Q_HEADS_PADDED, half, NORM)
    num_stored = tl.where(slot >= 0, KV_HEADS, 0)
    _rotate(k, k_cache, k_weight, num_stored, k_stride_head, HEAD_DIM, cos, sin, eps, HALF, KV_HEADS_PADDED, half, NORM)
    head = tl.arange(0, KV_HEADS_PADDED)[:, None]
    dim = tl.arange(0, 2 * HALF_PADDED)[None, :]
    mask = (head < num_stored) & (dim < HEAD_DIM)
    value = tl.load(v + head * v_stride_head + dim, mask=mask)
    tl.store(v_cache + head * HEAD_DIM + dim, value, mask=mask)


def _rope_and_store_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    tokens, q_heads, head_dim = q.shape
    kv_heads, half = k.shape[1], head_dim // 2
    table = rope.cos_sin_cache
    q_weight, k_weight, eps = rope.norms or (table, table, 0.0)
    if tokens > 0:
        _rope_and_store_kernel[(tokens,)](
            q,
            k,
            v,
            rope.positions,
            table,
            q_weight,
            k_weight,
            eps,
            k_cache,
            v_cache,
            slot_mapping,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            Q_HEADS_PADDED=triton.next_power_of_2(q_heads),
            KV_HEADS_PADDED=triton.next_power_of_2(kv_heads),
            HALF=half,
            HALF_PADDED=triton.next_power_of_2(half),
            NORM=rope.norms is not None,
            **dependent_launch(q.device),
        )
    return q


def rope_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Rotates pairs (x[i], x[i + D/2]) of q and k by the angles of their token's position (arXiv:2104.09864; paired as
    in Hugging Face's Llama), and writes token t's keys and values into slot `slot_mapping[t]` of their caches.

    q: [T, Hq, D]; k, v: [T, Hkv, D]; each contiguous along D. k_cache, v_cache: [num_blocks, block_size, Hkv, D],
    contiguous. slot_mapping: [T] int64, block · block_size + offset; −1 is padding and is not written. Returns the
    rotated q, perhaps in q's own memory.
    """
    op = _rope_and_store_triton if q.is_cuda else rope_and_store_reference
    return op(q, k, v, rope, k_cache, v_cache, slot_mapping)
