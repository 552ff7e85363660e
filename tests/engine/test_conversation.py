"""What `rayllm chat` and `rayllm generate` show, on an engine that tests share."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from engine_testing import SMOLLM2, greedy

from rayllm import LLM, SamplingParams
from rayllm.frontend.commands import _answer, _converse

BRIEF = [{"role": "system", "content": "You are brief."}]
LONG = "Tell me of the rain, " * 40
"""A question of 240 tokens: its first token takes a second."""


class Typed(io.StringIO):
    """Lines that somebody types; before some he does something else."""

    def __init__(self, *lines: str | Callable[[], None]):
        super().__init__()
        self._lines = list(lines)

    def readline(self, size: int = -1, /) -> str:
        while self._lines:
            line = self._lines.pop(0)
            if isinstance(line, str):
                return line + "\n"
            line()
        return ""


def interrupt_soon() -> None:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.fixture
def llm(engines) -> LLM:
    return engines("smollm2", **SMOLLM2)


@pytest.fixture
def converse(llm: LLM, monkeypatch, capsys) -> Callable[..., list[str]]:
    def run(*lines: str | Callable[[], None], system: Any = (), params: SamplingParams | None = None) -> list[str]:
        """What follows each of the lines, but for the first one of all."""
        monkeypatch.setattr(sys, "stdin", Typed(*lines))
        _converse(llm, list(system), params or greedy(6))
        shown = capsys.readouterr().out.split("> ")
        assert shown[0] == "/clear begins anew, Ctrl-C stops an answer, Ctrl-D ends the chat.\n"
        assert shown[-1] == "\n"
        return shown[1:-1]

    return run


def said(llm: LLM, *texts: str, system: Any = ()) -> str:
    """The answer to a conversation of these turns, in 6 tokens."""
    roles = ("user", "assistant") * len(texts)
    messages = [*system, *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))]
    text: str = llm.chat(messages, greedy(6), use_tqdm=False)[0]["text"]
    return text


CUT = " [cut off by --max-tokens 6]\n\n"


@pytest.mark.parametrize("system", [[], BRIEF])
def test_turns_and_clear(llm: LLM, converse, system: list[dict[str, Any]]):
    one = said(llm, "Hi!", system=system)
    two = said(llm, "Hi!", one, "And you?", system=system)
    anew = said(llm, "And you?", system=system)
    assert anew != two
    assert converse("Hi!", "And you?", " /clear ", "", "And you?", system=system) == [
        one + CUT,
        two + CUT,
        "",
        "",
        anew + CUT,
    ]


def test_a_question_without_an_answer_is_taken_back(llm: LLM, converse):
    """Interrupted before the first token, or too long for the context."""
    one = said(llm, "Hi!")
    two = said(llm, "Hi!", one, "And you?")
    shown = converse(interrupt_soon, LONG, "Hi!", interrupt_soon, LONG, LONG * 2, "And you?")
    assert shown[0] == shown[2] == "[stopped: the question is taken back]\n\n"
    assert (shown[1], shown[4]) == (one + CUT, two + CUT)
    assert re.fullmatch(r"Error: .* context .*320.* \(/clear begins anew\)\n\n", shown[3])


def test_a_single_question_that_is_too_long(converse):
    [shown] = converse(LONG * 2)
    assert re.fullmatch(r"Error: .* context .*320.*\n\n", shown)
    assert "/clear" not in shown


def test_an_answer_that_fills_the_context(llm: LLM, converse):
    [shown, after] = converse(LONG, "Hi!", params=SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert shown.endswith(" [the context of 320 tokens is full: /clear begins anew]\n\n")
    assert after.endswith("(/clear begins anew)\n\n")


def test_an_answer_without_text(llm: LLM, converse):
    """Is an answer, and the conversation goes on."""
    ids = llm.chat([{"role": "user", "content": "Hi!"}], greedy(1), use_tqdm=False)[0]["token_ids"]
    shown = converse("Hi!", "And you?", params=SamplingParams(temperature=0, max_tokens=6, stop_token_ids=ids))
    assert shown[0] == "\n\n"
    assert shown[1].strip()


def test_generate_shows_choices_and_log_probabilities(llm: LLM, capsys):
    params = SamplingParams(n=2, seed=3, max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    _answer(llm, "Once upon a time", params)
    shown = capsys.readouterr().out
    [result] = llm.generate("Once upon a time", params, use_tqdm=False)
    first, second = result["choices"]
    assert shown.startswith(first["text"] + "\n\n[log-probabilities of the prompt tokens but the first, ")
    assert f"\n\n[choice 2]\n{second['text']}\n\n[log-prob" in shown
    assert re.search(r"\n\n4 prompt tokens, 10 output tokens, \d+ ms to the first token, [\d.]+ tokens/s\n$", shown)
    tables = re.findall(r"^\[log-probabilities of the (.*), each before .*\]\n((?: .*\n)+)", shown, re.MULTILINE)
    assert [name for name, _ in tables] == ["prompt tokens but the first", "output tokens", "output tokens"]
    for (_, table), entries in zip(tables[1:], (first["logprobs"], second["logprobs"]), strict=True):
        lines = [[float(number) for number in re.findall(r"(-?\d+\.\d{4}) ['\"]", line)] for line in table.splitlines()]
        assert len(lines) == len(entries) == 5
        for line, entry in zip(lines, entries, strict=True):
            assert line == pytest.approx(list(entry.values()), abs=1e-3)
