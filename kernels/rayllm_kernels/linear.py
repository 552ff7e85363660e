"""Products with a model's weights: torch's own on a GPU, but for a single token our own; on a CPU oneDNN's, from
weights in its blocked layout."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import torch.nn.functional as F

from rayllm_kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait, jit, tl, triton

_ROWS_HINT = 8
"""Rows of x that oneDNN chooses the layout for; it serves other numbers as well."""


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Specifies `linear`."""
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


@jit
def _token_linear_kernel(
    x,
    weight,
    bias,
    out,
    outputs,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`ROWS` outputs of one token. It is all about reading the weights: a tile is under way while one is multiplied,
    and the first before the kernel that makes x has ended."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    weight += row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    mask = (row < outputs)[:, None]
    tile = tl.load(weight, mask=mask & (column < WIDTH)[None, :], other=0.0)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, WIDTH, TILE):
        next_column = start + TILE + column
        next_tile = tl.load(weight + start + TILE, mask=mask & (next_column < WIDTH)[None, :], other=0.0)
        value = tl.load(x + start + column, mask=start + column < WIDTH, other=0.0).to(tl.float32)
        total += tile.to(tl.float32) * value[None, :]
        tile = next_tile
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < outputs)


def _token_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    outputs, width = weight.shape
    if out is None:
        out = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    rows, tile = 4, min(1024, triton.next_power_of_2(width) // 2)
    _token_linear_kernel[(triton.cdiv(outputs, rows),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        outputs,
        WIDTH=width,
        HAS_BIAS=bias is not None,
        ROWS=rows,
        TILE=tile,
        num_warps=max(1, tile // 256),
        **dependent_launch(x.device),
    )
    return out


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K], contiguous, · weightᵀ + bias [N] → [T, N], in `out` if that is given; `weight` [N, K], contiguous.

    All are of one floating-point dtype; sums are of float32.
    """
    if weight.is_cuda and len(x) == 1 and x.dtype != torch.float32:
        return _token_linear_triton(x, weight, bias, out)
    return linear_reference(x, weight, bias, out)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of `weight` [N, K], float32 on a CPU, in oneDNN's blocked layout, for `packed_linear`."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
    return packed


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], contiguous, · weightᵀ + bias [N] → [T, N], all float32; `weight` is from `pack_weight`."""
    if not len(x):  # which oneDNN refuses
        return x.new_empty(0, weight.shape[0])
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
