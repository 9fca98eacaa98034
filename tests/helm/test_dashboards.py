"""The dashboards: about metrics that exist, and readable; tests/integration/test_dashboards.py asks for their data."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from helm import dashboards
from tests.helm.conftest import CHART
from tidepool.operate import metrics

if TYPE_CHECKING:
    from conftest import Render

Json = dict[str, Any]
BOARDS: dict[str, Json] = {name: each.json() for name, each in dashboards.ALL.items()}
ALERTS = {each["alert"] for each in yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"][0]["rules"]}


def panels(board: Json) -> list[Json]:
    return [each for each in board["panels"] if each["type"] != "row"]


@pytest.mark.parametrize("name", BOARDS)
def test_panels_use_metrics_and_labels_that_exist(name: str) -> None:
    known = {series: each for each in metrics.ALL for series in each.series}
    for panel in panels(BOARDS[name]):
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            expr = target["expr"]
            names = set(re.findall(r"tidepool_\w+", expr))
            assert names <= known.keys(), panel["title"]
            assert names or "ALERTS{" in expr, panel["title"]
            for metric, selector in re.findall(r"(tidepool_\w+)\{([^}]*)\}", expr):
                assert set(re.findall(r"(\w+)=", selector)) <= {*known[metric].labels}, (panel["title"], metric)
            shown = {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])}
            grouped = {each.strip() for part in re.findall(r"by \(([^)]+)\)", expr) for each in part.split(",")}
            assert shown <= grouped, panel["title"]
            if names:
                assert grouped <= {"le", *(label for each in names for label in known[each].labels)}, panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_a_panel_says_what_it_shows_and_overlaps_no_other(name: str) -> None:
    board = BOARDS[name]
    assert len({each["id"] for each in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= dashboards.COLUMNS
        cells = set(itertools.product(range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])))
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels(board):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_each_alert_has_a_panel_that_shows_why() -> None:
    text = " ".join(panel["description"] for board in BOARDS.values() for panel in panels(board))
    named = re.findall(r"(\w+) \(docs/runbooks/(\w+)\.md\)", text)
    assert all(alert == page for alert, page in named)
    assert {alert for alert, _ in named} == ALERTS


def test_the_chart_has_the_dashboards(render: Render) -> None:
    [found] = [
        each
        for each in render("minimal", monitoring__dashboards__labels__folder="tidepool")
        if (each["kind"], each["metadata"]["name"]) == ("ConfigMap", "tidepool-dashboards")
    ]
    assert {key: json.loads(text) for key, text in found["data"].items()} == {
        f"tidepool-{name}.json": board for name, board in BOARDS.items()
    }
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["labels"]["folder"] == "tidepool"


@pytest.mark.parametrize("off", ["monitoring__dashboards__enabled", "exporter__enabled"])
def test_without_dashboards(render: Render, off: str) -> None:
    names = {each["metadata"]["name"] for each in render("minimal", **{off: "false"})}
    assert "tidepool-dashboards" not in names
