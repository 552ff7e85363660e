"""Pruning on a shard: what each key of a prompt is worth, and the move of what is kept to blocks of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from rayllm_kernels import compact_kv, select_kept, window_scores

from rayllm.config import SINKS
from rayllm.messages.step import Prune
from rayllm.runner.attention import FullAttention
from rayllm.runner.lanes import Lanes
from rayllm.runner.model_input import Rows
from rayllm.scheduling.pruning import PruningPolicy

SCORES_AT_ONCE = 1 << 22
"""Keys of layers and KV heads whose scores exist at once; choosing among them takes ten times their memory."""


def _recency(
    q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, kv_len: int, scale: float
) -> torch.Tensor:
    """Scores that grow with the position."""
    positions = torch.arange(kv_len, dtype=torch.float32, device=k_cache.device)
    return positions.expand(len(k_cache), k_cache.shape[3], kv_len)


SCORES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]] = {
    "snapkv": window_scores,
    "streaming": _recency,
}
"""The function of each policy that says what each key of a prompt is worth to each KV head of each layer: [L, Hkv,
kv_len] float32, finite, from (q, k_cache, block_table, kv_len, scale) as `rayllm_kernels.window_scores` takes them."""


class Pruner:
    """Prunes prompts by `policy` in all layers of the KV groups that keep every token."""

    def __init__(self, policy: PruningPolicy, attentions: Sequence[FullAttention], lanes: Lanes):
        self._policy = policy
        self._attentions = attentions
        self._lanes = lanes

    def prune(self, prunes: list[Prune], rows: Rows) -> None:
        """Copies what each prompt keeps into its new blocks, which its lane has from then on."""
        put = self._lanes.device.put
        for i, (prune, lane) in enumerate(zip(prunes, rows.lanes[rows.pruned].tolist(), strict=True)):
            for group, attention in enumerate(self._attentions):
                table, new_table = self._lanes.block_tables[group][lane], prune.block_tables[group]
                kv_len, num_kept = int(rows.kv_lens[group, prune.row]), prune.num_kept
                self._prune_prompt(attention, i, table, kv_len, num_kept, put(np.array(new_table, np.int32)))
        self._lanes.replace_tables(rows.lanes[rows.pruned], prunes)

    def prune_nothing(self, kv_len: int) -> None:
        """Prunes a prompt of so many tokens, as it were, within the spare block: to compile and to measure."""
        for attention, tables in zip(self._attentions, self._lanes.block_tables, strict=True):
            table = tables[self._lanes.padding]
            self._prune_prompt(attention, 0, table, kv_len, min(self._policy.limit, kv_len), table)

    def _prune_prompt(
        self,
        attention: FullAttention,
        index: int,
        table: torch.Tensor,
        kv_len: int,
        num_kept: int,
        new_table: torch.Tensor,
    ) -> None:
        """Prunes the step's prompt of that index, in as many layers at a time as `SCORES_AT_ONCE` allows."""
        always = {"sinks": SINKS, "window": self._policy.window, "pool_width": self._policy.pool_width}
        size = max(1, SCORES_AT_ONCE // (kv_len * attention.keys.shape[3]))
        layers = (x.split(size) for x in (attention.windows[:, index], attention.keys, attention.values))
        for queries, keys, values in zip(*layers, strict=True):
            scores = SCORES[self._policy.name](queries, keys, table, kv_len, attention.scale)
            compact_kv(keys, values, table, select_kept(scores, num_kept, **always), new_table)
