"""Reads config.json, as transformers 4 or 5 writes it, into a ModelConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from rayllm.errors import UsageError
from rayllm.model_config import ModelConfig, RopeScaling, known_ids
from rayllm.models.architectures import Architecture, architecture_of
from rayllm.models.config_fields import ConfigJson, RopeJson, typed
from rayllm.sampling_params import SamplingParams

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "factors")
DTYPES = ("bfloat16", "float16", "float32")


class _Kind(msgspec.Struct):
    model_type: str | None = None
    architectures: list[str] | None = None


def read_config(content: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """The model that config.json and, if there is one, generation_config.json describe.

    Raises UsageError for fields of a wrong type and for anything that would not be computed exactly as transformers
    does. Of ids that end an answer, those that are none are left out, which the log tells.
    """
    kind = typed(content, _Kind, "config.json")  # before fields that only our architectures have
    record = architecture_of(kind.model_type, kind.architectures or ())
    config = typed(content, ConfigJson, "config.json")
    if quantization := config.quantization_config:
        method = quantization.get("quant_method", "unknown")
        raise UsageError(
            f"config.json: quantization_config ({method}) is not supported: use an unquantised or a .gguf file"
        )
    if config.hidden_act != "silu":
        raise UsageError(f"config.json: unsupported hidden_act {config.hidden_act!r}: rayllm runs 'silu'")

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = config.head_dim or record.head_dim or config.hidden_size // heads
    if heads % kv_heads:
        raise UsageError(
            f"config.json: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"
        )
    if not head_dim or head_dim % 2:
        raise UsageError(f"config.json: head_dim ({head_dim}) must be even to be rotated")
    max_positions = config.max_position_embeddings or 2048
    theta, scaling = _rope(config, record, max_positions)
    if scaling is not None and scaling.rope_type == "factors" and len(scaling.factors) != head_dim // 2:
        raise UsageError(
            f"config.json: RoPE has {len(scaling.factors)} factors, but half of head_dim ({head_dim}) is rotated"
        )
    dtype = (config.dtype or config.torch_dtype or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UsageError(f"config.json: unsupported dtype {dtype!r}: rayllm runs {', '.join(DTYPES)}")
    biases = {name for name in record.biases if getattr(config, name)}
    tied = record.tie_word_embeddings if config.tie_word_embeddings is None else config.tie_word_embeddings
    own_ends = known_ids(config.eos_token_id, config.vocab_size, "config.json: eos_token_id")
    generation_ends = (generation_config or {}).get("eos_token_id")
    ends = own_ends + known_ids(generation_ends, config.vocab_size, "generation_config.json: eos_token_id")
    return ModelConfig(
        model_type=record.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        layers=record.layers(config),
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        qkv_bias=record.qkv_bias or "attention_bias" in biases,
        o_bias="attention_bias" in biases,
        mlp_bias="mlp_bias" in biases,
        qk_norm=record.qk_norm,
        dtype=dtype,
        sampling_defaults=_sampling_defaults(generation_config or {}),
        eos_token_ids=tuple(dict.fromkeys(ends)),
    )


def _sampling_defaults(generation_config: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """What generation_config.json recommends, as vLLM reads it: `do_sample` and the longest output do not count."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: value for name in names if (value := generation_config.get(name)) is not None}
    try:
        SamplingParams(**found)
    except UsageError as error:
        raise UsageError(f"generation_config.json: {error}") from None
    return tuple(found.items())


def _rope(config: ConfigJson, record: Architecture, max_positions: int) -> tuple[float, RopeScaling | None]:
    """θ and the scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    name = "rope_parameters" if config.rope_parameters else "rope_scaling"
    rope = _rope_of_all_layers(config, f"config.json: {name}", getattr(config, name) or {})
    theta = rope.rope_theta or config.rope_theta or record.rope_theta
    rope_type = rope.rope_type or rope.type or "default"
    partial = rope.partial_rotary_factor or config.partial_rotary_factor or 1.0
    if rope_type not in ROPE_TYPES or partial != 1.0:
        found = repr(rope_type) if partial == 1.0 else f"partial_rotary_factor {partial}"
        raise UsageError(
            f"config.json: unsupported RoPE {found}: rayllm runs the types default, linear, llama3 and yarn on whole "
            "heads"
        )
    if rope_type == "default":
        return theta, None
    if rope_type == "factors":
        return theta, RopeScaling("factors", factors=tuple(rope.factors or ()))
    if rope.factor is None and rope_type != "yarn":
        raise UsageError(f"config.json: {name} lacks factor, which RoPE of the type {rope_type} needs")
    original = rope.original_max_position_embeddings or max_positions
    factor = rope.factor or max_positions / original
    if rope_type == "yarn" and theta <= 1:
        raise UsageError(f"config.json: rope_theta ({theta}) must be over 1 for RoPE of the type yarn")
    low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
    if low >= high:
        raise UsageError(f"config.json: {name}: high_freq_factor ({high}) must be over low_freq_factor ({low})")
    return theta, RopeScaling(
        rope_type,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
        attention_factor=_yarn_attention_factor(rope, factor) if rope_type == "yarn" else 1.0,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        truncate=rope.truncate is not False,
    )


def _rope_of_all_layers(config: ConfigJson, place: str, content: Mapping[str, Any]) -> RopeJson:
    """What `content` says; if it does so for each layer type, all types that there are must say the same."""
    if not any(isinstance(value, dict) for value in content.values()):
        return typed(content, RopeJson, place)
    kinds = sorted(set(config.layer_types or content))
    if missing := set(kinds) - set(content):
        raise UsageError(f"{place} lacks {', '.join(sorted(missing))}, of which there are layers")
    ropes = [typed(content[kind], RopeJson, f"{place}.{kind}") for kind in kinds]
    if any(rope != ropes[0] for rope in ropes):
        raise UsageError(f"{place} differ between {', '.join(kinds)}: rayllm rotates all layers alike")
    return ropes[0]


def _yarn_attention_factor(rope: RopeJson, factor: float) -> float:
    """The square root of 1/t of YaRN, section 3.4; DeepSeek's `mscale` pair replaces it."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
