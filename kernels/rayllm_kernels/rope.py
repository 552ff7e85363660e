"""Rotary position embedding, fused with the per-head normalisation that some models put before it."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch

from rayllm_kernels._triton import jit, tl, triton
from rayllm_kernels.norm import rms_norm

Norms = tuple[torch.Tensor, torch.Tensor, float]


def apply_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    norms: Norms | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `apply_rope`; leaves its inputs as they are."""
    if norms is not None:
        q_weight, k_weight, eps = norms
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    pair = (2, q.shape[-1] // 2)
    cos, sin = cos_sin_cache.index_select(0, positions).unflatten(-1, (1, *pair)).split(1, dim=2)
    x = torch.cat((q, k), dim=1).float().unflatten(-1, pair)
    rotated = x * cos
    rotated[:, :, :1].addcmul_(x[:, :, 1:], sin, value=-1)
    rotated[:, :, 1:].addcmul_(x[:, :, :1], sin)
    q_rotated, k_rotated = rotated.flatten(2).to(q.dtype).split((q.shape[1], k.shape[1]), dim=1)
    return q_rotated, k_rotated


@jit
def _rotate(
    x,
    weight,
    heads,
    stride_head,
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
    tl.store(x, (x1 * cos - x2 * sin).to(x.dtype.element_ty), mask=mask)
    tl.store(x + HALF, (x2 * cos + x1 * sin).to(x.dtype.element_ty), mask=mask)


@jit
def _apply_rope_kernel(
    q,
    k,
    positions,
    cos_sin_cache,
    q_weight,
    k_weight,
    eps,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    Q_HEADS_PADDED: tl.constexpr,
    K_HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF_PADDED)[None, :]
    cos_sin_cache += tl.load(positions + token) * (2 * HALF) + half
    cos = tl.load(cos_sin_cache, mask=half < HALF)
    sin = tl.load(cos_sin_cache + HALF, mask=half < HALF)
    q += token * q_stride_token
    k += token * k_stride_token
    _rotate(q, q_weight, Q_HEADS, q_stride_head, cos, sin, eps, HALF, Q_HEADS_PADDED, half, NORM)
    _rotate(k, k_weight, K_HEADS, k_stride_head, cos, sin, eps, HALF, K_HEADS_PADDED, half, NORM)


def _apply_rope_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    norms: Norms | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes over q and k."""
    tokens, q_heads, head_dim = q.shape
    k_heads, half = k.shape[1], head_dim // 2
    q_weight, k_weight, eps = norms or (cos_sin_cache, cos_sin_cache, 0.0)
    if tokens > 0:
        _apply_rope_kernel[(tokens,)](
            q,
            k,
            positions,
            cos_sin_cache,
            q_weight,
            k_weight,
            eps,
            *q.stride()[:2],
            *k.stride()[:2],
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            Q_HEADS_PADDED=triton.next_power_of_2(q_heads),
            K_HEADS_PADDED=triton.next_power_of_2(k_heads),
            HALF=half,
            HALF_PADDED=triton.next_power_of_2(half),
            NORM=norms is not None,
        )
    return q, k


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    norms: Norms | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates pairs (x[i], x[i + D/2]) by the angles of their token's position (arXiv:2104.09864; paired as
    in Hugging Face's Llama). May write the result over q and k: use what it returns.

    q: [T, Hq, D], k: [T, Hkv, D], contiguous along D. positions: [T] int64. cos_sin_cache: [max_pos, D]
    float32, D/2 cosines, then D/2 sines. norms: (weight of q's norm [D], of k's [D], eps) normalises each head
    first, as `rms_norm` does. Returns the rotated (q, k).
    """
    op = _apply_rope_triton if q.is_cuda else apply_rope_reference
    return op(q, k, positions, cos_sin_cache, norms)
