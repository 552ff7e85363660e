"""What is shown of progress: on a terminal, to the end, and nothing to a pipe."""

from __future__ import annotations

import io
import re
import sys

import pytest

from rayllm.progress import Progress, ProgressBar, Tracker


class Stderr(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def shown(monkeypatch: pytest.MonkeyPatch, stages: list[Progress], is_terminal: bool = True) -> str:
    stderr = Stderr(is_terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    with ProgressBar() as show:
        for stage in stages:
            show(stage)
    return stderr.getvalue()


STAGES = [Progress("importing torch"), *(Progress("loading weights", k, 3) for k in range(4)), Progress("measuring")]


def test_a_terminal(monkeypatch: pytest.MonkeyPatch):
    """Each stage; numbers only of those that have pieces."""
    text = shown(monkeypatch, STAGES)
    lines = [line.strip() for line in text.split("\r") if line.strip()]
    assert [re.sub(r" *\[.*| .*(?= \d)", "", line) for line in lines] == [
        "starting",
        "importing torch",
        *(f"loading {k}/3" for k in range(4)),
        "measuring",
    ]
    assert "/0" not in text
    assert "?" not in text


def test_a_pipe(monkeypatch: pytest.MonkeyPatch):
    assert shown(monkeypatch, STAGES, is_terminal=False) == ""


def test_pieces_are_done_at_the_end():
    tracker = Tracker()
    seen = [tracker.progress for _ in tracker.track("abc", "loading weights")]
    assert seen == [Progress("loading weights", k, 3) for k in range(3)]
    assert tracker.progress == Progress("loading weights", 3, 3)
