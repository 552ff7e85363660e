"""What operators watch, in two places at once: on `/metrics` for the whole application, and in Ray's own metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.util import metrics as ray_metrics

from rayllm.engine.driver import EngineStats
from rayllm.frontend.output import Increment

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]
TOKEN_SECONDS = [0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1]


COUNT_EVERY = 64
"""Output tokens of a request that are counted at once: Ray's counters cost more than sending a token."""


class Counter:
    """Counts for `/metrics` and for Ray."""

    def __init__(self, registry: prometheus_client.CollectorRegistry, name: str, doc: str, *labels: str):
        self._names = labels
        self._own = prometheus_client.Counter(name, doc, labels, registry=registry)
        self._ray = ray_metrics.Counter(name, doc, labels)

    def add(self, amount: float, *labels: str) -> None:
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
        self._own.labels(*labels).observe(value)
        self._ray.observe(value, dict(zip(self._names, labels, strict=True)))


class ServiceMetrics:
    """Those of one Api process."""

    def __init__(self) -> None:
        self.registry = registry = prometheus_client.CollectorRegistry()
        self.responses = Counter(registry, "rayllm_http_responses", "HTTP responses", "path", "status")
        self.requests = Counter(
            registry, "rayllm_requests", "Choices answered, by how they ended: stop, length, abort, error", *ENDING
        )
        self.prompt_tokens = Counter(registry, "rayllm_prompt_tokens", "Prompt tokens", "model")
        self.cached_tokens = Counter(registry, "rayllm_cached_prompt_tokens", "Those from the prefix cache", "model")
        self.output_tokens = Counter(registry, "rayllm_output_tokens", "Output tokens", "model")
        first, each, whole, queue = (
            "From a request's arrival to its first token",
            "Mean time between a choice's tokens after its first",
            "From a request's arrival to its end",
            "From a choice's arrival at the engine to its first step",
        )
        self.first_token = Histogram(registry, "rayllm_time_to_first_token_seconds", first, SECONDS, "model")
        self.per_token = Histogram(registry, "rayllm_time_per_output_token_seconds", each, TOKEN_SECONDS, "model")
        self.request = Histogram(registry, "rayllm_request_seconds", whole, SECONDS, "model")
        self.queue = Histogram(registry, "rayllm_queue_seconds", queue, SECONDS, "model")

    def text(self) -> str:
        return prometheus_client.generate_latest(self.registry).decode()


ENDING = ("model", "ending")


class RequestTimer:
    """Measures one request, however it ends."""

    def __init__(self, metrics: ServiceMetrics, model: str, prompts: Sequence[Sequence[int]]):
        self._metrics = metrics
        self._model = model
        self._prompts = prompts
        self._first: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._num_open = self._uncounted = 0

    def __enter__(self) -> RequestTimer:
        self._start = time.monotonic()
        self._metrics.prompt_tokens.add(sum(map(len, self._prompts)), self._model)
        return self

    def add(self, increment: Increment) -> None:
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
            self._metrics.requests.add(max(self._num_open, 1), self._model, ending)


class EngineGauges:
    """An engine's state, for Ray, whose counters cannot be set."""

    def __init__(self, model: str):
        self._gauges = {
            name: ray_metrics.Gauge(f"rayllm_{name}", doc, ("model",)).set_default_tags({"model": model})
            for name, doc in ENGINE_METRICS.items()
        }

    def set(self, stats: EngineStats, num_blocks: int) -> None:
        for name, value in engine_values(stats, num_blocks).items():
            self._gauges[name].set(value)


class _Collected:
    """A registry, as far as an exposition needs one."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]):
        self.collect = collect


ENGINE_METRICS = {
    "running_sequences": "Sequences that run",
    "waiting_sequences": "Sequences that wait for room",
    "kv_blocks_used": "KV cache blocks that sequences hold",
    "kv_blocks": "KV cache blocks in all",
    "preemptions": "Preemptions since the engine started",
    "pruned_tokens": "Prompt tokens whose KV was given up since the engine started",
    "pruned_blocks": "KV cache blocks that pruned prompts gave back since the engine started",
    "steps": "Steps since the engine started",
    "sequences": "Sequences that came since the engine started",
    "driver_seconds": "Time that the driver was busy since the engine started",
    "launch_seconds": "Time that Python took to hand steps to shard 0's device since the engine started",
    "device_seconds": "Time that shard 0's device computed since the engine started",
    "prune_seconds": "Time of it for pruning",
}
ENGINE_COUNTERS = set(list(ENGINE_METRICS)[4:])
"""The others are what is now."""


def engine_values(stats: EngineStats, num_blocks: int) -> dict[str, float]:
    """In the order of `ENGINE_METRICS`."""
    used = num_blocks - stats.num_free_blocks
    pruned = stats.num_pruned_tokens, stats.num_pruned_blocks
    times = stats.driver_s, stats.times.launch_s, stats.times.device_s, stats.times.prune_s
    totals = stats.num_preemptions, *pruned, stats.num_steps, stats.num_sequences, *times
    values = stats.num_running, stats.num_waiting, used, num_blocks, *totals
    return dict(zip(ENGINE_METRICS, map(float, values), strict=True))


def merged(texts: Iterable[str], engines: dict[str, dict[str, dict[str, float]]]) -> bytes:
    """One exposition of several processes' `texts`, values of equal labels added up, and of each model's engines."""
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
        for name, doc in ENGINE_METRICS.items():
            kind = CounterMetricFamily if name in ENGINE_COUNTERS else GaugeMetricFamily
            of_engines = kind(f"rayllm_{name}", doc, labels=["model", "engine"])
            for model, states in engines.items():
                for engine, state in states.items():
                    of_engines.add_metric([model, engine], state[name])
            yield of_engines

    return prometheus_client.generate_latest(_Collected(collect))
