"""Git and the server compared: the desired state of a repository, what is read of the server, and the remarks."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.rule_files import write
from tidepool import settings as settings_module
from tidepool.deploy.config import environments
from tidepool.deploy.reconcile import actual, comparison, desired
from tidepool.deploy.reconcile.plan import Kind, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AT = "2026-01-01T00:00:00+00:00"
OURS = "managed-by:tidepool"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The good files of the rules' tests, without a setting of this machine."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("rule_flows", "rule_steps"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for name in ("TIDEPOOL_NOTIFY_URLS", "SHOP_NAME"):
        monkeypatch.delenv(name, raising=False)
    settings_module.settings.cache_clear()
    yield write(tmp_path)
    settings_module.settings.cache_clear()


def wanted(repository: Path) -> desired.DesiredState:
    return desired.load(repository, environments.load(repository, "production"), "tidepool")


def test_the_desired_state_is_all_that_git_has(repository: Path) -> None:
    found = {(each.kind, each.name): each for each in wanted(repository).resources}
    assert list(found) == [
        (Kind.DEPLOYMENT, "sell/sell"),
        (Kind.SCHEDULE, "sell/sell#nightly"),
        (Kind.DEPLOYMENT, "deliver/deliver"),
        (Kind.WORK_POOL, "kubernetes"),
        (Kind.VARIABLE, "shop_owner"),
    ]
    schedule = found[Kind.SCHEDULE, "sell/sell#nightly"]
    assert schedule.parent == "sell/sell"
    assert schedule.fields["schedule"] == {"cron": "15 3 * * *", "timezone": "Europe/Paris", "day_or": True}


def deployment(name: str, *tags: str) -> dict[str, Any]:
    texts = ("entrypoint", "description", "work_pool_name", "work_queue_name", "version")
    empty = ("concurrency_options", "global_concurrency_limit", "parameter_openapi_schema", "pull_steps")
    return {
        "id": f"id-{name}", "name": name, "flow_id": f"flow-{name}", "tags": list(tags), "updated": AT, "paused": False,
        "parameters": {}, "job_variables": {}, "enforce_parameter_schema": True, "schedules": [],
        **dict.fromkeys(texts, ""), **dict.fromkeys(empty),
    }  # fmt: skip


def automation(name: str, *tags: str) -> dict[str, Any]:
    trigger = {"type": "event", "posture": "Reactive", "expect": ["x"], "threshold": 1, "within": 0}
    return {
        "id": f"id-{name}", "name": name, "tags": list(tags), "updated": AT, "enabled": True, "description": "",
        "trigger": trigger, "actions": [{"type": "do-nothing"}],
    }  # fmt: skip


def test_of_the_server_what_is_managed_or_has_a_desired_name_is_read(repository: Path) -> None:
    listed = [deployment("sell"), deployment("gone", OURS), deployment("deliver")]
    there: dict[str, Any] = {
        "/deployments/filter": listed,
        # Of another flow than in Git.
        "/flows/filter": [{"id": each["flow_id"], "name": each["name"].replace("deliver", "x")} for each in listed],
        "/automations/filter": [automation("run-failed"), automation("gone", OURS), automation("another's")],
    }
    asked: dict[str, Any] = {}

    def request(_method: str, path: str, json: Any) -> Any:
        asked[path] = json
        return SimpleNamespace(json=lambda: there.get(path, []))

    client: Any = SimpleNamespace(request=request)
    found = actual.read(client, "tidepool", wanted(repository))
    assert [(str(each.kind), each.name, each.managed) for each in found] == [
        ("deployment", "sell/sell", False),
        ("deployment", "gone/gone", True),
        ("automation", "run-failed", False),
        ("automation", "gone", True),
    ]
    assert asked["/deployments/filter"]["deployments"]["name"] == {"any_": ["deliver", "sell"]}
    assert actual.ids(found) == {"sell/sell": "id-sell", "gone/gone": "id-gone"}, "what an automation may name"


@pytest.mark.parametrize(("unset", "notes"), [((), 0), (("SHOP_NAME", "SHOP_SUFFIX"), 1)])
def test_variables_that_are_not_set_are_told(unset: tuple[str, ...], notes: int) -> None:
    state: Any = SimpleNamespace(resources=(), unset=unset, server_file=SimpleNamespace(automations=[]))
    told = "not compared, as these variables are not set: SHOP_NAME, SHOP_SUFFIX"
    assert list(comparison._notes(state, Plan(), notified=False)) == [told] * notes


def test_a_check_without_a_deploy_needs_no_values_of_variables(repository: Path) -> None:
    """They are where it is deployed from, and not on each laptop."""
    text = (repository / "prefect.yaml").read_text().replace("GREETING: hello", 'GREETING: "a{{ $SHOP_NAME }}"')
    (repository / "prefect.yaml").write_text(text)
    assert comparison.check(None, repository, "production", "tidepool") == []
    [problem] = comparison.check(None, repository, "production", "tidepool", deploying=True)
    assert problem.message.startswith("environment variable SHOP_NAME is not set: set it, or ")
