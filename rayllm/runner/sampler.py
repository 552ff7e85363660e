"""From logits to tokens: batched over the samples of a step, on the device, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from rayllm_kernels import filter_logits, sample_gumbel

from rayllm.messages.step import Logprobs
from rayllm.models.parallel import TensorParallel
from rayllm.runner.device import HostCopies
from rayllm.runner.grammars import masked
from rayllm.runner.lanes import Lanes


@dataclass(frozen=True)
class LogprobTensors:
    """What is said of S tokens: their own log-probability and rank, and the K likeliest; float32 and int64."""

    token_ids: torch.Tensor
    """[S, 1 + K], the token itself first."""
    logprobs: torch.Tensor
    """[S, 1 + K]."""
    ranks: torch.Tensor
    """[S], from 1."""

    def copied(self, copies: HostCopies) -> LogprobTensors:
        """A copy on the host, to be read after `copies.wait()`."""
        return LogprobTensors(copies.add(self.token_ids), copies.add(self.logprobs), copies.add(self.ranks))

    def entries(self) -> list[Logprobs]:
        """One for each token."""
        columns = self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist()
        return [Logprobs(*row) for row in zip(*columns, strict=True)]


class Sampler:
    """Samples one token for each row of logits, of which the step's lanes have one each.

    Order, as in vLLM: logprobs are of the raw logits; then grammars, logit_bias, min_tokens, penalties, temperature,
    min_p, top_k, top_p. The draw is Gumbel-max with noise that depends on seed, output index and token id alone, so
    batch, tensor-parallel degree and preemption do not matter.
    """

    def __init__(self, lanes: Lanes, vocab_size: int, tp: TensorParallel):
        self.lanes = lanes
        self.vocab_size = vocab_size
        self.tp = tp

    def is_plain(self, host_lanes: np.ndarray) -> bool:
        """Whether temperature and seed are all that these lanes ask for: then `draw` is enough."""
        state = self.lanes
        special = state.is_filtered[host_lanes] | state.is_penalized[host_lanes] | state.is_biased[host_lanes]
        special |= state.is_constrained[host_lanes]
        return not special.any() and state.logprobs[host_lanes].max(initial=-1) < 0

    def draw(self, logits: torch.Tensor, lanes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids [S] int64 from local `logits` [S, V / ranks], for `lanes` [S], written to their `positions` [S].

        Each rank draws from its slice of the vocabulary; the largest value of all wins, the lower id on ties.
        """
        state = self.lanes
        values, ids = sample_gumbel(
            logits,
            state.temperature[lanes],
            state.seeds[lanes],
            positions - state.prompt_lens[lanes],
            vocab_offset=self.tp.rank * logits.shape[1],
        )
        if self.tp.size > 1:
            both = self.tp.all_gather(torch.stack((values.double(), ids.double()), dim=1))
            values, candidates = both[:, 0::2], both[:, 1::2]
            ids = candidates.masked_fill(values < values.amax(1, keepdim=True), torch.inf).amin(1).long()
        state.token_ids[lanes, positions] = ids.int()
        return ids

    def draw_processed(
        self, logits: torch.Tensor, host_lanes: np.ndarray, host_positions: np.ndarray, masks: np.ndarray | None
    ) -> tuple[torch.Tensor, LogprobTensors | None]:
        """As `draw`, with all that the lanes ask for; lanes and positions are on the host. Gathers the whole logits.

        `masks`: on rank 0, whose draw counts, what grammars allow, as `Grammars.masks` gives it; None: everything.
        """
        state = self.lanes
        lanes, positions = state.device.put(np.stack((host_lanes, host_positions)).astype(np.int64))
        index, temperature = positions - state.prompt_lens[lanes], state.temperature[lanes]
        raw = self.tp.all_gather(logits)[:, : self.vocab_size].float()
        processed = raw if masks is None else masked(raw, state.device.put(masks))
        if state.is_biased[host_lanes].any():
            processed = self._add_biases(processed, lanes, index)
        if state.is_penalized[host_lanes].any():
            processed = self._penalize(processed, lanes, positions, int(host_positions.max()))
        if state.is_filtered[host_lanes].any():
            processed = self._filter(processed, lanes)
        token_ids = self.tp.broadcast(sample_gumbel(processed, temperature, state.seeds[lanes], index)[1])
        state.token_ids[lanes, positions] = token_ids.int()
        num_logprobs = int(state.logprobs[host_lanes].max())
        return token_ids, top_logprobs(raw, token_ids, num_logprobs) if num_logprobs >= 0 else None

    def launch_filter(self, logits: torch.Tensor) -> None:
        """Launches what `draw_processed` needs beside `draw`, to no effect: so that it is compiled."""
        state, lanes = self.lanes, torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        filtered = self._filter(self.tp.all_gather(logits)[:, : self.vocab_size].float(), lanes)
        sample_gumbel(filtered, state.temperature[lanes], state.seeds[lanes], lanes)

    def _filter(self, logits: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
        state = self.lanes
        return filter_logits(
            logits, state.temperature[lanes], state.top_k[lanes], state.top_p[lanes], state.min_p[lanes]
        )

    def _add_biases(self, logits: torch.Tensor, lanes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        state = self.lanes
        active = index[:, None] < state.bias_until[lanes]
        return logits.scatter_add(1, state.bias_ids[lanes], state.bias_values[lanes].where(active, 0))

    def _penalize(
        self, logits: torch.Tensor, lanes: torch.Tensor, positions: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Repetition (Keskar et al. 2019, over prompt and output), then presence and frequency (over the output)."""
        state = self.lanes
        token_ids = state.token_ids[lanes, :longest].long()
        column = torch.arange(longest, device=logits.device)
        is_known = column < positions[:, None]
        is_output = is_known & (column >= state.prompt_lens[lanes][:, None])
        seen = torch.zeros_like(logits).scatter_add_(1, token_ids, is_known.float()) > 0
        counts = torch.zeros_like(logits).scatter_add_(1, token_ids, is_output.float())
        repetition = state.repetition[lanes][:, None]
        logits = logits.where(~seen, torch.where(logits > 0, logits / repetition, logits * repetition))
        return logits - state.frequency[lanes][:, None] * counts - state.presence[lanes][:, None] * (counts > 0)


def top_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobTensors:
    """Log-probabilities of `token_ids` [S] and of the `k` likeliest tokens under `logits` [S, V] float32."""
    logprobs = logits.log_softmax(dim=1)
    own = logprobs.gather(1, token_ids[:, None])
    values, ids = logprobs.topk(k, dim=1)
    return LogprobTensors(
        torch.cat((token_ids[:, None], ids), 1), torch.cat((own, values), 1), (logprobs > own).sum(1) + 1
    )
