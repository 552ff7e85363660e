"""What `rayllm batch` does: answers all rows of files.

Ray Data streams the rows from the node where this runs to the engines, wherever these are, and the answers back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from tqdm import tqdm

from deployments.batch_jobs.engine import JobEngine, Slots
from deployments.batch_jobs.input import Row, find_files, read_input
from deployments.batch_jobs.output import Job, JobOutput
from deployments.batch_jobs.rows import check_rows
from deployments.config import BatchConfig
from rayllm.checkpoint.sources import ModelSource, resolve_model
from rayllm.config import EngineConfig
from rayllm.engine import placement, ray_private
from rayllm.errors import AllFailedError, EngineDeadError, UsageError
from rayllm.frontend.chat import with_chat_template_read
from rayllm.frontend.tokenizer import load_tokenizer
from rayllm.progress import Progress

MAX_PORTION = 32
"""Rows that an engine's process is given at once, at most."""
POLL_S = 0.5
FAILURE_TIMEOUT_S = 5.0
BAR_PERIOD_S = 30.0
"""Time between two lines of the progress, where it is no terminal that shows them."""


def run(config: BatchConfig, pattern: str, folder: str, address: str | None = None) -> None:
    """Answers the rows of `pattern` (a file, folder or glob) that have no answer in `folder` yet.

    Raises `UsageError` for what cannot work, before an engine starts, `EngineDeadError` when no engine is left, and
    `AllFailedError` when every row has an error for an answer.
    """
    _check_ray_data()
    files = find_files(pattern)
    source = resolve_model(config.model, config.load_format)
    config.check_model(source.config)
    config = with_chat_template_read(config)
    tokenizer = load_tokenizer(config, source)
    signal.signal(signal.SIGTERM, _interrupt)
    start = time.monotonic()
    with JobOutput(Path(folder).absolute()) as output:
        found = read_input(files, output.spool)
        check_rows(found, config.served_names, tokenizer)
        output.begin(Job(config.name, found.hashes))
        rows = [row for row in found.rows if row.key not in output.done]
        if rows:
            _answer(rows, config, source, address, output)
    num_answers = len(output.done) - output.num_failed
    print(f"{num_answers} answers and {output.num_failed} errors in {folder} ({time.monotonic() - start:.0f} s)")
    if not num_answers:
        raise AllFailedError(f"all {output.num_failed} rows failed: their answers say why")


def _check_ray_data() -> None:
    if not all(importlib.util.find_spec(name) for name in ("pandas", "pyarrow")):  # what ray[data] brings
        raise UsageError("batch jobs need Ray Data: pip install 'rayllm[batch]'")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _answer(rows: list[Row], config: BatchConfig, source: ModelSource, address: str | None, output: JobOutput) -> None:
    config = dataclasses.replace(config, num_engines=min(config.num_engines, len(rows)))
    started_ray = placement.connect(address, min_cpus=config.tensor_parallel_size * config.num_engines)
    signal.signal(signal.SIGTERM, _interrupt)  # Ray has set its own
    groups: list[PlacementGroup] = []
    slots: Any = None
    try:
        engine = config.resolve(source.config, placement.choose_device(config.device))
        groups = placement.reserve_all(
            config.num_engines, engine.tensor_parallel_size, engine.device, engine.placement_timeout_s
        )
        slots = ray.remote(num_cpus=0)(Slots).remote(groups)
        with _Bar(slots, len(output.done), len(output.done) + len(rows)) as bar:
            for answers in _stream(rows, config, engine, source, slots):
                output.add(answers["key"], answers["line"], sum(answers["failed"]))
                bar.update(len(answers["key"]), sum(answers["tokens"]), output.num_failed)
    except ray.exceptions.RayError as error:
        raise _failure(slots, error) from None
    finally:
        for group in groups:
            placement.release(group)
        if started_ray:
            ray.shutdown()


def _failure(slots: Any, error: ray.exceptions.RayError) -> Exception:
    """What ended the job, in one line: what an engine's process told, or else what Ray says of it."""
    if slots is not None:
        with contextlib.suppress(ray.exceptions.RayError):
            if told := ray.get(slots.failure.remote(), timeout=FAILURE_TIMEOUT_S):
                return told
    return EngineDeadError(f"the job failed: {type(error).__name__}: {str(error).strip().splitlines()[-1]}")


def _portions(rows: list[Row], config: BatchConfig) -> list[list[Row]]:
    """The rows in portions, at least one for each engine."""
    size = max(1, min(MAX_PORTION, config.max_num_seqs // 8, len(rows) // config.num_engines))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _stream(
    rows: list[Row], config: BatchConfig, engine: EngineConfig, source: ModelSource, slots: Any
) -> Iterator[dict[str, list[Any]]]:
    """Yields the answers as they come, some rows at a time: what `JobEngine` returns."""
    from ray.data import ActorPoolStrategy, DataContext, read_datasource

    from deployments.batch_jobs.source import RowSource

    ray_private.quiet_ray_data()  # what ends a job is told in one line; Ray's log file has the rest
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # engines are watched where they are
    portions = _portions(rows, config)
    # An engine is full while twice as many rows as it runs at once are in its process: a portion lasts as long as its
    # longest answer.
    num_calls = min(len(portions), -(-2 * config.max_num_seqs // len(portions[0])))
    answers = read_datasource(
        RowSource(portions),
        override_num_blocks=len(portions),
        concurrency=min(2, len(portions)),
        num_cpus=0,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    ).map_batches(
        JobEngine,
        fn_constructor_kwargs={"args": config, "config": engine, "source": source, "slots": slots},
        compute=ActorPoolStrategy(
            size=config.num_engines,
            max_concurrent_calls_per_actor=num_calls,
            max_tasks_in_flight_per_actor=num_calls + 2,
        ),
        batch_size=len(portions[0]),  # without it Ray Data would have the engines' processes read the files
        batch_format="pyarrow",
        num_cpus=0,
    )
    for block in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield block.to_pydict()


class _Lines:
    """What a bar writes over itself, as lines of a log."""

    def write(self, text: str) -> None:
        if text := text.strip():
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class _Bar:
    """How many rows are done, and before the first how far the engines are."""

    def __init__(self, slots: Any, num_done: int, num_rows: int):
        self._is_terminal = sys.stderr.isatty()
        file, period_s = (sys.stderr, POLL_S) if self._is_terminal else (_Lines(), BAR_PERIOD_S)
        self._bar = tqdm(desc="starting", initial=num_done, total=num_rows, unit="row", file=file, mininterval=period_s)
        self._slots = slots
        self._begun = threading.Event()
        self._start = time.monotonic()
        self._num_tokens = 0
        self._follower = threading.Thread(target=self._follow_start, daemon=True)

    def __enter__(self) -> _Bar:
        self._follower.start()
        return self

    def _follow_start(self) -> None:
        known = Progress("")
        while not self._begun.wait(POLL_S):
            progress = ray.get(self._slots.progress.remote()) or known
            if progress == known:
                continue
            self._start = time.monotonic()  # the answers begin when no more is told
            is_shown = self._is_terminal or progress.stage != known.stage
            known, stage = progress, progress.stage
            if is_shown:
                self._bar.set_description_str(f"{stage} {progress.done}/{progress.total}" if progress.total else stage)

    def _begin(self) -> None:
        self._begun.set()
        self._follower.join()

    def update(self, num_rows: int, num_tokens: int, num_failed: int) -> None:
        if not self._begun.is_set():
            self._begin()
            self._bar.set_description_str("answering", refresh=False)
        self._num_tokens += num_tokens
        rate = self._num_tokens / max(time.monotonic() - self._start, POLL_S)
        self._bar.set_postfix_str(f"{num_failed} failed, {rate:.0f} tokens/s", refresh=False)
        self._bar.update(num_rows)

    def __exit__(self, *exception: object) -> None:
        self._begin()
        self._bar.close()
