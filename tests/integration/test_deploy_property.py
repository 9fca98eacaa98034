"""Property of an apply: it reaches the state in Git from any actual state, and a second one has nothing to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.deploy_support import Shop
from tidepool.deploy.client import connect

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)  # 25 repositories, each applied and planned twice; 150 s on a busy machine

# Every kind, in the forms that the command, the client and the server each complete in their own way.
TIMES = st.one_of(
    st.fixed_dictionaries(
        {"cron": st.sampled_from(["0 6 * * *", "30 7 * * MON", "*/20 * * * *", "@daily", " 0  6 * * 1-5"])},
        optional={"day_or": st.booleans()},
    ),
    st.fixed_dictionaries(
        {
            "interval": st.sampled_from([60, 90.5, 3600, "PT1H", "P1D", "01:30:00", 2678400]),
            "anchor_date": st.sampled_from(
                ["2026-01-01", "2026-01-01T00:00:00", "2026-01-01T00:00:00Z", "2026-07-01T06:00:00+02:00"]
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "rrule": st.sampled_from(
                [
                    "FREQ=WEEKLY;BYDAY=MO,WE",
                    "RRULE:FREQ=MONTHLY;BYDAY=-1FR;BYHOUR=8",
                    "FREQ=DAILY;COUNT=9999",
                    "DTSTART:20260101T060000\nRRULE:FREQ=MINUTELY;INTERVAL=10\n",
                    "DTSTART:20260101T060000\nRRULE:FREQ=YEARLY\nEXDATE:20270101T060000",
                ]
            )
        }
    ),
)
ZONES = st.sampled_from(["UTC", "Europe/Paris", "America/New_York"])
SCHEDULES = st.dictionaries(st.sampled_from(["s", "t"]), st.tuples(TIMES, ZONES), max_size=2)
DEPLOYMENTS = st.dictionaries(
    st.sampled_from(["a", "b"]), st.tuples(st.integers(1, 3), SCHEDULES), min_size=1, max_size=2
)
VARIABLES = st.dictionaries(st.sampled_from(["v", "w"]), st.integers(0, 2), max_size=2)
TAMPERINGS = st.sets(st.sampled_from(["pause", "delete", "parameters", "cron"]), max_size=2)


@pytest.fixture
def shops(prefect_server: str, tmp_path: Path) -> tuple[Shop, Shop]:
    """Return our repository, and one of another owner, on the same server."""
    del prefect_server
    ours, theirs = Shop(tmp_path / "ours"), Shop(tmp_path / "theirs")
    for shop in (ours, theirs):
        shop.create_pool()
    theirs.deployment("a", {"slug": "s", "cron": "0 6 * * *", "timezone": "UTC"})
    theirs.server_file = {"variables": [{"name": f"{theirs.owner}_v", "value": 1}]}
    theirs.apply()
    return ours, theirs


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(wanted=DEPLOYMENTS, variables=VARIABLES, tampered=TAMPERINGS)
def test_an_apply_reaches_git_and_a_second_plan_is_empty(
    shops: tuple[Shop, Shop],
    wanted: dict[str, tuple[int, dict[str, tuple[dict[str, Any], str]]]],
    variables: dict[str, int],
    tampered: set[str],
) -> None:
    ours, theirs = shops
    others = theirs.deployments()
    tamper(ours, tampered)
    ours.manifest["deployments"] = []
    for name, (count, schedules) in wanted.items():
        listed = [{"slug": slug, "timezone": zone, **times} for slug, (times, zone) in schedules.items()]
        ours.deployment(name, *listed, parameters={"count": count})
    ours.server_file = {
        "variables": [{"name": f"{ours.owner}_{key}", "value": value} for key, value in variables.items()]
    }
    ours.apply()

    live = ours.deployments()
    assert {name: each["parameters"]["count"] for name, each in live.items()} == {n: c for n, (c, _) in wanted.items()}
    for name, (_, schedules) in wanted.items():
        assert {each["slug"] for each in live[name]["schedules"]} == set(schedules)
    assert not ours.plan()
    assert {name: each["schedules"] for name, each in theirs.deployments().items()} == {
        name: each["schedules"] for name, each in others.items()
    }
    assert not theirs.plan()


def tamper(shop: Shop, how: set[str]) -> None:
    """Change the first deployment, as users do in the UI."""
    live = shop.deployments() if how else {}
    if not live:
        return
    first: dict[str, Any] = next(iter(live.values()))
    identity = first["id"]
    with connect() as client:
        if "pause" in how:
            client.pause_deployment(identity)
        if "parameters" in how:
            client.request(
                "PATCH", "/deployments/{id}", path_params={"id": identity}, json={"parameters": {"count": 99}}
            )
        if "cron" in how and first["schedules"]:
            client.request(
                "PATCH",
                "/deployments/{id}/schedules/{schedule_id}",
                path_params={"id": identity, "schedule_id": first["schedules"][0]["id"]},
                json={"schedule": {"cron": "1 1 1 1 *", "timezone": "UTC", "day_or": True}},
            )
        if "delete" in how:
            client.delete_deployment(identity)
