"""Weight formats: how the numbers of one linear lie in a checkpoint and in memory, and how they are multiplied.

The linears and the head each hold one, and know nothing of it but `Format`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import torch
from rayllm_kernels import linear, pack_weight, packed_linear
from torch import nn

from rayllm.models.layers.slices import Split, WeightSlice, empty_parameter


class Format(nn.Module, ABC):
    """A rank's part of one or several fused linears: N local outputs of K local inputs."""

    @abstractmethod
    def weight_slices(self, name: str, outputs: Split, inputs: Split, row: int = 0) -> Iterator[WeightSlice]:
        """What the outputs from `row` on take of the linear that the checkpoint calls `name`: its part `outputs`
        of `inputs`, of which one is whole. May raise TypeError once packed."""

    @abstractmethod
    def pack(self) -> Format:
        """What multiplies fastest with the weights that have been loaded, itself or another."""

    @abstractmethod
    def linear(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, K], contiguous → x · weightᵀ + bias [T, N] of x's dtype, in `out` if that is given."""


class Plain(Format):
    """`weight` [N, K] and perhaps `bias` [N] in the model's dtype, as checkpoints that are not quantised have them."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    @classmethod
    def empty(cls, outputs: int, inputs: int, *, bias: bool, dtype: torch.dtype) -> Plain:
        """A format whose numbers are uninitialised, on the default device."""
        return cls(
            empty_parameter(outputs, inputs, dtype=dtype), empty_parameter(outputs, dtype=dtype) if bias else None
        )

    def weight_slices(self, name: str, outputs: Split, inputs: Split, row: int = 0) -> Iterator[WeightSlice]:
        rows = slice(row, row + outputs.size)
        shape = (outputs.total, inputs.total)
        dim, start = (0, outputs.start) if inputs.size == inputs.total else (1, inputs.start)
        yield WeightSlice(f"{name}.weight", self.weight[rows], shape, dim, start)
        if self.bias is not None:
            yield WeightSlice(f"{name}.bias", self.bias[rows], shape[:1], start=outputs.start)

    def pack(self) -> Format:
        if (
            self.weight.device.type == "cpu"
            and self.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        ):
            return Blocked(self.weight, self.bias)
        return self

    def linear(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return cast(torch.Tensor, linear(x, self.weight, self.bias, out))


class Blocked(Format):
    """Plain float32 weights on a CPU, copied into oneDNN's blocked layout: what `Plain` is packed into there.

    Rows are few when decoding, and then the plain layout keeps the product at half the memory's bandwidth.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = pack_weight(weight)
        self.bias = bias

    def weight_slices(self, name: str, outputs: Split, inputs: Split, row: int = 0) -> Iterator[WeightSlice]:
        raise TypeError(f"{name} is packed: it cannot be loaded again")

    def pack(self) -> Format:
        return self

    def linear(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        product = cast(torch.Tensor, packed_linear(x, self.weight, self.bias))
        return product if out is None else out.copy_(product)
