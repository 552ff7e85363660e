"""The shape of a model: everything the engine knows of an architecture before a weight is read.

Plain frozen data without torch or transformers: the driver plans with it and sends it to the shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayllm.errors import UsageError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "factors")
DTYPES = ("bfloat16", "float16", "float32")


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
class KVGroup:
    """Layers that share one kind of cache and one block table."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder of the Llama family. Names are those of Hugging Face's config.json.

    `sliding_window` is the narrowest attention window of any layer, None when every layer sees everything.
    `qkv_bias`, `o_bias` and `mlp_bias` say which linears have a bias, `qk_norm` that every query and key head
    is RMS-normalised before the rotation (Qwen3). `dtype` is the one the weights were saved in.
    `eos_token_ids` joins those of config.json and generation_config.json.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """Reads config.json (as transformers 4 or 5 writes it) and, if there is one, generation_config.json.

        Raises UsageError for anything that would not be computed exactly as transformers does.
        """
        model_type = config.get("model_type")
        architectures = config.get("architectures") or []
        if model_type not in ARCHITECTURES or (architectures and ARCHITECTURES[model_type] not in architectures):
            found = ", ".join(architectures) or f"model_type {model_type!r}"
            raise UsageError(f"unsupported architecture {found}: rayllm runs {', '.join(ARCHITECTURES.values())}")
        if quantization := config.get("quantization_config"):
            method = quantization.get("quant_method", "unknown")
            raise UsageError(f"quantization_config ({method}) is not supported: use an unquantised or a .gguf file")
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise UsageError(f"unsupported hidden_act {activation!r}: rayllm runs 'silu'")

        heads = _positive(config, "num_attention_heads")
        hidden = _positive(config, "hidden_size")
        kv_heads = _positive(config, "num_key_value_heads", heads)
        head_dim = _positive(config, "head_dim", 128 if model_type == "qwen3" else hidden // heads)
        if heads % kv_heads:
            raise UsageError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
        if head_dim % 2:
            raise UsageError(f"head_dim ({head_dim}) must be even to be rotated")
        max_positions = _positive(config, "max_position_embeddings", 2048)
        theta, scaling = _rope(config, max_positions)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if dtype not in DTYPES:
            raise UsageError(f"unsupported dtype {dtype!r} in config.json: rayllm runs {', '.join(DTYPES)}")
        attention_bias = bool(config.get("attention_bias")) and model_type in ("llama", "qwen3")
        generation = generation_config or {}
        return cls(
            model_type=model_type,
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            num_hidden_layers=_positive(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=max_positions,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or model_type == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias")) and model_type == "llama",
            qk_norm=model_type == "qwen3",
            sliding_window=_sliding_window(config),
            dtype=dtype,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(_ids(config) + _ids(generation))),
        )

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Every layer is in one of them; all layers here attend to everything, so that they are one."""
        return (KVGroup(tuple(range(self.num_hidden_layers))),)

    @property
    def max_model_len(self) -> int:
        """The longest context that is computed as the model was meant: within every layer's window, and with
        YaRN up to its stretched length."""
        longest = self.max_position_embeddings
        if (scaling := self.rope_scaling) is not None and scaling.rope_type == "yarn":
            longest = max(longest, int(scaling.original_max_position_embeddings * scaling.factor))
        return min(longest, self.sliding_window or longest)

    def check_tensor_parallel(self, size: int) -> None:
        """Raises UsageError unless the model can be split over `size` shards."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if size < 1:
            raise UsageError(f"tensor_parallel_size must be at least 1, not {size}")
        if not self._splits(size):
            valid = [n for n in range(1, heads + 1) if self._splits(n)]
            raise UsageError(
                f"tensor_parallel_size {size} cannot split {heads} query heads, {kv_heads} KV heads and an "
                f"intermediate size of {self.intermediate_size}: use one of {', '.join(map(str, valid))}"
            )

    def _splits(self, size: int) -> bool:
        kv_heads = self.num_key_value_heads
        kv_fits = kv_heads % size == 0 or size % kv_heads == 0
        return self.num_attention_heads % size == 0 and self.intermediate_size % size == 0 and kv_fits

    def local_query_heads(self, size: int) -> int:
        """Query heads on each of `size` shards."""
        return self.num_attention_heads // size

    def local_kv_heads(self, size: int) -> int:
        """KV heads on each of `size` shards; with more shards than heads, neighbours hold the same one."""
        return max(1, self.num_key_value_heads // size)

    def padded_vocab_size(self, size: int) -> int:
        """The vocabulary rounded up to a multiple of `size`."""
        return -(-self.vocab_size // size) * size

    def kv_bytes_per_token(self, dtype_bytes: int, size: int = 1) -> int:
        """Bytes of keys and values that one token takes on each of `size` shards, over all layers."""
        return 2 * self.num_hidden_layers * self.local_kv_heads(size) * self.head_dim * dtype_bytes

    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query = self.num_attention_heads * self.head_dim
        qkv = query + 2 * self.num_key_value_heads * self.head_dim
        layer = hidden * (qkv + query) + 3 * hidden * inner + 2 * hidden
        layer += self.qkv_bias * qkv + self.o_bias * hidden + self.mlp_bias * (2 * inner + hidden)
        layer += self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + hidden


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _ids(config: Mapping[str, Any]) -> list[int]:
    ids = config.get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    if config["model_type"] == "mistral":
        return config.get("sliding_window", 4096)
    if config["model_type"] == "llama" or not config.get("use_sliding_window"):
        return None
    layer_types = config.get("layer_types")
    if layer_types is None:
        windowed = config.get("max_window_layers", 28) < config["num_hidden_layers"]
    else:
        windowed = "sliding_attention" in layer_types
    return config.get("sliding_window", 4096) if windowed else None


def _rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """θ and the scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if rope_type not in ROPE_TYPES or partial != 1.0:
        found = repr(rope_type) if partial == 1.0 else f"partial_rotary_factor {partial}"
        raise UsageError(
            f"unsupported RoPE {found}: rayllm runs the types default, linear, llama3 and yarn on whole heads"
        )
    if rope_type == "default":
        return theta, None
    if rope_type == "factors":
        return theta, RopeScaling("factors", factors=tuple(map(float, rope["factors"])))
    original = int(rope.get("original_max_position_embeddings") or max_positions)
    factor = float(rope.get("factor") or max_positions / original)
    return theta, RopeScaling(
        rope_type,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=float(rope.get("low_freq_factor") or 1.0),
        high_freq_factor=float(rope.get("high_freq_factor") or 4.0),
        attention_factor=_yarn_attention_factor(rope, factor) if rope_type == "yarn" else 1.0,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
    )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """The square root of 1/t of YaRN, section 3.4; DeepSeek's `mscale` pair replaces it."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)
