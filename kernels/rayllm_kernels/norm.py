"""Root-mean-square normalisation, fused with the residual addition before it."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import overload

import torch

from rayllm_kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait, jit, tl, triton


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `rms_norm`. On a CPU several times as fast as torch's own, which takes the mean in one thread."""
    x = x if residual is None else x + residual
    value = x.float()
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normalised = (value * scale).mul_(weight).to(x.dtype)
    return normalised if residual is None else (normalised, x)


@jit(do_not_specialize=["rows"])  # it changes every step
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    residual_out,
    rows,
    inner,
    x_stride_outer,
    x_stride_inner,
    residual_stride_outer,
    residual_stride_inner,
    eps,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH_PADDED)[None, :]
    mask = (row < rows) & (column < WIDTH)
    outer_index, inner_index = row // inner, row % inner
    x += outer_index * x_stride_outer + inner_index * x_stride_inner
    value = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual += outer_index * residual_stride_outer + inner_index * residual_stride_inner
        value += tl.load(residual + column, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(residual_out.dtype.element_ty)
        tl.store(residual_out + row * WIDTH + column, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None]
    value = value * scale * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=mask)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] → [outer, inner, H], contiguous along H; without a copy for two or three dimensions."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])


def _rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    width_padded = triton.next_power_of_2(width)
    x_rows = _as_rows(x)
    residual_rows = x_rows if residual is None else _as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = out if residual is None else torch.empty_like(out)
    rows = x.numel() // width
    rows_per_program = max(1, 1024 // width_padded)
    if rows > 0:
        _rms_norm_kernel[(triton.cdiv(rows, rows_per_program),)](
            x_rows,
            residual_rows,
            weight,
            out,
            residual_out,
            rows,
            x_rows.shape[1],
            *x_rows.stride()[:2],
            *residual_rows.stride()[:2],
            eps,
            WIDTH=width,
            WIDTH_PADDED=width_padded,
            ROWS=rows_per_program,
            HAS_RESIDUAL=residual is not None,
            num_warps=min(max(width_padded // 512, 4), 16),
            **dependent_launch(x.device),
        )
    return out if residual is None else (out, residual_out)


@overload
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: None = None) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x / √(mean(x²) + eps) · weight over the last dimension, computed in float32 (arXiv:1910.07467).

    x: [..., H]. weight: [H]. Without `residual` ([..., H]) returns the normalised x. With it returns
    (normalised, new residual), where the new residual x + residual is what is normalised.
    """
    op = _rms_norm_triton if x.is_cuda else rms_norm_reference
    return op(x, weight, eps, residual)
