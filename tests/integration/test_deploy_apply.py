"""Plan and apply against a real server: writes, what stays, and refusals."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from tests.integration.deploy_support import (
    HOURLY,
    NIGHTLY,
    Shop,
    deploy_in_process,
    now,
    paths,
    prefect_deploy,
)
from tests.polling import until
from tidepool.deploy import drift, pauses
from tidepool.deploy.client import connect, pages
from tidepool.deploy.config import schedules
from tidepool.deploy.reconcile import apply
from tidepool.deploy.reconcile.actual import Pause, read_pauses
from tidepool.deploy.reconcile.plan import Action, Kind
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Receiver
    from tests.integration.deploy_support import Proxy

pytestmark = pytest.mark.timeout(240)


def test_an_apply_creates_and_a_second_one_writes_nothing_and_keeps_future_runs(shop: Shop, proxy: Proxy) -> None:
    shop.deployment("one", NIGHTLY, HOURLY, concurrency_limit={"limit": 1, "collision_strategy": "CANCEL_NEW"})
    shop.deployment("two", HOURLY, enforce_parameter_schema=False, parameters={"count": 3, "shop": "harbour"})
    assert len(shop.apply()) == 5
    runs = until(shop.future_runs)
    until(lambda: len(shop.future_runs()) == len(runs) or runs.update(shop.future_runs()))
    runs = shop.future_runs()
    proxy.requests.clear()
    assert shop.apply() == []
    assert proxy.writes == []
    assert runs <= shop.future_runs()


def test_only_what_changed_is_written(shop: Shop, proxy: Proxy) -> None:
    one, two = shop.deployment("one", NIGHTLY), shop.deployment("two", NIGHTLY)
    shop.apply()
    before = shop.deployments()
    two["schedules"] = [{**NIGHTLY, "cron": "30 4 * * *"}]
    proxy.requests.clear()
    assert shop.apply() == [f"schedule {shop.flow}/two#nightly"]
    assert paths(proxy.writes) == ["PATCH /api/deployments/{id}/schedules/{id}"]
    one["parameters"] = {"count": 9}
    proxy.requests.clear()
    assert shop.apply() == [f"deployment {shop.flow}/one"]
    after = shop.deployments()
    assert after["one"]["parameters"] == {"count": 9}
    for name in ("one", "two"):
        assert [each["id"] for each in before[name]["schedules"]] == [each["id"] for each in after[name]["schedules"]]


def test_schedules_are_reconciled_in_place(shop: Shop) -> None:
    one = shop.deployment("one", NIGHTLY, HOURLY)
    shop.apply()
    ids = {each["slug"]: each["id"] for each in shop.deployments()["one"]["schedules"]}
    one["schedules"] = [{**NIGHTLY, "slug": "early", "replaces": "nightly", "cron": "0 5 * * *"}]
    shop.apply()
    (left,) = shop.deployments()["one"]["schedules"]
    assert (left["slug"], left["id"], left["schedule"]["cron"]) == ("early", ids["nightly"], "0 5 * * *")
    one["schedules"] = []
    shop.apply()
    assert shop.deployments()["one"]["schedules"] == []
    assert not shop.plan()


def test_what_left_git_is_deleted_and_what_is_unmanaged_stays(shop: Shop, tmp_path: Path) -> None:
    other = Shop(tmp_path / "other")
    other.create_pool()
    other.deployment("theirs", NIGHTLY)
    other.apply()
    shop.deployment("one"), shop.deployment("two")
    shop.server_file = {
        "variables": [{"name": f"{shop.owner}_v", "value": 1}],
        "concurrency_limits": [{"name": f"{shop.owner}-l", "limit": 2}],
    }
    shop.apply()
    shop.manifest["deployments"].pop()
    shop.server_file = {}
    written = shop.apply()
    assert set(written) == {
        f"deployment {shop.flow}/two",
        f"variable {shop.owner}_v",
        f"concurrency limit {shop.owner}-l",
    }
    assert set(shop.deployments()) == {"one"}
    assert set(other.deployments()) == {"theirs"}


def test_a_deployment_that_a_person_made_is_neither_overwritten_nor_deleted(shop: Shop, proxy: Proxy) -> None:
    shop.deployment("one")["tags"] = []
    shop.write()
    assert prefect_deploy(shop.root, shop.manifest | {"build": []}).exit_code == 0  # by hand: no tag
    shop.manifest["deployments"].clear()
    shop.deployment("one")
    shop.deployment("two")
    proxy.requests.clear()
    with pytest.raises(
        UsageError,
        match=f"these resources are not managed by tidepool; nothing was written: deployment {shop.flow}/one",
    ):
        shop.apply()
    assert proxy.writes == []


def test_a_pause_survives_changes_of_the_deployment_and_of_the_schedule(shop: Shop) -> None:
    one, two = shop.deployment("one", NIGHTLY), shop.deployment("two", NIGHTLY)
    shop.apply()
    live = shop.deployments()
    with connect() as client:
        client.pause_deployment(live["one"]["id"])
        client.update_deployment_schedule(live["two"]["id"], live["two"]["schedules"][0]["id"], active=False)
    one["parameters"], one["schedules"] = {"count": 5}, [{**NIGHTLY, "cron": "0 6 * * *"}, HOURLY]
    two["parameters"], two["schedules"] = {"count": 5}, [{**NIGHTLY, "slug": "late", "replaces": "nightly"}]
    shop.apply()
    live = shop.deployments()
    assert live["one"]["paused"] is True
    assert live["one"]["parameters"] == live["two"]["parameters"] == {"count": 5}
    assert [each["active"] for each in live["two"]["schedules"]] == [False]
    plan = shop.plan()
    assert not plan
    assert {each.name for each in plan.paused} == {f"{shop.flow}/one", f"{shop.flow}/two#late"}


def test_a_schedule_that_was_added_on_the_server_survives(shop: Shop) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    one = shop.deployment("one", NIGHTLY)
    shop.apply()
    with connect() as client:
        added = client.create_deployment_schedules(
            shop.deployments()["one"]["id"], [(CronSchedule(cron="0 0 1 1 *"), True)]
        )
    one["parameters"], one["schedules"] = {"count": 2}, [HOURLY]
    shop.apply()
    left = {each["slug"]: each["id"] for each in shop.deployments()["one"]["schedules"]}
    assert left[None] == str(added[0].id)
    assert set(left) == {None, "hourly"}
    plan = shop.plan()
    assert not plan
    assert len(plan.unmanaged) == 1


def test_a_server_that_fails_half_way_is_reported_exactly_and_the_next_apply_completes_it(
    shop: Shop, proxy: Proxy
) -> None:
    for index in range(6):
        shop.deployment(f"d{index}", NIGHTLY)
    shop.server_file = {"variables": [{"name": f"{shop.owner}_v", "value": 1}]}
    proxy.refuse_after = 9
    with pytest.raises(apply.PartialApplyError) as caught:
        shop.apply()
    proxy.refuse_after = None
    written, unknown, rest = (
        set(re.findall(rf"deployment {shop.flow}/(d\d)", part))
        for part in re.split(r"outcome unknown|not written", str(caught.value))
    )
    assert written
    assert len(unknown) == 1
    assert written | unknown | rest == {f"d{index}" for index in range(6)}
    assert written <= set(shop.deployments()) <= written | unknown
    shop.apply()
    assert set(shop.deployments()) == {f"d{index}" for index in range(6)}
    assert not shop.plan()


def test_the_exit_code_of_prefect_deploy_counts_and_not_its_wording(shop: Shop) -> None:
    def silent(repository: Path, manifest: dict[str, Any]) -> Iterator[str]:
        return iter(list(deploy_in_process(repository, manifest))[:0])

    shop.deployment("one", NIGHTLY)
    expected = [f"deployment {shop.flow}/one", f"schedule {shop.flow}/one#nightly"]
    with pytest.raises(
        apply.PartialApplyError, match=rf"did not create all[^:]+:[^:]+outcome unknown \(1\): {expected[0]}"
    ):
        shop.apply(lambda *_: iter(()))
    assert shop.apply(silent) == expected


def test_work_pools_limits_variables_and_automations_follow_git(shop: Shop, proxy: Proxy) -> None:
    (shop.root / "template.json").write_text(
        '{"variables": {"type": "object", "properties": {"image": {"type": "string", "default": "a"}}}, '
        '"job_configuration": {"image": "{{ image }}"}}'
    )
    pool = f"{shop.pool}-new"
    shop.deployment("one", work_pool={"name": pool, "job_variables": {"image": "b"}})
    failed = {
        "name": "run-failed",
        "description": "Runs another.",
        "trigger": {
            "type": "event",
            "posture": "Reactive",
            "expect": ["prefect.flow-run.Failed", "prefect.flow-run.Crashed"],
            "match": {"prefect.resource.id": f"prefect.flow-run.{shop.mark}"},
            "threshold": 1,
            "within": 0,
        },
        "actions": [{"type": "run-deployment", "deployment": f"{shop.flow}/one"}],
    }
    shop.server_file = {
        "work_pools": [{"name": pool, "type": "kubernetes", "base_job_template": "template.json"}],
        "concurrency_limits": [{"name": f"{shop.owner}-l", "limit": 2}],
        "variables": [{"name": f"{shop.owner}_v", "value": {"a": [1]}}],
        "automations": [failed],
    }
    assert len(shop.apply()) == 5
    proxy.requests.clear()
    assert shop.apply() == []
    assert proxy.writes == []

    with connect() as client:  # what an installation sets stays
        template = client.read_work_pool(pool).base_job_template
        template["variables"]["properties"]["image"]["default"] = "ours"
        from prefect.client.schemas.actions import WorkPoolUpdate

        client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template))
        automation = next(
            each for each in client.read_automations() if each.name == "run-failed" and shop.owner in str(each.tags)
        )
        client.pause_automation(automation.id)
    assert not shop.plan()
    path = shop.root / "template.json"
    path.write_text(path.read_text().replace('"{{ image }}"', '"{{ image }}", "command": "run"'))
    failed["description"] = "Runs it again."
    shop.server_file["concurrency_limits"][0]["limit"] = 5
    shop.server_file["variables"][0]["value"] = "b"
    assert len(shop.apply()) == 4
    with connect() as client:
        template = client.read_work_pool(pool).base_job_template
        assert template["job_configuration"]["command"] == "run"
        assert template["variables"]["properties"]["image"]["default"] == "ours"
        mine = [each for each in client.read_automations() if f"managed-by:{shop.owner}" in each.tags]
        assert [(each.description, each.enabled) for each in mine] == [("Runs it again.", False)]
        shop.server_file["automations"] = []
        shop.apply()
        assert not [each for each in client.read_automations() if f"managed-by:{shop.owner}" in each.tags]
        client.delete_work_pool(pool)


def test_pauses_have_an_author_a_reason_and_an_end(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop.root)
    shop.deployment("one", NIGHTLY)
    shop.apply()
    start = now()
    with connect() as client:
        wanted = Pause(
            deployment="one",
            by="ann@example.com",
            reason="the till is broken",
            at=start,
            until=start + timedelta(hours=2),
        )
        pauses.pause(client, wanted, shop.owner)
        assert shop.deployments()["one"]["paused"] is True
        assert not shop.plan(), "a recorded pause is not drift"

        def look(hours: float) -> drift.Drift:
            return drift.find(client, "production", now=start + timedelta(hours=hours), end_pauses=True)

        early = look(1)
        assert not early.resumed
        (line,) = early.view.paused_lines
        assert "is paused for 1 h by ann@example.com, until " in line
        assert line.endswith(": the till is broken")
        late = look(3)
        assert [each.deployment for each in late.resumed] == [f"{shop.flow}/one"]
        assert shop.deployments()["one"]["paused"] is False
        assert read_pauses(client, shop.owner) == []

        pauses.pause(client, wanted, shop.owner)
        client.resume_deployment(shop.deployments()["one"]["id"])  # by hand, in the UI
        assert look(1).resumed == ()
        assert read_pauses(client, shop.owner) == []
        with pytest.raises(UsageError, match="deployment 'oen' is not on the server; managed: "):
            pauses.find(client, "oen", shop.owner)


def test_drift_lists_what_differs_and_since_when(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop.root)
    shop.deployment("one", NIGHTLY, HOURLY)
    shop.apply()
    live = shop.deployments()["one"]
    with connect() as client:
        client.update_deployment_schedule(
            live["id"],
            next(each["id"] for each in live["schedules"] if each["slug"] == "nightly"),
            schedule=_cron("0 12 * * *"),
        )
        found = drift.find(client, "production", now=now() + timedelta(hours=5))
    (change,) = found.view.plan.changes
    assert (change.action, change.resource.kind) == (Action.UPDATE, Kind.SCHEDULE)
    row = f"| `~` | schedule `{shop.flow}/one#nightly` | schedule.cron | `0 12 * * *` | `15 3 * * *` | 5 h at most |"
    assert row in found.markdown()
    assert found.summary == "production: 1 differ from Git"


def _cron(cron: str) -> Any:
    from prefect.client.schemas.schedules import CronSchedule

    return CronSchedule(cron=cron, timezone="Europe/Paris")


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated")  # by a plugin of Apprise
def test_a_notification_reaches_all_targets_of_the_settings(
    shop: Shop, prefect_server: str, proxy: Proxy, receiver: Receiver, targets: Callable[..., None]
) -> None:
    targets(receiver.target, f"{receiver.target}/second")
    shop.deployment("one")
    shop.server_file = {
        "automations": [
            {
                "name": "drift-found",
                "description": "Notifies.",
                "trigger": {
                    "type": "event",
                    "posture": "Reactive",
                    "expect": [f"{shop.mark}.found"],
                    "match": {"prefect.resource.id": "*"},
                    "threshold": 1,
                    "within": 0,
                },
                "actions": [{"type": "notify", "subject": "drift", "body": "{{ event.payload.summary }}"}],
            }
        ]
    }
    try:
        shop.apply()
        proxy.requests.clear()
        assert shop.apply() == []
        assert proxy.writes == []
        targets()  # without the secret, as on a laptop, there is nothing to change
        assert not shop.plan()
        event = {
            "id": str(uuid4()),
            "occurred": now().isoformat(),
            "event": f"{shop.mark}.found",
            "resource": {"prefect.resource.id": "shop"},
            "payload": {"summary": "2 differ"},
        }
        httpx.post(f"{prefect_server}/events", json=[event]).raise_for_status()
        until(lambda: len(receiver.got) == 2, seconds=90)
        assert all("2 differ" in each["message"] for each in receiver.got)
    finally:
        with connect() as client:
            for each in client.read_automations():
                if f"managed-by:{shop.owner}" in each.tags:
                    client.delete_automation(each.id)


def test_the_next_runs_are_those_that_the_scheduler_makes(shop: Shop) -> None:
    shop.deployment("one", NIGHTLY, HOURLY)
    shop.apply()
    expected = {
        each.timestamp()
        for config in (NIGHTLY, HOURLY)
        for each in schedules.next_runs(schedules.parse(config), now(), 3)
    }

    def starts() -> set[float]:
        from datetime import datetime

        with connect() as client:
            body = {"flows": {"name": {"any_": [shop.flow]}}}
            return {
                datetime.fromisoformat(each["expected_start_time"]).timestamp()
                for each in pages(client, "/flow_runs/filter", body)
            }

    until(lambda: expected <= starts())
