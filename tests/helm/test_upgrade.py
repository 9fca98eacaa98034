"""Upgrades from any released chart: immutable fields have not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from conftest import Manifest, Render

ROOT = Path(__file__).resolve().parents[2]
RELEASED = Path(__file__).parent / "released"


def immutable(manifests: list[Manifest]) -> dict[str, Any]:
    """Return, by kind/name, the fields that an update of that object must not change. Hooks are recreated each time."""
    fields = {
        "Deployment": lambda each: each["spec"]["selector"],
        "Service": lambda each: each["spec"].get("clusterIP"),
        "RoleBinding": lambda each: each["roleRef"],
    }
    return {
        f"{each['kind']}/{each['metadata']['name']}": fields[each["kind"]](each)
        for each in manifests
        if each["kind"] in fields and "helm.sh/hook" not in each["metadata"].get("annotations", {})
    }


def test_this_version_is_on_record(render: Render) -> None:
    version = yaml.safe_load((ROOT / "helm" / "tidepool" / "Chart.yaml").read_text())["version"]
    record = RELEASED / f"{version}.json"
    assert record.exists(), f"write what `immutable` returns for this chart version to {record}"
    assert immutable(render("production")) == json.loads(record.read_text())


@pytest.mark.parametrize("record", sorted(RELEASED.glob("*.json")), ids=lambda path: path.stem)
def test_upgrades_from_it(render: Render, record: Path) -> None:
    now = immutable(render("production"))
    before = json.loads(record.read_text())
    assert {name: now[name] for name in before if name in now} == {name: before[name] for name in before if name in now}


def test_chart_and_project_have_one_version() -> None:
    import tomllib

    chart = yaml.safe_load((ROOT / "helm" / "tidepool" / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["version"] == chart["appVersion"] == project
