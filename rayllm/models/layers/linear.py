"""Linears split over the tensor-parallel ranks (Megatron-LM, arXiv:1909.08053, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from rayllm.models.layers.formats import Format, Plain
from rayllm.models.layers.slices import Split, WeightSlice
from rayllm.models.parallel import TensorParallel


class ColumnParallelLinear(nn.Module):
    """Several linears of one input, fused, each split by output.

    `outputs` names the fused linears as in the checkpoint and gives each one's local part.
    """

    def __init__(self, in_features: int, outputs: Mapping[str, Split], *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.inputs = Split.whole(in_features)
        self.outputs = dict(outputs)
        out_features = sum(split.size for split in outputs.values())
        self.format: Format = Plain.empty(out_features, in_features, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in_features], the same on all ranks → [T, local outputs of all fused linears, in their order]."""
        return self.format.linear(x)

    def pack(self) -> None:
        """Makes the loaded weights ready for speed; they can perhaps not be loaded again."""
        self.format = self.format.pack()

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What this rank takes of the checkpoint's `prefix` + each name in `outputs`."""
        row = 0
        for name, split in self.outputs.items():
            yield from self.format.weight_slices(prefix + name, split, self.inputs, row)
            row += split.size


class RowParallelLinear(nn.Module):
    """A linear split by input, whose outputs are summed over all ranks; `name` is that of the checkpoint."""

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
        self.outputs = Split.whole(out_features)
        self.tp = tp
        # A bias is on one rank only, or the sum would hold it `tp.size` times.
        self.format: Format = Plain.empty(out_features, inputs.size, bias=bias and tp.rank == 0, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, local inputs] → [T, out_features], the same on all ranks; valid until the next such sum."""
        out = self.tp.summand(x, self.outputs.total)
        return self.tp.all_reduce(self.format.linear(x, out), in_summand=out is not None)

    def pack(self) -> None:
        """Makes the loaded weights ready for speed; they can perhaps not be loaded again."""
        self.format = self.format.pack()

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What this rank takes of the checkpoint's `prefix` + `name`."""
        yield from self.format.weight_slices(prefix + self.name, self.outputs, self.inputs)
