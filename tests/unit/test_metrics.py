"""The list of metrics, the page about them, and what the processes export."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tidepool.operate.exporter.figures import Figures
from tidepool.operate.metrics import ALL, EXPORTER, OPERATOR, Metric, Metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def row(each: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in each.labels) or "-"
    return f"| `{each.exported}` | {each.kind} | {labels} | {each.text} |"


def table(metrics: tuple[Metric, ...]) -> str:
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *map(row, metrics)])


def test_the_page_has_every_metric() -> None:
    text = PAGE.read_text()
    assert table(EXPORTER) in text, "docs/metrics.md, Exporter: the table of tidepool/operate/metrics.py"
    assert table(OPERATOR) in text, "docs/metrics.md, Operator"
    known = {name for each in ALL for name in (each.exported, *each.series)}
    assert set(re.findall(r"`(tidepool_\w+)`", text)) <= known


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.name)
def test_names_follow_prometheus(each: Metric) -> None:
    """Base units at the end, `_total` for counters only, and no label of a run or of what Prometheus labels itself."""
    assert re.fullmatch(r"tidepool_[a-z_]+", each.exported)
    assert each.exported.endswith("_total") == (each.kind == "counter")
    assert bool(each.buckets) == (each.kind == "histogram")
    assert not {"id", "run", "flow_run", "instance", "job", "namespace", "pod", "service"} & set(each.labels)
    assert each.text.endswith(".")


def test_names_are_unique() -> None:
    assert len({each.exported for each in ALL}) == len(ALL)


def test_a_registry_exports_the_names_of_the_list() -> None:
    metrics = Metrics(ALL)
    for each in ALL:
        labels = ["x"] * len(each.labels)
        if each.kind == "counter":
            metrics.counter(each.name, *labels).inc()
        elif each.kind == "gauge":
            metrics.gauge(each.name, *labels).set(1)
        else:
            metrics.histogram(each.name, *labels).observe(1)
    names = {each.name for family in text_string_to_metric_families(metrics.page().decode()) for each in family.samples}
    assert names == {name for each in ALL for name in each.series}


def test_a_budget_is_there_before_the_server_answers() -> None:
    assert 'tidepool_budget_per_day{team="media"} 12.5' in Figures({"media": 12.5}).page().decode().splitlines()
