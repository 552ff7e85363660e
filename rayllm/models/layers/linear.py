"""Linears split over the tensor-parallel ranks (Megatron-LM, arXiv:1909.08053, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from rayllm_kernels import linear, pack_weight
from torch import nn

from rayllm.models.layers.slices import Split, WeightSlice, empty_parameter
from rayllm.runner.parallel import TensorParallel


class ColumnParallelLinear(nn.Module):
    """[..., in_features] → [..., local outputs]: several linears of one input, fused, each split by output.

    `outputs` names the fused linears as in the checkpoint and gives each one's local part.
    """

    def __init__(self, in_features: int, outputs: Mapping[str, Split], *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.outputs = dict(outputs)
        out_features = sum(split.size for split in outputs.values())
        self.weight = empty_parameter(out_features, in_features, dtype=dtype)
        self.bias = empty_parameter(out_features, dtype=dtype) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Makes the loaded weight ready for speed; it cannot be loaded again."""
        self.weight = nn.Parameter(pack_weight(self.weight), requires_grad=False)

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        row = 0
        for name, split in self.outputs.items():
            rows = slice(row, row + split.size)
            shape = (split.total, self.in_features)
            yield WeightSlice(f"{prefix}{name}.weight", self.weight[rows], shape, start=split.start)
            if self.bias is not None:
                yield WeightSlice(f"{prefix}{name}.bias", self.bias[rows], shape[:1], start=split.start)
            row = rows.stop


class RowParallelLinear(nn.Module):
    """[..., local inputs] → [..., out_features], the sum over all ranks; `name` is that of the checkpoint."""

    def __init__(
        self,
        name: str,
        inputs: Split,
        out_features: int,
        tp: TensorParallel,
        *,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name = name
        self.inputs = inputs
        self.tp = tp
        self.weight = empty_parameter(out_features, inputs.size, dtype=dtype)
        # On one rank only, or the sum would hold it `tp.size` times.
        self.bias = empty_parameter(out_features, dtype=dtype) if bias and tp.rank == 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.tp.summand(x, self.weight.shape[0])
        return self.tp.all_reduce(linear(x, self.weight, self.bias, out))

    def pack(self) -> None:
        """Makes the loaded weight ready for speed; it cannot be loaded again."""
        self.weight = nn.Parameter(pack_weight(self.weight), requires_grad=False)

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        shape = (self.weight.shape[0], self.inputs.total)
        yield WeightSlice(f"{prefix}{self.name}.weight", self.weight, shape, dim=1, start=self.inputs.start)
        if self.bias is not None:
            yield WeightSlice(f"{prefix}{self.name}.bias", self.bias, shape[:1])
