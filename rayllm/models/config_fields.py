"""The fields of config.json that mean something here, with their types; transformers 4 and 5 both write them."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from rayllm.errors import UsageError

T = TypeVar("T")

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Layers = Annotated[int, Meta(ge=1, le=100_000)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
NotNegative = Annotated[float, Meta(ge=0, le=1e30)]


class ConfigJson(msgspec.Struct, frozen=True):
    """A model's config.json. What may be null there is as good as absent; architectures say what then holds."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    model_type: str | None = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    hidden_act: str = "silu"
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size | None = None
    rms_norm_eps: NotNegative = 1e-6
    dtype: str | None = None
    torch_dtype: str | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    rope_theta: Positive | None = None
    rope_parameters: dict[str, Any] | None = None
    """A `RopeJson`, or one for each of `layer_types`."""
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: Positive | None = None
    layer_types: list[str] | None = None
    use_sliding_window: bool | None = None
    sliding_window: Size | UnsetType | None = UNSET
    max_window_layers: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Size | None = None
    eos_token_id: Any = None


class RopeJson(msgspec.Struct, frozen=True):
    """How positions are rotated: `rope_parameters`, or `rope_scaling` of transformers 4."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Positive | None = None
    factor: Positive | None = None
    factors: list[Positive] | None = None
    original_max_position_embeddings: Size | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    truncate: bool | None = None


def typed(content: object, kind: type[T], place: str) -> T:
    """`content`, which stands in `place` (a file, perhaps a field of it), as a `kind` of msgspec.

    Raises UsageError that names place and field for what is missing there or of another type.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at ")
        if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
            raise UsageError(f"{place} lacks {missing[1]}") from None
        field = path.strip("`").removeprefix("$").removeprefix(".")
        raise UsageError(f"{place}: {field and field + ': '}{what[0].lower()}{what[1:]}") from None
