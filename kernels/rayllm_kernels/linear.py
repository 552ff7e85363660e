"""Products with a model's weights. On a GPU torch's own; on a CPU oneDNN's, from weights in its blocked layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ROWS_HINT = 8
"""Rows of x that oneDNN chooses the layout for; it serves other numbers as well."""


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `linear`; `weight` is plain."""
    return F.linear(x, weight, bias)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [N, K] as `linear` reads it fastest: a copy in oneDNN's layout for float32 on a CPU, else itself.

    Rows are few when decoding, and then the plain layout keeps the product at half the memory's bandwidth.
    """
    if weight.is_cuda or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return weight
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT)
    return packed


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] · weightᵀ + bias [N] → [T, N]; `weight` [N, K] is plain or from `pack_weight`."""
    if not weight.is_mkldnn:
        return linear_reference(x, weight, bias)
    if not len(x):
        return x.new_empty(0, weight.shape[0])
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
