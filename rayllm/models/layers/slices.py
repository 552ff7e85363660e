"""What a shard's parameters take from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Split:
    """The part [start : start + size] of `total` rows or columns in the whole model."""

    total: int
    start: int
    size: int

    @classmethod
    def whole(cls, total: int) -> Split:
        """All `total` rows or columns."""
        return cls(total, 0, total)

    @classmethod
    def even(cls, total: int, rank: int, shards: int) -> Split:
        """Part `rank` of `shards` equal ones, into which `total` must divide."""
        size = total // shards
        return cls(total, rank * size, size)


@dataclass(frozen=True)
class WeightSlice:
    """`target`, a view of a parameter, takes [start : start + target.shape[dim]] along `dim` of the tensor
    that a Hugging Face checkpoint calls `name` and whose whole shape there is `shape`.
    """

    name: str
    target: torch.Tensor
    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter whose numbers are uninitialised, on the default device, without gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
