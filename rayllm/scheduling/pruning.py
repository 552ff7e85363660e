"""How much of a prompt keeps its KV: the policies, as far as a scheduler asks. What a key is worth, the runner knows.

To add a policy, name it in `config.snapkv_policy` and `make_policy`, and its scores in `rayllm.runner.pruning`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayllm.config import EngineConfig, blocks_for
from rayllm.sampling_params import SnapkvLimit

MAX_PRUNES = 16
"""Prompts that one step prunes, at most: there is room for so many windows' queries of all layers."""


@dataclass(frozen=True)
class PruningPolicy:
    """A prompt keeps `limit` tokens, the same number in every layer and head."""

    name: str
    limit: int
    block_size: int
    window: int
    """Last prompt tokens that are always kept, and whose queries decide what else is."""
    pool_width: int
    """Scores are max-pooled over so many neighbouring keys."""

    def num_kept(self, num_prompt_tokens: int, limit: SnapkvLimit | None) -> int:
        """How many of a prompt's tokens are kept, with the request's `snapkv_limit`; 0: the prompt is not pruned.

        That is the limit, unless less than one block would be saved.
        """
        if limit == "all":
            return 0
        kept = self.limit if limit is None else min(limit, self.limit)
        saved = blocks_for(num_prompt_tokens, self.block_size) - blocks_for(kept, self.block_size)
        return kept if saved > 0 else 0


def snapkv(limit: int, block_size: int, window: int) -> PruningPolicy:
    """The keys that the prompt's last queries attend to (arXiv:2404.14469), each with its neighbours."""
    return PruningPolicy("snapkv", limit, block_size, window, pool_width=15)


def streaming(limit: int, block_size: int) -> PruningPolicy:
    """The first tokens and the most recent ones (StreamingLLM, arXiv:2309.17453)."""
    return PruningPolicy("streaming", limit, block_size, window=0, pool_width=1)


def make_policy(config: EngineConfig) -> PruningPolicy | None:
    """The policy that the configuration asks for; None for an engine that prunes nothing."""
    if not config.enable_snapkv:
        return None
    if config.snapkv_policy == "streaming":
        return streaming(config.snapkv_limit, config.block_size)
    return snapkv(config.snapkv_limit, config.block_size, config.snapkv_attn_sample_queries)
