"""The vocabulary's rows, split over the ranks: the token embedding, the head, or both (tied)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from rayllm_kernels import linear, pack_weight
from torch import nn

from rayllm.models.layers.slices import WeightSlice, empty_parameter
from rayllm.runner.parallel import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """Rows [rank · n, rank · n + n) of the vocabulary, padded to a multiple of the ranks.

    `num_valid` of the n local rows are tokens, the rest are zero.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tp = tp
        num_local = -(-vocab_size // tp.size)
        self.start = tp.rank * num_local
        self.num_valid = min(max(vocab_size - self.start, 0), num_local)
        self.weight = empty_parameter(num_local, hidden_size, dtype=dtype)
        self.weight[self.num_valid :].zero_()
        self.packed: torch.Tensor | None = None

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] int64 → [T, hidden_size], on every rank."""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.start
        foreign = (local < 0) | (local >= self.num_valid)
        x = F.embedding(local.masked_fill_(foreign, 0), self.weight)
        return self.tp.all_reduce(x.masked_fill_(foreign.unsqueeze(-1), 0))

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [S, hidden_size] → this rank's logits [S, n], −inf where the vocabulary is padded."""
        logits = linear(hidden, self.weight if self.packed is None else self.packed, out=out)
        if self.num_valid < logits.shape[-1]:
            logits[..., self.num_valid :] = float("-inf")
        return logits

    def pack(self) -> None:
        """Makes the loaded head ready for speed; the embedding reads the plain rows."""
        self.packed = pack_weight(self.weight)

    def weight_slices(self, name: str) -> Iterator[WeightSlice]:
        if self.num_valid:
            shape = (self.vocab_size, self.weight.shape[1])
            yield WeightSlice(name, self.weight[: self.num_valid], shape, start=self.start)
