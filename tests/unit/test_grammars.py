"""What a shard knows of grammars: one that cannot be compiled, or followed, ends its own answer and no other."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import llguidance
import numpy as np
import pytest

from rayllm.frontend import grammar
from rayllm.runner.grammars import Grammars, LaneGrammar


def made(text: str) -> LaneGrammar:
    return of(llguidance.LLMatcher(grammar._tokenizer(), text, log_level=0))


def of(result: Any) -> LaneGrammar:
    future: Future[Any] = Future()
    future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)
    return LaneGrammar(future)


def regex(text: str) -> str:
    return str(llguidance.LLMatcher.grammar_from_regex(text))


@pytest.fixture
def grammars() -> Grammars:
    return Grammars(None, cast(Any, SimpleNamespace(vocab_size=257)))


def allowed(mask: np.ndarray) -> set[int]:
    return {i for i in range(257) if mask[i // 32] >> (i % 32) & 1}


def test_masks_of_a_batch(grammars: Grammars):
    good, broken, wrong = made(regex("[ab]c")), of(RuntimeError("no\ntokenizer")), made("start: B")
    masks = grammars.masks([(0, good), (2, broken), (3, wrong)], 4)
    assert allowed(masks[0]) == {ord("a"), ord("b")}
    assert all(len(allowed(masks[row])) == 257 for row in (1, 2, 3)), "what has no grammar is free"


def test_how_answers_end(caplog: pytest.LogCaptureFixture):
    good = made(regex("[ab]c"))
    assert [good.advance(ord("a")), good.advance(ord("c")), good.advance(ord("x"))] == [None, "stop", None]
    for bad in (of(RuntimeError("no\ntokenizer")), made("start: B")):
        assert [bad.advance(5), bad.advance(5)] == ["length", None]
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "an answer is cut off: RuntimeError: no tokenizer"
    assert "unknown name" in second and "\n" not in second


def test_one_that_had_ended_before(grammars: Grammars):
    """As after the death of a shard that told the last token, but not that it was the last: only the end may come."""
    matcher = llguidance.LLMatcher(grammar._tokenizer(), regex("ab"), log_level=0)
    matcher.consume_tokens([ord("a"), ord("b")])
    ended = of(matcher)
    assert allowed(grammars.masks([(0, ended)], 1)[0]) == {256}
    assert ended.advance(256) == "stop"
