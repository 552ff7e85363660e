"""SamplingParams refuse what has no meaning, in one line that names the field."""

import math

import msgspec
import pytest

from rayllm.errors import UsageError
from rayllm.sampling_params import MAX_LOGPROBS, SamplingParams

REFUSED = {
    "n": [0, -1, 129],
    "temperature": [-0.01, 100.1, math.nan, math.inf],
    "top_p": [0.0, -0.5, 1.01, math.nan],
    "top_k": [-2, 2**63],
    "min_p": [-0.01, 1.01, math.nan],
    "repetition_penalty": [0.0, -1.0, 100.1, math.nan],
    "presence_penalty": [-2.01, 2.01, math.nan],
    "frequency_penalty": [-2.01, 2.01, math.nan],
    "logit_bias": [{5: 100.1}, {5: 0.0, 6: -100.1}, {5: math.nan}],
    "seed": [2**63, -(2**63) - 1],
    "max_tokens": [0, -1, 2**63],
    "min_tokens": [-1, 17],
    "stop": ["", ["a\nb", ""]],
    "logprobs": [-1, MAX_LOGPROBS + 1],
    "prompt_logprobs": [-1, MAX_LOGPROBS + 1],
    "snapkv_limit": [0, -1, "none"],
}
ACCEPTED = {
    "n": [1, 128],
    "temperature": [0, 0.0, 100.0],
    "top_p": [1e-9, 1],
    "top_k": [-1, 0, 1, 10**6, 2**40],
    "min_p": [0.0, 1.0],
    "repetition_penalty": [1e-3, 100.0],
    "presence_penalty": [-2.0, 2.0],
    "frequency_penalty": [-2.0, 2.0],
    "logit_bias": [None, {}, {0: -100.0, 7: 100.0}],
    "seed": [None, 0, 2**63 - 1, -(2**63)],
    "max_tokens": [None, 1, 10**9, 2**40],
    "min_tokens": [0, 16],
    "stop": [None, "a", [], ["a", "b\n"]],
    "stop_token_ids": [[], [3, 4]],
    "logprobs": [None, 0, MAX_LOGPROBS],
    "prompt_logprobs": [None, 0, MAX_LOGPROBS],
    "snapkv_limit": [None, 1, "all"],
}


def cases(values):
    return [pytest.param(name, value, id=f"{name}={value!r}") for name in values for value in values[name]]


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_refused(name, value):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f", not {value!r}")
    assert "\n" not in message
    assert caught.value.param == name
    # what comes over the wire is refused alike
    with pytest.raises(msgspec.ValidationError, match=rf"\$\.{name}\b|^{name} must be "):
        msgspec.convert({name: value}, SamplingParams)


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_accepted(name, value):
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == value
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", None),
        ("max_tokens", 2.5),
        ("temperature", "hot"),
        ("seed", "1"),
        ("stop", [1]),
        ("stop_token_ids", ["x"]),
        ("stop_token_ids", 3),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: "1"}),
        ("ignore_eos", 1),
        ("n", True),
        ("snapkv_limit", 1.5),
    ],
)
def test_types_are_refused(name, value):
    """What would not survive the wire must not get there: it would end the driver."""
    with pytest.raises(UsageError, match=f"^{name} must be .*, not ") as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


def test_min_tokens_needs_no_max_tokens():
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


def test_stop_strings():
    assert SamplingParams().stop_strings == []
    assert SamplingParams(stop="ab").stop_strings == ["ab"]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]


def test_cannot_be_changed():
    with pytest.raises(AttributeError):
        SamplingParams().n = 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokns", "did you mean max_tokens?"),
        ("max_new_tokens", "did you mean max_tokens?"),
        ("temprature", "did you mean temperature?"),
        ("top-p", "did you mean top_p?"),
        ("beam_width", "known are "),
    ],
)
def test_unknown_fields_are_refused(name, hint):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: 2})
    assert str(caught.value).startswith(f"unknown sampling parameter {name}: {hint}")
    assert caught.value.param == name


def test_defaults_cost_nothing_on_the_wire():
    assert msgspec.to_builtins(SamplingParams()) == {}
