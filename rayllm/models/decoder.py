"""A dense decoder, of which all architectures are configurations.

It knows nothing of batches or the KV cache: the caller passes all tokens flat, and a function that attends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from rayllm_kernels import Rope, silu_and_mul
from torch import nn

from rayllm.model_config import ModelConfig
from rayllm.models.layers import (
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    Split,
    VocabParallelEmbedding,
    VocabParallelHead,
    WeightSlice,
    rope_table,
)
from rayllm.models.parallel import TensorParallel


class Attend(Protocol):
    """Attends to the cache, which only the caller knows."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope, /) -> torch.Tensor:
        """Layer `layer`'s q [T, Hq, D], k and v [T, Hkv, D] of this rank's heads, q and k still to be rotated and, if
        `rope` has norms, to be normalised before → [T, Hq, D]; all of the model's dtype."""


class Attention(nn.Module):
    """The projections around attention, split over the ranks by heads."""

    def __init__(self, config: ModelConfig, layer: int, tp: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        dim, kv_heads = config.head_dim, config.num_key_value_heads
        self.head_dim = dim
        query = Split.even(config.num_attention_heads * dim, tp.rank, tp.size)
        # With more ranks than KV heads, each head is on tp.size / kv_heads neighbouring ranks.
        kv_parts = min(tp.size, kv_heads)
        kv = Split.even(kv_heads * dim, tp.rank * kv_parts // tp.size, kv_parts)
        self.sizes = [query.size // dim, kv.size // dim, kv.size // dim]
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            {"q_proj": query, "k_proj": kv, "v_proj": kv},
            bias=config.qkv_bias,
            dtype=dtype,
        )
        self.o_proj = RowParallelLinear("o_proj", query, config.hidden_size, tp, bias=config.o_bias, dtype=dtype)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps, dtype) if config.qk_norm else None

    def forward(self, x: torch.Tensor, positions: torch.Tensor, rope: torch.Tensor, attend: Attend) -> torch.Tensor:
        """x [T, H], positions [T] int64, rope as from `rope_table` → [T, H], summed over the ranks."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self.sizes, dim=1)
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        return self.o_proj(attend(self.layer, q, k, v, Rope(positions, rope, norms)).flatten(1))

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What this rank takes of the checkpoint's tensors that begin with `prefix`."""
        yield from self.qkv_proj.weight_slices(prefix)
        yield from self.o_proj.weight_slices(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.weight_slices(f"{prefix}q_norm")
            yield from self.k_norm.weight_slices(f"{prefix}k_norm")


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)), split over the ranks by its inner dimension (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__()
        inner = Split.even(config.intermediate_size, tp.rank, tp.size)
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size, {"gate_proj": inner, "up_proj": inner}, bias=config.mlp_bias, dtype=dtype
        )
        self.down_proj = RowParallelLinear(
            "down_proj", inner, config.hidden_size, tp, bias=config.mlp_bias, dtype=dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] → [T, H], summed over the ranks."""
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What this rank takes of the checkpoint's tensors that begin with `prefix`."""
        yield from self.gate_up_proj.weight_slices(prefix)
        yield from self.down_proj.weight_slices(prefix)


class DecoderLayer(nn.Module):
    """Attention and MLP, each normalised before and added to the residual."""

    def __init__(self, config: ModelConfig, layer: int, tp: TensorParallel, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, layer, tp, dtype)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, tp, dtype)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        rope: torch.Tensor,
        attend: Attend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns (x, residual) [T, H], still to be added; before the first layer there is no residual."""
        if residual is None:
            x, residual = self.input_norm(x), x
        else:
            x, residual = self.input_norm.add(x, residual)
        x = self.attention(x, positions, rope, attend)
        x, residual = self.post_attention_norm.add(x, residual)
        return self.mlp(x), residual

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What this rank takes of the checkpoint's tensors that begin with `prefix`."""
        yield from self.input_norm.weight_slices(f"{prefix}input_layernorm")
        yield from self.attention.weight_slices(f"{prefix}self_attn.")
        yield from self.post_attention_norm.weight_slices(f"{prefix}post_attention_layernorm")
        yield from self.mlp.weight_slices(f"{prefix}mlp.")


class Decoder(nn.Module):
    """One rank's part of the model. `ropes` has each layer's `rope_table`; layers of one kind share it."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, dtype: torch.dtype, max_model_len: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp, dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, tp, dtype) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        tied = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = VocabParallelHead(config.vocab_size, config.hidden_size, tp, dtype, tied)
        device = self.norm.weight.device
        kinds = {layer.rotary for layer in config.layers}
        tables = {rotary: rope_table(config, max_model_len, rotary).to(device) for rotary in kinds}
        self.ropes = [tables[layer.rotary] for layer in config.layers]

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """token_ids, positions [T] int64 → normalised hidden states [T, hidden_size], the same on all ranks.

        `attend` is called once per layer, in order.
        """
        x = self.embed_tokens(token_ids)
        residual: torch.Tensor | None = None
        for layer, rope in zip(self.layers, self.ropes, strict=True):
            x, residual = layer(x, residual, positions, rope, attend)
        assert residual is not None
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [S, hidden_size] → this rank's logits [S, n] of the model's dtype, in `out` if that is given.

        n · ranks is the vocabulary's size, rounded up; logits beyond it are −inf.
        """
        logits: torch.Tensor = self.lm_head(hidden, out)
        return logits

    def pack(self) -> None:
        """Makes the loaded weights ready for speed; they can perhaps not be loaded again."""
        kinds = ColumnParallelLinear | RowParallelLinear | VocabParallelHead
        for module in [module for module in self.modules() if isinstance(module, kinds)]:
            module.pack()  # one by one: what is packed is free before the next

    def weight_slices(self) -> Iterator[WeightSlice]:
        """Every parameter of this rank, and what it takes of a checkpoint with Hugging Face's names."""
        yield from self.embed_tokens.weight_slices("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.weight_slices(f"model.layers.{index}.")
        yield from self.norm.weight_slices("model.norm")
        yield from self.lm_head.weight_slices("lm_head")


def build_model(
    config: ModelConfig,
    tp: TensorParallel,
    device: torch.device | str,
    dtype: torch.dtype,
    max_model_len: int,
) -> Decoder:
    """Allocates this rank's parameters of `dtype` on `device`, uninitialised: `load_weights` fills them.

    Raises UsageError when the model cannot be split over `tp.size` ranks.
    """
    config.check_tensor_parallel(tp.size)
    with torch.inference_mode(False), torch.device(device):  # or no other thread could fill them
        return Decoder(config, tp, dtype, max_model_len).eval()
