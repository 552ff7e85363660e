"""From logits to tokens: batched over the rows of a step, on the device, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from rayllm_kernels import filter_logits, sample_gumbel

from rayllm.models.parallel import TensorParallel
from rayllm.runner.lanes import Lanes


@dataclass(frozen=True)
class LogprobTensors:
    """Of S tokens: their own log-probability and rank, and the K likeliest; float32 and int64."""

    token_ids: torch.Tensor
    """[S, 1 + K], the token itself first."""
    logprobs: torch.Tensor
    """[S, 1 + K]."""
    ranks: torch.Tensor
    """[S], from 1."""


class Sampler:
    """Samples one token for each row of logits.

    Order, as in vLLM: logprobs are of the raw logits; then logit_bias and min_tokens, penalties, temperature, min_p,
    top_k, top_p. The draw is Gumbel-max with noise that depends on seed, output index and token id alone, so batch,
    tensor-parallel degree and preemption do not matter.
    """

    def __init__(self, lanes: Lanes, vocab_size: int, tp: TensorParallel):
        self.lanes = lanes
        self.vocab_size = vocab_size
        self.tp = tp

    def is_plain(self, lanes: np.ndarray) -> bool:
        """Whether temperature and seed are all that these lanes ask for: then `draw` is enough."""
        state = self.lanes
        special = state.is_filtered[lanes] | state.is_penalized[lanes] | state.is_biased[lanes]
        return not special.any() and state.logprobs[lanes].max(initial=-1) < 0

    def draw(self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids [S] int64 from local `logits` [S, V / ranks], of lanes `rows` [S], written to `positions` [S].

        Each rank draws from its slice of the vocabulary; the largest value of all wins, the lower id on ties.
        """
        state = self.lanes
        values, ids = sample_gumbel(
            logits,
            state.temperature[rows],
            state.seeds[rows],
            positions - state.prompt_lens[rows],
            vocab_offset=self.tp.rank * logits.shape[1],
        )
        if self.tp.size > 1:
            both = self.tp.all_gather(torch.stack((values.double(), ids.double()), dim=1))
            values, candidates = both[:, 0::2], both[:, 1::2]
            ids = candidates.masked_fill(values < values.amax(1, keepdim=True), torch.inf).amin(1).long()
        state.token_ids[rows, positions] = ids.int()
        return ids

    def draw_processed(
        self, logits: torch.Tensor, lanes: np.ndarray, rows: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, LogprobTensors | None]:
        """As `draw`, with all that the lanes ask for; `lanes` are `rows` on the host. Gathers the whole logits."""
        state = self.lanes
        index, temperature = positions - state.prompt_lens[rows], state.temperature[rows]
        raw = self.tp.all_gather(logits)[:, : self.vocab_size].float()
        processed = raw
        if state.is_biased[lanes].any():
            processed = self._add_biases(processed, rows, index)
        if state.is_penalized[lanes].any():
            processed = self._penalize(processed, rows, positions, int(state.num_tokens[lanes].max()) - 1)
        if state.is_filtered[lanes].any():
            processed = self._filter(processed, rows)
        token_ids = self.tp.broadcast(sample_gumbel(processed, temperature, state.seeds[rows], index)[1])
        state.token_ids[rows, positions] = token_ids.int()
        num_logprobs = int(state.logprobs[lanes].max())
        return token_ids, top_logprobs(raw, token_ids, num_logprobs) if num_logprobs >= 0 else None

    def launch_filter(self, logits: torch.Tensor) -> None:
        """Launches what `draw_processed` needs beside `draw`, to no effect: so that it is compiled."""
        state, rows = self.lanes, torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        filtered = self._filter(self.tp.all_gather(logits)[:, : self.vocab_size].float(), rows)
        sample_gumbel(filtered, state.temperature[rows], state.seeds[rows], rows)

    def _filter(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        state = self.lanes
        return filter_logits(logits, state.temperature[rows], state.top_k[rows], state.top_p[rows], state.min_p[rows])

    def _add_biases(self, logits: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        state = self.lanes
        active = index[:, None] < state.bias_until[rows]
        return logits.scatter_add(1, state.bias_ids[rows], state.bias_values[rows].where(active, 0))

    def _penalize(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Repetition (Keskar et al. 2019, over prompt and output), then presence and frequency (over the output)."""
        state = self.lanes
        token_ids = state.token_ids[rows, :longest].long()
        column = torch.arange(longest, device=logits.device)
        is_known = column < positions[:, None]
        is_output = is_known & (column >= state.prompt_lens[rows][:, None])
        seen = torch.zeros_like(logits).scatter_add_(1, token_ids, is_known.float()) > 0
        counts = torch.zeros_like(logits).scatter_add_(1, token_ids, is_output.float())
        repetition = state.repetition[rows][:, None]
        logits = logits.where(~seen, torch.where(logits > 0, logits / repetition, logits * repetition))
        return logits - state.frequency[rows][:, None] * counts - state.presence[rows][:, None] * (counts > 0)


def top_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobTensors:
    """Log-probabilities of `token_ids` [S] and of the `k` likeliest tokens under `logits` [S, V] float32."""
    logprobs = logits.log_softmax(dim=1)
    own = logprobs.gather(1, token_ids[:, None])
    values, ids = logprobs.topk(k, dim=1)
    return LogprobTensors(
        torch.cat((token_ids[:, None], ids), 1), torch.cat((own, values), 1), (logprobs > own).sum(1) + 1
    )
