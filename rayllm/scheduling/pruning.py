"""Which tokens of a prompt keep their KV: the policies. Schedulers ask how many are kept, shards which.

A policy says how many last prompt tokens it must see (`window`), how wide scores are pooled, how many tokens are kept
and what each is worth. To add one, write a class like these, and name it in `make_policy` and `config.snapkv_policy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from rayllm.config import EngineConfig
from rayllm.sampling_params import SnapkvLimit

if TYPE_CHECKING:
    import torch

MAX_PRUNES = 16
"""Prompts that one step prunes, at most: there is room for so many windows' queries of all layers."""


class PruningPolicy(Protocol):
    @property
    def window(self) -> int:
        """Last prompt tokens that are always kept, and whose queries `score` gets."""

    @property
    def pool_width(self) -> int:
        """Scores are max-pooled over so many neighbouring keys."""

    def num_kept(self, num_prompt_tokens: int, limit: SnapkvLimit | None) -> int:
        """How many of a prompt's tokens are kept, with the request's `snapkv_limit`; 0: the prompt is not pruned."""

    def score(
        self, q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, kv_len: int, scale: float
    ) -> torch.Tensor:
        """What each key of a prompt is worth to each KV head of each layer: [L, Hkv, kv_len] float32, finite.

        q: [L, window, Hq, D], rotated queries of the window; k_cache: [L, num_blocks, block_size, Hkv, D];
        block_table: int32, the prompt's blocks and anything after them.
        """


@dataclass(frozen=True)
class _Limited:
    limit: int
    block_size: int

    def num_kept(self, num_prompt_tokens: int, limit: SnapkvLimit | None) -> int:
        """The limit, unless less than one block would be saved."""
        if limit == "all":
            return 0
        kept = self.limit if limit is None else min(limit, self.limit)
        saved = -(-num_prompt_tokens // self.block_size) - -(-kept // self.block_size)
        return kept if saved > 0 else 0


@dataclass(frozen=True)
class SnapKV(_Limited):
    """The keys that the prompt's last queries attend to (arXiv:2404.14469), each with its neighbours."""

    window: int
    pool_width: ClassVar[int] = 15

    def score(
        self, q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, kv_len: int, scale: float
    ) -> torch.Tensor:
        from rayllm_kernels import window_scores

        return window_scores(q, k_cache, block_table, kv_len, scale)


@dataclass(frozen=True)
class Streaming(_Limited):
    """The first tokens and the most recent ones (StreamingLLM, arXiv:2309.17453)."""

    window: ClassVar[int] = 0
    pool_width: ClassVar[int] = 1

    def score(
        self, q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, kv_len: int, scale: float
    ) -> torch.Tensor:
        import torch

        position = torch.arange(kv_len, dtype=torch.float32, device=q.device)
        return position.expand(len(k_cache), k_cache.shape[3], kv_len)


def make_policy(config: EngineConfig) -> PruningPolicy | None:
    """The policy that the configuration asks for; None for an engine that prunes nothing."""
    if not config.enable_snapkv:
        return None
    if config.snapkv_policy == "streaming":
        return Streaming(config.snapkv_limit, config.block_size)
    return SnapKV(config.snapkv_limit, config.block_size, config.snapkv_attn_sample_queries)
