"""The lines of `--log-requests`: whatever clients send, each is one line, and its numbers can be read back."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from deployments.request_log import CURRENT, RequestLog

NAMES = ["id", "model", "path", "prompt_tokens", "output_tokens", "finish", "seconds", "status"]


@given(st.text(), st.text(), st.integers(0, 10**6), st.integers(100, 599))
def test_any_request_is_one_line(request_id: str, path: str, number: int, status: int):
    log = RequestLog(is_on=True)
    record = log.begin(request_id, path)
    assert CURRENT.get() is record
    record.num_prompt_tokens = record.num_output_tokens = number
    log.end(record, status)
    [line] = log.take()
    assert line.splitlines() == [line]
    fields = dict(field.split("=", 1) for field in line.split(" "))
    assert list(fields) == NAMES
    numbers = [fields[name] for name in ("prompt_tokens", "output_tokens", "status")]
    assert numbers == [str(number), str(number), str(status)]
    assert re.fullmatch(r"\d+\.\d{3}", fields["seconds"])
    assert log.take() == []


def test_nothing_is_kept_when_it_is_off():
    log = RequestLog(is_on=False)
    log.end(log.begin("a", "/"), 200)
    assert log.take() == []
