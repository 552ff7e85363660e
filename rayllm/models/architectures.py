"""The architectures that rayllm runs, one record each: what its config.json means and how .gguf files store it.

All of them are configurations of one decoder. Nothing else in rayllm asks for a model's type. This module imports
neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import UNSET

from rayllm.errors import UsageError
from rayllm.model_config import LayerConfig
from rayllm.models.config_fields import ConfigJson

FULL, SLIDING = "full_attention", "sliding_attention"


def alike(config: ConfigJson) -> tuple[LayerConfig, ...]:
    """Layers that all see everything."""
    return (LayerConfig(),) * config.num_hidden_layers


def windowed(config: ConfigJson) -> tuple[LayerConfig, ...]:
    """Layers that all have the same window, unless it is null."""
    return (LayerConfig(window=_window(config, 4096)),) * config.num_hidden_layers


def windowed_above(config: ConfigJson) -> tuple[LayerConfig, ...]:
    """Layers of which `layer_types`, or else those from `max_window_layers` on, have a window if that is in use."""
    first = 28 if config.max_window_layers is None else config.max_window_layers
    first = first if config.use_sliding_window else config.num_hidden_layers
    kinds = layer_types(config, [SLIDING if layer >= first else FULL for layer in range(config.num_hidden_layers)])
    window = _window(config, 4096) if config.use_sliding_window else None
    return tuple(LayerConfig(window=window if kind == SLIDING else None) for kind in kinds)


def some_unrotated(config: ConfigJson) -> tuple[LayerConfig, ...]:
    """Layers that are not rotated where `no_rope_layers` has a 0, or else every `no_rope_layer_interval`-th; only
    those have a window, if one is in use, unless `layer_types` say otherwise."""
    num_layers, interval = config.num_hidden_layers, config.no_rope_layer_interval or 4
    rotated = config.no_rope_layers or [(layer + 1) % interval for layer in range(num_layers)]
    if len(rotated) < num_layers:
        raise UsageError(f"config.json: no_rope_layers are {len(rotated)}, but num_hidden_layers is {num_layers}")
    kinds = layer_types(config, [FULL if rotary else SLIDING for rotary in rotated[:num_layers]])
    window = _window(config, None) if config.use_sliding_window else None
    return tuple(
        LayerConfig(window=window if kind == SLIDING else None, rotary=bool(rotary))
        for kind, rotary in zip(kinds, rotated, strict=False)
    )


def _window(config: ConfigJson, default: int | None) -> int | None:
    """`sliding_window`, of which null says that there is none, or `default` where it does not stand."""
    return default if config.sliding_window is UNSET else config.sliding_window


def layer_types(config: ConfigJson, default: list[str]) -> list[str]:
    """config.json's `layer_types`, or `default`; raises UsageError unless there is a known one for each layer."""
    kinds = config.layer_types or default
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise UsageError(
            f"config.json: unsupported layer_types {', '.join(sorted(unknown))}: rayllm runs {FULL} and {SLIDING}"
        )
    if len(kinds) != len(default):
        raise UsageError(f"config.json: layer_types are {len(kinds)}, but num_hidden_layers is {len(default)}")
    return kinds


@dataclass(frozen=True)
class Architecture:
    """What one architecture of transformers computes; a field says how it differs from a Llama without biases."""

    model_type: str
    """The architecture's name in config.json."""
    class_name: str
    """The class in transformers, which config.json's `architectures` names."""
    layers: Callable[[ConfigJson], tuple[LayerConfig, ...]] = alike
    """The kinds of the layers."""
    head_dim: int | None = None
    """What head_dim is where config.json does not say; None: hidden_size / num_attention_heads."""
    rope_theta: float = 10000.0
    """The base of the rotation where config.json does not say."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding where config.json does not say."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias whatever config.json says."""
    biases: tuple[str, ...] = ()
    """The switches of config.json that it obeys: 'attention_bias' (queries, keys, values, output), 'mlp_bias'."""
    qk_norm: bool = False
    """Whether every query and key head is normalised before the rotation."""
    gguf_name: str | None = None
    """What `general.architecture` of .gguf files says; None where they say another's."""
    gguf_pairwise: bool = False
    """Whether ggml rotates neighbouring pairs of a head: files then have the rows of q and k in that order."""


ARCHITECTURES = (
    Architecture(
        "llama",
        "LlamaForCausalLM",
        biases=("attention_bias", "mlp_bias"),
        gguf_name="llama",
        gguf_pairwise=True,
    ),
    Architecture("mistral", "MistralForCausalLM", windowed),  # its .gguf files say 'llama'
    Architecture("qwen2", "Qwen2ForCausalLM", windowed_above, qkv_bias=True, gguf_name="qwen2"),
    Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        windowed_above,
        head_dim=128,
        biases=("attention_bias",),
        qk_norm=True,
        gguf_name="qwen3",
    ),
    Architecture(
        "smollm3",
        "SmolLM3ForCausalLM",
        some_unrotated,
        rope_theta=2000000.0,
        tie_word_embeddings=True,
        biases=("attention_bias", "mlp_bias"),
        gguf_name="smollm3",
        gguf_pairwise=True,
    ),
)

GGUF_ARCHITECTURES = {record.gguf_name: record for record in ARCHITECTURES if record.gguf_name is not None}
"""The records by the `general.architecture` of .gguf files."""


def architecture_of(model_type: str | None, class_names: Sequence[str] = ()) -> Architecture:
    """The record of config.json's `model_type`, which must be of `architectures` if it has them; raises UsageError."""
    for record in ARCHITECTURES:
        if record.model_type == model_type and (not class_names or record.class_name in class_names):
            return record
    found = ", ".join(class_names) or f"model_type {model_type!r}"
    known = ", ".join(record.class_name for record in ARCHITECTURES)
    raise UsageError(f"unsupported architecture {found}: rayllm runs {known}")
