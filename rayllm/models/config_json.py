"""Reads config.json, as transformers 4 or 5 writes it, into a ModelConfig."""

from __future__ import annotations

import math

from rayllm.errors import UsageError
from rayllm.model_config import ModelConfig, RopeScaling
from rayllm.models.architectures import ConfigJson, architecture_of, positive
from rayllm.sampling_params import SamplingParams

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "factors")
DTYPES = ("bfloat16", "float16", "float32")


def read_config(config: ConfigJson, generation_config: ConfigJson | None = None) -> ModelConfig:
    """The model that config.json and, if there is one, generation_config.json describe.

    Raises UsageError for anything that would not be computed exactly as transformers does.
    """
    record = architecture_of(config.get("model_type"), config.get("architectures") or [])
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise UsageError(f"quantization_config ({method}) is not supported: use an unquantised or a .gguf file")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UsageError(f"unsupported hidden_act {activation!r}: rayllm runs 'silu'")

    heads = positive(config, "num_attention_heads")
    hidden = positive(config, "hidden_size")
    kv_heads = positive(config, "num_key_value_heads", heads)
    head_dim = positive(config, "head_dim", record.head_dim or hidden // heads)
    if heads % kv_heads:
        raise UsageError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
    if head_dim % 2:
        raise UsageError(f"head_dim ({head_dim}) must be even to be rotated")
    max_positions = positive(config, "max_position_embeddings", 2048)
    theta, scaling = _rope(config, record.rope_theta, max_positions)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UsageError(f"unsupported dtype {dtype!r} in config.json: rayllm runs {', '.join(DTYPES)}")
    biases = {name for name in record.biases if config.get(name)}
    return ModelConfig(
        model_type=record.model_type,
        vocab_size=positive(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive(config, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        layers=record.layers(config, positive(config, "num_hidden_layers")),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", record.tie_word_embeddings)),
        qkv_bias=record.qkv_bias or "attention_bias" in biases,
        o_bias="attention_bias" in biases,
        mlp_bias="mlp_bias" in biases,
        qk_norm=record.qk_norm,
        dtype=dtype,
        sampling_defaults=_sampling_defaults(generation_config or {}),
        eos_token_ids=tuple(dict.fromkeys(_eos_ids(config) + _eos_ids(generation_config or {}))),
    )


def _sampling_defaults(generation_config: ConfigJson) -> tuple[tuple[str, float], ...]:
    """What generation_config.json recommends, as vLLM reads it: `do_sample` and the longest output do not count."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: value for name in names if (value := generation_config.get(name)) is not None}
    try:
        SamplingParams(**found)
    except UsageError as error:
        raise UsageError(f"generation_config.json: {error}") from None
    return tuple(found.items())


def _eos_ids(config: ConfigJson) -> list[int]:
    ids = config.get("eos_token_id")
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _rope(config: ConfigJson, default_theta: float, max_positions: int) -> tuple[float, RopeScaling | None]:
    """θ and the scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or default_theta)
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


def _yarn_attention_factor(rope: ConfigJson, factor: float) -> float:
    """The square root of 1/t of YaRN, section 3.4; DeepSeek's `mscale` pair replaces it."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)
