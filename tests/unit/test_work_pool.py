"""The parts of a base job template that belong to an installation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tidepool.deploy.reconcile.work_pool import comparable, with_installed
from tidepool.errors import UsageError

IN_GIT: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "k8s" / "work-pool" / "base-job-template.json").read_text(encoding="utf-8")
)


def pod(template: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    return spec


def test_what_an_installation_sets_is_no_difference_and_stays() -> None:
    there = copy.deepcopy(IN_GIT)
    there["job_configuration"]["namespace"] = "media"
    there["variables"]["properties"]["image"] |= {"pattern": "^registry/media@", "default": "registry/media@sha256:1"}
    pod(there)["serviceAccountName"] = "platform-flow-run"
    pod(there)["priorityClassName"] = "high"
    del pod(there)["imagePullSecrets"]
    assert comparable(there) == comparable(IN_GIT)
    assert with_installed(IN_GIT, there) == there


def test_anything_else_is_a_difference_and_follows_git() -> None:
    there = copy.deepcopy(IN_GIT)
    pod(there)["automountServiceAccountToken"] = False
    there["variables"]["properties"]["memory_limit"]["pattern"] = ".*"
    assert comparable(there) != comparable(IN_GIT)
    assert with_installed(IN_GIT, there) == IN_GIT


def test_a_template_that_is_not_the_charts_has_no_such_parts() -> None:
    other = {"variables": {"properties": {"image": {"default": "a"}}}, "job_configuration": {"image": "{{ image }}"}}
    assert comparable(other) == {
        "variables": {"properties": {"image": {}}},
        "job_configuration": {"image": "{{ image }}"},
    }
    assert with_installed(other, {}) == other


def test_a_pool_of_an_older_chart_is_refused() -> None:
    """Its account is a job variable, which the template in Git does not have: runs would get the default account."""
    there = copy.deepcopy(IN_GIT)
    pod(there)["serviceAccountName"] = "{{ service_account_name }}"
    with pytest.raises(
        UsageError, match="lets job variables choose serviceAccountName: upgrade the chart, then deploy"
    ):
        with_installed(IN_GIT, there)
