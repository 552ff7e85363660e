"""The shape of a model: everything the engine knows of an architecture before a weight is read.

Plain frozen data without torch or transformers: the driver plans with it and sends it to the shards. How it is read is
said in `models.architectures` and `models.config_json`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Literal

from rayllm.errors import UsageError

logger = logging.getLogger("rayllm")


@dataclass(frozen=True)
class RopeScaling:
    """How the rotation frequencies depart from θ^(−2i/d); unused fields keep their defaults.

    `rope_type`: 'linear' (all divided by `factor`), 'llama3' (low frequencies divided, as in Llama 3.1),
    'yarn' (arXiv:2309.00071; low frequencies divided, cos and sin multiplied by `attention_factor`), or
    'factors' (frequency i divided by `factors[i]`, the form in which GGUF files store 'llama3').
    """

    rope_type: str
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerConfig:
    """The kinds of one layer's parts.

    `attention` says what is cached: 'full' is a key and a value of every token. `window` is how many tokens, its own
    included, a token sees, None for all; contexts stay within it (`ModelConfig.max_model_len`), so that such a layer
    is a full one, too. `rotary` says whether queries and keys are rotated by their positions.
    """

    attention: Literal["full"] = "full"
    window: int | None = None
    rotary: bool = True


@dataclass(frozen=True)
class KVGroup:
    """Layers, by index, that share one kind of cache and one block table."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder. Names are those of Hugging Face's config.json.

    `qkv_bias`, `o_bias` and `mlp_bias` say which linears have a bias, `qk_norm` that every query and key head
    is RMS-normalised before the rotation (Qwen3). `dtype` is the one the weights were saved in.
    `eos_token_ids` joins those of config.json and generation_config.json; all are in the vocabulary.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: tuple[tuple[str, float], ...] = ()
    """Fields of `SamplingParams` for which generation_config.json has a value."""

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The layers by the kind of their attention; every layer is in one group."""
        kinds = dict.fromkeys(layer.attention for layer in self.layers)
        return tuple(
            KVGroup(tuple(index for index, layer in enumerate(self.layers) if layer.attention == kind))
            for kind in kinds
        )

    @property
    def sliding_window(self) -> int | None:
        """The narrowest attention window of any layer in tokens, None when every layer sees everything."""
        return min((layer.window for layer in self.layers if layer.window is not None), default=None)

    @property
    def max_model_len(self) -> int:
        """The longest context, in tokens, that is computed as the model was meant: within every layer's window, and
        with linear scaling and YaRN up to the stretched length."""
        longest, scaling = self.max_position_embeddings, self.rope_scaling
        if scaling is not None and scaling.rope_type == "linear":
            longest = round(longest * scaling.factor)
        if scaling is not None and scaling.rope_type == "yarn":
            longest = round(scaling.original_max_position_embeddings * scaling.factor)
        return max(1, min(longest, self.sliding_window or longest))

    def check_tensor_parallel(self, size: int) -> None:
        """Raises UsageError unless the model can be split over `size` shards."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if size < 1:
            raise UsageError(f"tensor_parallel_size must be at least 1, not {size}", "tensor_parallel_size")
        if not self._splits(size):
            valid = [n for n in range(1, heads + 1) if self._splits(n)]
            raise UsageError(
                f"tensor_parallel_size {size} cannot split {heads} query heads, {kv_heads} KV heads and an "
                f"intermediate size of {self.intermediate_size}: use one of {', '.join(map(str, valid))}",
                "tensor_parallel_size",
            )

    def _splits(self, size: int) -> bool:
        kv_heads = self.num_key_value_heads
        kv_fits = kv_heads % size == 0 or size % kv_heads == 0
        return self.num_attention_heads % size == 0 and self.intermediate_size % size == 0 and kv_fits

    def local_kv_heads(self, size: int) -> int:
        """KV heads on each of `size` shards; with more shards than heads, neighbours hold the same one."""
        return max(1, self.num_key_value_heads // size)

    def kv_bytes_per_token(self, dtype_bytes: int, size: int = 1) -> int:
        """Bytes of keys and values that one token takes on each of `size` shards, over all layers."""
        return 2 * len(self.layers) * self.local_kv_heads(size) * self.head_dim * dtype_bytes


def known_ids(found: Any, vocab_size: int, place: str) -> tuple[int, ...]:
    """Those of `found`, an id, a list of ids or None, that are tokens of the vocabulary; the log tells, in a line, of
    what else stands in `place`."""
    entries = found if isinstance(found, list | tuple) else [] if found is None else [found]
    ids: list[int] = []
    others: list[Any] = []
    for entry in entries:
        is_known = type(entry) is int and 0 <= entry < vocab_size
        (ids if is_known else others).append(entry)
    if others:
        logger.warning("%s: %s is left out, token ids are 0 to %d", place, short(others)[1:-1], vocab_size - 1)
    return tuple(ids)
