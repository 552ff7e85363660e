"""The gated activation of the MLP."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import torch.nn.functional as F

from rayllm_kernels._triton import dependent_launch, gdc_launch_dependents, gdc_wait, jit, tl, triton


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """See `silu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@jit
def _silu_and_mul_kernel(x, out, x_stride, width, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(x + row * x_stride + column, mask=mask).to(tl.float32)
    up = tl.load(x + row * x_stride + width + column, mask=mask).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=mask)


def _silu_and_mul_triton(x: torch.Tensor) -> torch.Tensor:
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows > 0:
        grid = (rows, triton.cdiv(width, 1024))
        _silu_and_mul_kernel[grid](x, out, x.stride(0), width, BLOCK=1024, **dependent_launch(x.device))
    return out


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU (arXiv:2002.05202): [T, 2I], contiguous along 2I → [T, I], silu(x[:, :I]) · x[:, I:]."""
    return _silu_and_mul_triton(x) if x.is_cuda else silu_and_mul_reference(x)
