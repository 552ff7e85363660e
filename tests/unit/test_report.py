"""The numbers of the line about the load."""

from __future__ import annotations

import dataclasses
from typing import Any

from deployments.engine import EngineStatus
from deployments.report import Load
from rayllm.engine.driver import EngineStats
from rayllm.messages.step import StepTimes


def status(engine: str, num_blocks: int = 100, **counts: int) -> EngineStatus:
    names = {field.name for field in dataclasses.fields(EngineStats)} - {"times"}
    numbers: dict[str, Any] = dict.fromkeys(names, 0) | {"num_free_blocks": num_blocks} | counts
    return EngineStatus(engine, EngineStats(**numbers, times=StepTimes()), num_blocks)


def test_engines_are_summed():
    before = [
        status("a", num_prefilled_tokens=100, num_output_tokens=50),
        status("b", num_prefilled_tokens=1000, num_output_tokens=1000),
    ]
    now = [
        status("a", num_prefilled_tokens=160, num_cached_tokens=40, num_output_tokens=70, num_running=2),
        status("c", num_output_tokens=30, num_waiting=1, num_free_blocks=50),
    ]
    load = Load.of(now, {earlier.engine: earlier.stats for earlier in before})
    assert load == Load(60, 40, 50, 2, 1, 50, 200)
    assert not load.is_idle
    assert load.line("m", 10) == (
        "m: 2 running, 1 waiting; 10.0 prompt tokens/s, 5.0 output tokens/s; KV cache 25.0% used, prefix hits 40.0%"
    )


def test_nothing_is_told_of_nothing():
    statuses = [status("a", num_prefilled_tokens=5, num_cached_tokens=5, num_output_tokens=5)]
    assert Load.of(statuses, {"a": statuses[0].stats}).is_idle
    assert Load.of([], {}).is_idle
    assert Load.of([], {}).line("m", 1).endswith("KV cache 0.0% used, prefix hits 0.0%")
    for busy in ("num_running", "num_waiting", "num_prefilled_tokens", "num_output_tokens"):
        assert not Load.of([status("a", **{busy: 1})], {}).is_idle
