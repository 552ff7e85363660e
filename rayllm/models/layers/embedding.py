"""The vocabulary's rows, split over the ranks: the embedding of tokens, and the head that makes logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from rayllm.models.layers.formats import Format, Plain
from rayllm.models.layers.slices import Split, WeightSlice, empty_parameter
from rayllm.models.parallel import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """One row for each of this rank's `tokens`. `weight` is [n, hidden_size]; the last ranks' last rows are padding, of
    any value."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp = tp
        self.tokens, num_local = _split(vocab_size, tp)
        self.weight = empty_parameter(num_local, hidden_size, dtype=dtype)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] int64 → [T, hidden_size] of the model's dtype, the same on all ranks."""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.tokens.start
        foreign = (local < 0) | (local >= self.tokens.size)
        x = F.embedding(local.masked_fill_(foreign, 0), self.weight)
        return self.tp.all_reduce(x.masked_fill_(foreign.unsqueeze(-1), 0))

    def weight_slices(self, name: str) -> Iterator[WeightSlice]:
        """What this rank takes of the checkpoint's `name` + '.weight'."""
        if self.tokens.size:
            shape = (self.tokens.total, self.weight.shape[1])
            yield WeightSlice(f"{name}.weight", self.weight[: self.tokens.size], shape, start=self.tokens.start)


class VocabParallelHead(nn.Module):
    """Makes logits of hidden states for this rank's tokens. `tied` is the embedding whose rows are the weight."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        tp: TensorParallel,
        dtype: torch.dtype,
        tied: VocabParallelEmbedding | None,
    ) -> None:
        super().__init__()
        self.tokens, num_local = _split(vocab_size, tp)
        self.inputs = Split.whole(hidden_size)
        self.is_tied = tied is not None
        self.format: Format
        if tied is None:
            self.format = Plain.empty(num_local, hidden_size, bias=False, dtype=dtype)
        else:
            self.format = Plain(tied.weight)

    def forward(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [S, hidden_size] → logits [S, n] of the model's dtype, −inf where the vocabulary is padded; in `out`
        if that is given."""
        logits = self.format.linear(hidden, out)
        if self.tokens.size < logits.shape[-1]:
            logits[..., self.tokens.size :] = float("-inf")
        return logits

    def pack(self) -> None:
        """Makes the loaded weights ready for speed; a tied embedding keeps its plain rows."""
        self.format = self.format.pack()

    def weight_slices(self, name: str) -> Iterator[WeightSlice]:
        """What this rank takes of the checkpoint's `name` + '.weight', which is nothing if tied."""
        if self.tokens.size and not self.is_tied:
            yield from self.format.weight_slices(name, self.tokens, self.inputs)


def _split(vocab_size: int, tp: TensorParallel) -> tuple[Split, int]:
    """(the tokens of this rank, its number of rows n): n · size is the vocabulary padded to a multiple of the ranks."""
    num_local = -(-vocab_size // tp.size)
    start = min(tp.rank * num_local, vocab_size)
    return Split(vocab_size, start, min(vocab_size - start, num_local)), num_local
