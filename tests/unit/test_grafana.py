"""The dashboard queries metrics and labels that `/metrics` has, and leaves none of them out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import ENGINE_METRICS, Counter, Histogram, ServiceMetrics, merged

DASHBOARD = json.loads((Path(__file__).resolve().parents[2] / "deployments" / "grafana.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS: list[dict[str, Any]] = [target for panel in PANELS for target in panel["targets"]]
QUERIES: list[str] = [target["expr"] for target in TARGETS] + [DASHBOARD["templating"]["list"][1]["query"]["query"]]


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of each sample of an exposition in which every metric has a value, by the sample's name."""
    metrics = ServiceMetrics()
    for metric in vars(metrics).values():
        match metric:
            case Counter():
                metric.add(1, *metric._names)
            case Histogram():
                metric.observe(1, *metric._names)
    values = {metric.name: 1.0 for metric in ENGINE_METRICS}
    page = merged([metrics.text()], {"model": {"engine": values}}).decode()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\brayllm_\w+", query))


def test_every_name_is_exposed(labels: dict[str, set[str]]) -> None:
    for query in QUERIES:
        assert names_in(query), query
        assert names_in(query) <= labels.keys()


def test_every_metric_is_shown(labels: dict[str, set[str]]) -> None:
    assert set().union(*map(names_in, QUERIES)) == labels.keys()


def test_every_label_is_there(labels: dict[str, set[str]]) -> None:
    for target in TARGETS:
        query, legend = target["expr"], target["legendFormat"]
        used = {*re.findall(r"(\w+)=~", query), *re.findall(r"\{\{(\w+)\}\}", legend)}
        used |= {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
        for name in names_in(query):
            assert used <= labels[name], (query, legend)


def test_panels_are_distinct_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(p["x"] + x, p["y"] + y) for p in places for x in range(p["w"]) for y in range(p["h"])]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)
