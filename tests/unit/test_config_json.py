"""config.json as people have it: fields of any type, RoPE by layer type, ids that are no tokens."""

from __future__ import annotations

import logging
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_configs import LLAMA3_ROPE, SIZES

from rayllm.errors import UsageError
from rayllm.model_config import ModelConfig
from rayllm.models.architectures import ARCHITECTURES, FULL, SLIDING
from rayllm.models.config_fields import ConfigJson, RopeJson
from rayllm.models.config_json import ROPE_TYPES, read_config

LLAMA = {"model_type": "llama", "vocab_size": 99, **SIZES}
FIELDS = typing.get_type_hints(ConfigJson, include_extras=True)
ROPE_FIELDS = typing.get_type_hints(RopeJson, include_extras=True)
NUMBERS = st.one_of(
    st.integers(-3, 300), st.sampled_from([2**31 - 1, 2**63, 10**400, 1e308]), st.floats(), st.floats(-2, 2)
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=5)
    | st.sampled_from([*ROPE_TYPES, FULL, SLIDING, "float16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def fits(value: Any, hint: Any) -> bool:
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        return False
    return True


def read_or_refuse(config: dict[str, Any]) -> str:
    """The error's message, or "" for a model that can be planned with."""
    try:
        model = read_config(config)
    except UsageError as error:
        return str(error)
    assert isinstance(model, ModelConfig)
    assert model.max_model_len >= 1
    assert model.num_hidden_layers == config["num_hidden_layers"]
    assert msgspec.json.decode(msgspec.json.encode(model), type=ModelConfig) == model
    return ""


@given(st.sampled_from(ARCHITECTURES), st.sampled_from(sorted(FIELDS)), VALUES)
def test_any_field_of_any_type(record, field: str, value: Any):
    if field == "num_hidden_layers" and fits(value, int) and value > 300:
        value = 300
    message = read_or_refuse(LLAMA | {"model_type": record.model_type, field: value})
    assert "\n" not in message
    if not fits(value, FIELDS[field]):
        assert message.startswith(f"config.json: {field}"), message


@given(st.sampled_from(["rope_parameters", "rope_scaling"]), st.sampled_from(ROPE_TYPES), st.data())
def test_any_field_of_rope_of_any_type(place: str, rope_type: str, data: st.DataObject):
    field, value = data.draw(st.sampled_from(sorted(ROPE_FIELDS))), data.draw(VALUES)
    message = read_or_refuse(LLAMA | {place: {"rope_type": rope_type, "factor": 2.0, field: value}})
    assert "\n" not in message
    if not fits(value, ROPE_FIELDS[field]):
        assert message.startswith(f"config.json: {place}"), message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "linear"}, "config.json: rope_scaling: expected `object | null`, got `str`"),
        ({"rms_norm_eps": None}, "config.json: rms_norm_eps: expected `float`, got `null`"),
        ({"rms_norm_eps": "1e-5"}, "config.json: rms_norm_eps: expected `float`, got `str`"),
        ({"hidden_size": True}, "config.json: hidden_size: expected `int`, got `bool`"),
        ({"layer_types": ["full_attention", 5]}, r"config.json: layer_types\[1\]: expected `str`, got `int`"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "config.json: rope_parameters: factor: expected"),
        ({"rope_scaling": {"type": "linear"}}, "config.json: rope_scaling lacks factor"),
        ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn"}}, r"config.json: rope_theta \(1.0\) must be over 1"),
        ({"hidden_size": 2}, r"config.json: head_dim \(0\) must be even"),
        ({"architectures": "LlamaForCausalLM"}, "config.json: architectures: expected"),
        ({"model_type": ["llama"]}, "config.json: model_type: expected"),
    ],
)
def test_the_line_names_file_and_field(changes: dict[str, Any], message: str):
    with pytest.raises(UsageError, match="^" + message):
        read_config(LLAMA | changes)


def test_a_field_that_is_missing():
    with pytest.raises(UsageError, match=r"^config\.json lacks vocab_size$"):
        read_config({"model_type": "llama", **SIZES})
    with pytest.raises(UsageError, match="unsupported architecture model_type 'gemma'"):
        read_config({"model_type": "gemma"})


def test_rope_by_layer_type():
    """As transformers 5 writes it; a type of which there is no layer does not matter."""
    other = LLAMA3_ROPE | {"rope_theta": 2e4}
    whole = read_config(LLAMA | {"rope_parameters": LLAMA3_ROPE})
    both = {FULL: LLAMA3_ROPE, SLIDING: LLAMA3_ROPE}
    assert read_config(LLAMA | {"rope_parameters": both}) == whole
    qwen = {"model_type": "qwen3", "vocab_size": 99, **SIZES, "layer_types": [FULL] * 3}
    expected = read_config(qwen | {"rope_parameters": LLAMA3_ROPE})
    assert read_config(qwen | {"rope_parameters": both | {SLIDING: other}}) == expected
    for config, rope, message in (
        (LLAMA, both | {SLIDING: other}, "differ between full_attention, sliding_attention"),
        (qwen, {SLIDING: LLAMA3_ROPE}, "lacks full_attention, of which there are layers"),
        (LLAMA, both | {"rope_theta": 1e4}, "rope_theta: expected `object`"),
        (LLAMA, {FULL: {"rope_type": 3}}, "rope_type: expected `str"),
        (LLAMA, {FULL: {"rope_type": "dynamic"}}, "unsupported RoPE 'dynamic'"),
    ):
        with pytest.raises(UsageError, match="^config.json: .*" + message):
            read_config(config | {"rope_parameters": rope})


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 4096),
        ({"type": "linear", "factor": 4.0}, 16384),
        ({"type": "linear", "factor": 2.5, "original_max_position_embeddings": 1024}, 10240),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "original_max_position_embeddings": 1000}, 4096),
    ],
)
def test_longest_context(rope: dict[str, Any], longest: int):
    """As vLLM has it: vicuna-16k is 4096 positions and a linear factor of 4."""
    assert read_config(LLAMA | {"max_position_embeddings": 4096, "rope_scaling": rope}).max_model_len == longest


@given(st.sampled_from(["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "eos_token_id"]), VALUES)
def test_any_field_of_generation_config(field: str, value: Any):
    try:
        read_config(LLAMA, {field: value})
    except UsageError as error:
        message = str(error)
    else:
        return
    assert message.startswith(f"generation_config.json: {field}") and "\n" not in message


IDS = st.one_of(st.integers(-2, 120), st.booleans(), st.floats(), st.text(max_size=2), st.none(), st.lists(st.just(2)))


@given(IDS | st.lists(IDS, max_size=4), IDS | st.lists(IDS, max_size=4))
def test_ends_are_tokens(own: Any, generation: Any):
    entries = [
        *(own if isinstance(own, list) else [own]),
        *(generation if isinstance(generation, list) else [generation]),
    ]
    expected = dict.fromkeys(entry for entry in entries if type(entry) is int and 0 <= entry < 99)
    assert list(read_config(LLAMA | {"eos_token_id": own}, {"eos_token_id": generation}).eos_token_ids) == list(
        expected
    )


@pytest.mark.parametrize(
    ("found", "kept", "left_out"),
    [
        ([2, 50000], (2,), "50000"),
        (2.0, (), "2.0"),
        ("2", (), "'2'"),
        ([1, True, -1, [3]], (1,), "True, -1, [3]"),
        ({"a": 1}, (), "{'a': 1}"),
        (None, (), ""),
        ([], (), ""),
    ],
)
def test_what_is_no_token_is_told_in_a_line(
    found: Any, kept: tuple[int, ...], left_out: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    assert read_config(LLAMA, {"eos_token_id": found}).eos_token_ids == kept
    line = f"generation_config.json: eos_token_id: {left_out} is left out, token ids are 0 to 98"
    assert caplog.messages == ([line] if left_out else [])
