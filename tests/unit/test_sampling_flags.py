"""Every sampling parameter is a flag; what flags say arrives."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayllm.command_line import Parser
from rayllm.errors import UsageError
from rayllm.frontend.sampling_flags import DEFAULTS, add_sampling_arguments, sampling_params
from rayllm.sampling_params import SamplingParams

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 128),
    "temperature": st.floats(0, 100),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 2**63 - 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 100),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.none() | st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
    "max_tokens": st.none() | st.integers(50, 2**63 - 1),
    "min_tokens": st.integers(0, 50),
    "stop": st.lists(st.text(min_size=1), min_size=1, max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "logprobs": st.none() | st.integers(0, 64),
    "prompt_logprobs": st.none() | st.integers(0, 64),
    "skip_special_tokens": st.booleans(),
    "structured_outputs": st.none() | st.fixed_dictionaries({"choice": st.lists(st.text(min_size=1), min_size=1)}),
    "snapkv_limit": st.none() | st.just("all") | st.integers(1, 2**63 - 1),
}
RENAMED = {"seed": "request-seed", "snapkv_limit": "request-snapkv-limit"}


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="rayllm")
    add_sampling_arguments(made.add_argument_group("sampling"))
    return made


PARSER = parser()


def parse(arguments: list[str]) -> SamplingParams:
    return sampling_params(PARSER.parse_args(arguments))


def flags_of(name: str, value: Any) -> list[str]:
    """What a user types for it."""
    flag = RENAMED.get(name, name.replace("_", "-"))
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list):
        return [f"--{flag}={item}" for item in value]
    return [f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}"]


@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_flags_say_what_params_hold(fields: dict[str, Any]):
    arguments = [argument for name, value in fields.items() for argument in flags_of(name, value)]
    assert parse(arguments) == SamplingParams(**(DEFAULTS | fields))


def test_every_field_is_a_flag():
    assert set(FIELDS) == set(SamplingParams.__struct_fields__)
    text = " ".join(PARSER.format_help().split())
    for name in FIELDS:
        assert f" --{RENAMED.get(name, name.replace('_', '-'))} " in text.replace(",", " ")


def test_help_is_sentences():
    """That stand alone, with the defaults that hold here."""
    actions = {action.dest: action for action in PARSER._actions if action.dest != "help"}
    for action in actions.values():
        assert action.help
        assert action.help[0].isupper()
        assert action.help.endswith(".")
        assert "None" not in action.help
        assert "\n" not in action.help
    assert "(default: 256)" in (actions["max_tokens"].help or "")
    assert "(default: 1.0)" in (actions["top_p"].help or "")
    assert "default" not in (actions["stop"].help or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "hot"], "temperature must be a number from 0 to 100, not 'hot'"),
        (["--top-k", "1.5"], "top_k must be an integer, at least -1, not 1.5"),
        (["--logit-bias", "5"], "logit_bias must be a map"),
        (["--logit-bias", '{"a": 1}'], "logit_bias must be a map"),
        (["--stop-token-ids", "1", "--stop-token-ids", "x"], "stop_token_ids must be a list"),
        (["--stop", ""], "stop must be a non-empty text"),
        (["--structured-outputs", "x"], "structured_outputs must be a map of one of json, json_object, regex"),
        (["--structured-outputs", "{}"], "structured_outputs must have exactly one of"),
        (["--request-seed", "x"], "seed must be an integer"),
        (["--min-tokens", "300"], "min_tokens must be at most max_tokens"),
    ],
)
def test_refusals(arguments: list[str], message: str):
    with pytest.raises(UsageError) as refused:
        parse(arguments)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "value"), [(".5", 0.5), ("5e-1", 0.5), ("1", 1.0), ("0", 0.0)])
def test_spellings_of_numbers(text: str, value: float):
    assert parse(["--temperature", text]).temperature == value


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_spellings_of_no_limit(text: str):
    assert parse(["--max-tokens", text]).max_tokens is None
