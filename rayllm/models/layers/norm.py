"""Root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from rayllm_kernels import rms_norm
from torch import nn

from rayllm.models.layers.slices import WeightSlice, empty_parameter


class RMSNorm(nn.Module):
    """Normalises the last dimension, `size` wide; whole on every rank."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=dtype)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] of the model's dtype → the same shape and dtype, normalised and scaled by the weight."""
        return cast(torch.Tensor, rms_norm(x, self.weight, self.eps))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [..., size] → (their sum normalised, their sum), of the same shape and dtype."""
        return cast(tuple[torch.Tensor, torch.Tensor], rms_norm(x, self.weight, self.eps, residual))

    def weight_slices(self, name: str) -> Iterator[WeightSlice]:
        """What this rank takes of the checkpoint's `name` + '.weight': all of it."""
        yield WeightSlice(f"{name}.weight", self.weight, tuple(self.weight.shape))
