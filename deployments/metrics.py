"""What operators watch, in two places at once: on `/metrics` for the whole application, and in Ray's own metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.util import metrics as ray_metrics

from deployments.request_log import CURRENT
from rayllm.engine.driver import EngineStats
from rayllm.frontend.output import Increment

PREFIX = "rayllm_"
SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]
"""Buckets of times of requests."""
TOKEN_SECONDS = [0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1]
"""Buckets of times between tokens."""
COUNT_EVERY = 64
"""Output tokens of a request that are counted at once: Ray's counters cost more than sending a token."""


class Counter:
    """Counts for `/metrics` and for Ray."""

    def __init__(self, registry: prometheus_client.CollectorRegistry, name: str, doc: str, *labels: str):
        self._names = labels
        self._own = prometheus_client.Counter(name, doc, labels, registry=registry)
        self._ray = ray_metrics.Counter(name, doc, labels)

    def add(self, amount: float, *labels: str) -> None:
        """Adds to the count of these labels."""
        if amount:
            self._own.labels(*labels).inc(amount)
            self._ray.inc(amount, dict(zip(self._names, labels, strict=True)))


class Histogram:
    """Observes for `/metrics` and for Ray."""

    def __init__(
        self, registry: prometheus_client.CollectorRegistry, name: str, doc: str, buckets: list[float], *labels: str
    ):
        self._names = labels
        self._own = prometheus_client.Histogram(name, doc, labels, buckets=buckets, registry=registry)
        self._ray = ray_metrics.Histogram(name, doc, buckets, labels)

    def observe(self, value: float, *labels: str) -> None:
        """Puts a value, in seconds, into its bucket of these labels."""
        self._own.labels(*labels).observe(value)
        self._ray.observe(value, dict(zip(self._names, labels, strict=True)))


class ServiceMetrics:
    """The metrics of one Api process."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.responses = self._counter("http_responses", "HTTP responses", "path", "status")
        self.requests = self._counter(
            "requests", "Choices answered, by how they ended: stop, length, abort, error", "model", "ending"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens", "model")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Those from the prefix cache", "model")
        self.output_tokens = self._counter("output_tokens", "Output tokens", "model")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", SECONDS
        )
        self.per_token = self._histogram(
            "time_per_output_token_seconds", "Mean time between a choice's tokens after its first", TOKEN_SECONDS
        )
        self.request = self._histogram("request_seconds", "From a request's arrival to its end", SECONDS)
        self.queue = self._histogram(
            "queue_seconds", "From a choice's arrival at the engine to its first step", SECONDS
        )

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(self.registry, PREFIX + name, doc, *labels)

    def _histogram(self, name: str, doc: str, buckets: list[float]) -> Histogram:
        return Histogram(self.registry, PREFIX + name, doc, buckets, "model")

    def text(self) -> str:
        """All of them in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry).decode()


class RequestTimer:
    """Measures one request, however it ends."""

    def __init__(self, metrics: ServiceMetrics, model: str, prompts: Sequence[Sequence[int]]):
        self._metrics = metrics
        self._model = model
        self._prompts = prompts
        self._first: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._finishes: set[str] = set()
        self._num_open = self._uncounted = 0

    def __enter__(self) -> RequestTimer:
        self._start = time.monotonic()
        self._record = CURRENT.get()
        self._metrics.prompt_tokens.add(sum(map(len, self._prompts)), self._model)
        return self

    def add(self, increment: Increment) -> None:
        """Takes note of what was sent just now."""
        now, index, metrics = time.monotonic(), increment.index, self._metrics
        self._uncounted += len(increment.token_ids)
        if self._uncounted >= COUNT_EVERY:
            self._count()
        if index not in self._first:
            if not self._first:
                metrics.first_token.observe(now - self._start, self._model)
            metrics.queue.observe(increment.queue_s, self._model)
            metrics.cached_tokens.add(increment.num_cached_tokens, self._model)
            self._first[index], self._num_tokens[index] = now, 0
            self._num_open += 1
        self._num_tokens[index] += len(increment.token_ids)
        if increment.finish_reason:
            self._num_open -= 1
            self._finishes.add(increment.finish_reason)
            metrics.requests.add(1, self._model, increment.finish_reason)
            if (num_more := self._num_tokens[index] - 1) > 0:
                metrics.per_token.observe((now - self._first[index]) / num_more, self._model)

    def _count(self) -> None:
        self._metrics.output_tokens.add(self._uncounted, self._model)
        self._uncounted = 0

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._count()
        if kind is None:
            self._metrics.request.observe(time.monotonic() - self._start, self._model)
        else:
            ending = "error" if issubclass(kind, Exception) else "abort"
            self._finishes.add(ending)
            self._metrics.requests.add(max(self._num_open, 1), self._model, ending)
        if self._record:
            self._record.model = self._model
            self._record.num_prompt_tokens = sum(map(len, self._prompts))
            self._record.num_output_tokens = sum(self._num_tokens.values())
            self._record.finish = ",".join(sorted(self._finishes))


@dataclass(frozen=True)
class EngineMetric:
    """A number that engines tell of themselves."""

    name: str
    doc: str
    read: Callable[[EngineStats, int], float]
    """Takes what the engine counts, and how many KV cache blocks it has."""
    is_counter: bool = True
    """Whether it is counted since the engine started; otherwise it is what is now."""


ENGINE_METRICS = (
    EngineMetric("running_sequences", "Sequences that run", lambda stats, _: stats.num_running, False),
    EngineMetric("waiting_sequences", "Sequences that wait for room", lambda stats, _: stats.num_waiting, False),
    EngineMetric(
        "kv_blocks_used",
        "KV cache blocks that sequences hold",
        lambda stats, num_blocks: num_blocks - stats.num_free_blocks,
        False,
    ),
    EngineMetric("kv_blocks", "KV cache blocks in all", lambda _, num_blocks: num_blocks, False),
    EngineMetric("preemptions", "Preemptions since the engine started", lambda stats, _: stats.num_preemptions),
    EngineMetric(
        "pruned_tokens",
        "Prompt tokens whose KV was given up since the engine started",
        lambda stats, _: stats.num_pruned_tokens,
    ),
    EngineMetric(
        "pruned_blocks",
        "KV cache blocks that pruned prompts gave back since the engine started",
        lambda stats, _: stats.num_pruned_blocks,
    ),
    EngineMetric("steps", "Steps since the engine started", lambda stats, _: stats.num_steps),
    EngineMetric("sequences", "Sequences that came since the engine started", lambda stats, _: stats.num_sequences),
    EngineMetric(
        "driver_seconds", "Time that the driver was busy since the engine started", lambda stats, _: stats.driver_s
    ),
    EngineMetric(
        "launch_seconds",
        "Time that Python took to hand steps to shard 0's device since the engine started",
        lambda stats, _: stats.times.launch_s,
    ),
    EngineMetric(
        "device_seconds",
        "Time that shard 0's device computed since the engine started",
        lambda stats, _: stats.times.device_s,
    ),
    EngineMetric("prune_seconds", "Time of it for pruning", lambda stats, _: stats.times.prune_s),
)


def engine_values(stats: EngineStats, num_blocks: int) -> dict[str, float]:
    """The values of `ENGINE_METRICS`, by name."""
    return {metric.name: float(metric.read(stats, num_blocks)) for metric in ENGINE_METRICS}


class EngineGauges:
    """An engine's state, for Ray, whose counters cannot be set."""

    def __init__(self, model: str):
        self._gauges = {
            metric.name: ray_metrics.Gauge(PREFIX + metric.name, metric.doc, ("model",)).set_default_tags(
                {"model": model}
            )
            for metric in ENGINE_METRICS
        }

    def set(self, stats: EngineStats, num_blocks: int) -> None:
        """Tells Ray how the engine is."""
        for name, value in engine_values(stats, num_blocks).items():
            self._gauges[name].set(value)


class _Collected:
    """A registry, as far as an exposition needs one."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]):
        self.collect = collect


def merged(texts: Iterable[str], engines: dict[str, dict[str, dict[str, float]]]) -> bytes:
    """One exposition of several processes' `texts`, values of equal labels added up, and of each model's engines.

    `engines`: what `engine_values` says of each engine, by model and by the engine's id.
    """
    families: dict[str, Metric] = {}
    totals: dict[str, dict[tuple[Any, ...], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):
                continue
            families.setdefault(family.name, family)
            values = totals.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, *sorted(sample.labels.items())
                values[key] = values.get(key, 0) + sample.value

    def collect() -> Iterator[Metric]:
        for name, family in families.items():
            whole = Metric(name, family.documentation, family.type)
            for (sample, *labels), value in totals[name].items():
                whole.add_sample(sample, dict(labels), value)
            yield whole
        for metric in ENGINE_METRICS:
            kind = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
            of_engines = kind(PREFIX + metric.name, metric.doc, labels=["model", "engine"])
            for model, states in engines.items():
                for engine, state in states.items():
                    of_engines.add_metric([model, engine], state[metric.name])
            yield of_engines

    return prometheus_client.generate_latest(_Collected(collect))
