"""The plan: changes, what stays, what is managed, and the next runs of a schedule that changes."""

# ruff: noqa: E501 - any field; rows of a table

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from tidepool.deploy.config import schedules
from tidepool.deploy.reconcile.actual import Pause
from tidepool.deploy.reconcile.plan import (
    UNKNOWN,
    Action,
    ActualResource,
    Kind,
    Plan,
    Resource,
    differences,
    excessive_deletions,
    lost_pauses,
    make_plan,
)
from tidepool.deploy.view import json as json_view
from tidepool.deploy.view import markdown
from tidepool.deploy.view.plan_view import PlanView, run_time

SPRING = datetime(2027, 3, 27, 12, tzinfo=UTC)  # the day before clocks go forward in Paris
AUTUMN = datetime(2026, 10, 24, 12, tzinfo=UTC)  # the day before they go back
NEW_YORK = {"timezone": "America/New_York", "day_or": True}


def resource(name: str, kind: Kind = Kind.DEPLOYMENT, **fields: Any) -> Resource:
    return Resource(kind=kind, name=name, fields=fields)


def actual(name: str, kind: Kind = Kind.DEPLOYMENT, *, managed: bool = True, **fields: Any) -> ActualResource:
    return ActualResource(kind=kind, name=name, id=f"{kind}:{name}", managed=managed, updated=AUTUMN, fields=fields)


def schedule(parent: str, slug: str, cron: str = "0 6 * * *", replaces: str = "") -> Resource:
    fields = {"slug": slug, "schedule": {"cron": cron}}
    old = f"{parent}#{replaces}" if replaces else ""
    return Resource(kind=Kind.SCHEDULE, name=f"{parent}#{slug}", parent=parent, fields=fields, replaces=old)


def on_server(wanted: Resource, *, managed: bool = True, identity: str = "", active: bool = True) -> ActualResource:
    return ActualResource(
        kind=wanted.kind,
        name=wanted.name,
        parent=wanted.parent,
        fields=wanted.fields,
        id=identity or f"{wanted.kind}:{wanted.name}",
        managed=managed,
        updated=AUTUMN,
        active=active,
    )


def actions(found: Plan) -> list[tuple[str, str]]:
    return [(change.action, change.resource.name) for change in found.changes]


def test_equal_states_need_no_change() -> None:
    found = make_plan([resource("a", tags=["x"])], [actual("a", tags=["x"], version="1")])
    assert not found
    assert [each.name for each in found.unchanged] == ["a"]


def test_differences_are_listed_field_by_field() -> None:
    found = make_plan(
        [resource("a", parameters={"n": 2, "m": 1}, tags=[])], [actual("a", parameters={"n": 1, "o": 0}, tags=[])]
    )
    (change,) = found.changes
    assert [(each.field, repr(each.old), repr(each.new)) for each in change.differences] == [
        ("parameters.n", "1", "2"),
        ("parameters.m", "(none)", "1"),
        ("parameters.o", "0", "(none)"),
    ]


def test_a_value_that_only_the_build_knows_is_equal_to_anything() -> None:
    assert not make_plan(
        [resource("a", job_variables={"image": UNKNOWN})], [actual("a", job_variables={"image": "x@sha256:1"})]
    )


def test_true_is_not_one() -> None:
    assert [each.field for each in differences({"a": 1}, {"a": True})] == ["a"]


def test_a_secret_is_compared_and_not_shown() -> None:
    found = make_plan(
        [resource("b", Kind.NOTIFICATION, urls=SecretStr("slack://new"))],
        [actual("b", Kind.NOTIFICATION, urls=SecretStr("slack://old"))],
    )
    shown = PlanView(found, "production", AUTUMN, 60)
    assert len(found.changes) == 1
    assert "slack" not in json_view.render(shown) + markdown.render(shown)


def test_a_deployment_that_left_git_is_deleted_with_its_schedules() -> None:
    old, its = resource("gone"), schedule("gone", "s")
    found = make_plan([resource("a")], [actual("a"), on_server(old), on_server(its)])
    assert actions(found) == [("delete", "gone")]


def test_an_unmanaged_resource_is_never_changed_or_deleted() -> None:
    theirs = [actual("x", managed=False), on_server(schedule("x", "s"), managed=False)]
    assert not make_plan([], theirs)
    assert actions(make_plan([resource("x", a=1), schedule("x", "s", "0 7 * * *")], theirs)) == [("conflict", "x")]


def test_a_schedule_that_was_added_on_the_server_is_told_and_stays() -> None:
    by_hand = on_server(schedule("a", "by-hand"), managed=False)
    found = make_plan([resource("a"), schedule("a", "s")], [actual("a"), on_server(schedule("a", "s")), by_hand])
    assert not found
    assert found.unmanaged == (by_hand,)


def test_a_renamed_schedule_keeps_its_identity() -> None:
    before = [actual("a"), on_server(schedule("a", "old"), identity="7")]
    found = make_plan([resource("a"), schedule("a", "new", replaces="old")], before)
    (change,) = found.changes
    assert change.actual is not None
    assert (change.action, change.actual.id) == ("update", "7")
    after = [actual("a"), on_server(schedule("a", "new"), identity="7")]
    assert not make_plan([resource("a"), schedule("a", "new", replaces="old")], after)


def test_a_pause_is_reported_and_changes_nothing() -> None:
    found = make_plan([resource("a")], [replace(actual("a"), active=False)])
    assert not found
    assert [each.name for each in found.paused] == ["a"]


def test_a_pause_that_git_desires_is_not_reported() -> None:
    assert make_plan([resource("a", paused=True)], [replace(actual("a", paused=True), active=False)]).paused == ()


def test_a_schedule_of_a_deployment_that_git_pauses_is_not_reported_and_has_no_next_runs() -> None:
    wanted = [resource("a", paused=True), schedule("a", "s")]
    there = [replace(on_server(each), active=False) for each in wanted]
    assert make_plan(wanted, there).paused == ()
    shown = {"slug": "s", "schedule": cron("15 3 * * *"), "parameters": {}}
    new = Resource(kind=Kind.SCHEDULE, name="a#s", parent="a", fields=shown)
    for paused in (True, False):
        found = make_plan([resource("a", paused=paused), new], [])
        assert ("next runs" in markdown.render(PlanView(found, "local", AUTUMN, 60))) is not paused


def test_a_pause_on_record_is_shown_where_git_pauses_too() -> None:
    wanted = [resource("a/b", paused=True)]
    found = make_plan(wanted, [replace(on_server(wanted[0]), active=False)])
    pause = Pause(deployment="a/b", by="ann", reason="the till", at=AUTUMN, until=SPRING)
    gone = Pause(deployment="a/gone", by="bob", reason="no matter", at=AUTUMN, until=SPRING)
    assert PlanView(found, "local", AUTUMN, 60, pauses=[pause, gone]).paused_lines == [
        "deployment a/b is paused for 0 min by ann, until 2027-03-27 12:00 UTC: the till"
    ]


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        pytest.param([("old", False)], [("new", "")], True, id="renamed"),
        pytest.param([("old", False)], [("new", "old")], False, id="renamed as it should be"),
        pytest.param([("old", True)], [("new", "")], False, id="not paused"),
        pytest.param([("old", False)], [], False, id="deleted"),
        pytest.param([("old", False)], [("old", ""), ("new", "")], False, id="kept"),
    ],
)
def test_a_pause_that_a_rename_would_lose_is_found(
    before: list[tuple[str, bool]], after: list[tuple[str, str]], *, lost: bool
) -> None:
    there = [on_server(schedule("a", slug), active=active, identity=slug) for slug, active in before]
    new = [schedule("a", slug, replaces=old) for slug, old in after]
    found = lost_pauses(make_plan([resource("a"), *new], [actual("a"), *there]))
    assert bool(found) is lost
    assert all("schedule a#old is paused" in each and "if new is its new name" in each for each in found)
    paused = lost_pauses(make_plan([resource("a", paused=True), *new], [actual("a", paused=True), *there]))
    assert paused == []


def test_next_runs_that_differ_by_seconds_are_shown_apart() -> None:
    fires = schedules.next_runs(interval(20, "UTC"), SPRING)
    assert len({run_time(each) for each in fires}) == 3


def test_the_second_of_two_automations_of_one_name_is_deleted() -> None:
    twins = [replace(actual("a", Kind.AUTOMATION), id=identity) for identity in "12"]
    found = make_plan([resource("a", Kind.AUTOMATION)], twins)
    assert [(change.action, change.actual.id) for change in found.changes if change.actual] == [("delete", "2")]


def test_the_share_of_deletions_counts_each_kind() -> None:
    there = [actual(name) for name in "abcd"] + [actual(name, Kind.VARIABLE) for name in "vw"]
    found = make_plan([resource("a"), resource("b"), resource("c"), resource("v", Kind.VARIABLE)], there)
    assert excessive_deletions(found, there, 0.2) == ["1 of 2 variables", "1 of 4 deployments"]
    assert excessive_deletions(found, there, 0.3) == ["1 of 2 variables"]
    assert excessive_deletions(found, there, 0.5) == []


# --- a model of the server to which a plan is applied --------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
SLUGS = st.sampled_from(["s", "t", "u"])
VALUES = st.dictionaries(st.sampled_from("xyz"), st.integers(0, 2), max_size=3)


@st.composite
def states(draw: st.DrawFn) -> list[Resource]:
    wanted: list[Resource] = []
    for name in draw(st.sets(NAMES)):
        wanted.append(resource(name, parameters=draw(VALUES)))
        wanted += [schedule(name, slug, f"0 {draw(st.integers(0, 3))} * * *") for slug in draw(st.sets(SLUGS))]
    wanted += [resource(name, Kind.AUTOMATION, text=draw(VALUES)) for name in draw(st.sets(NAMES))]
    wanted += [resource(name, Kind.VARIABLE, value=draw(VALUES)) for name in draw(st.sets(NAMES))]
    return wanted


@st.composite
def renamed(draw: st.DrawFn, wanted: list[Resource]) -> list[Resource]:
    """Some schedules are the new names of ones that Git no longer has."""
    slugs = {each.name for each in wanted}
    return [
        replace(each, replaces=old)
        if each.kind is Kind.SCHEDULE and (old := f"{each.parent}#{draw(SLUGS)}") not in slugs and draw(st.booleans())
        else each
        for each in wanted
    ]


def applied(found: Plan, there: list[ActualResource]) -> list[ActualResource]:
    """The resources on the server after an apply."""
    result = {each.id: each for each in there}
    for index, change in enumerate(found.changes):
        if change.action is Action.DELETE and change.actual:
            result.pop(change.actual.id)
            if change.actual.kind is Kind.DEPLOYMENT:
                result = {key: each for key, each in result.items() if each.parent != change.actual.name}
        elif change.desired is not None:
            identity = change.actual.id if change.actual else f"new-{index}"
            active = change.actual.active if change.actual else True
            result[identity] = on_server(change.desired, identity=identity, active=active)
    return list(result.values())


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_applied_plan_reaches_git_and_leaves_unmanaged_resources_alone(data: st.DataObject) -> None:
    ours = [
        replace(on_server(each, identity=f"o{index}"), active=data.draw(st.booleans()))
        for index, each in enumerate(data.draw(states()))
    ]
    there = {each.name for each in ours if each.kind is Kind.DEPLOYMENT}
    theirs = [
        on_server(
            replace(each, name=f"their-{each.name}", parent=each.parent and f"their-{each.parent}"),
            managed=False,
            identity=f"t{index}",
        )
        for index, each in enumerate(data.draw(states()))
    ]
    by_hand = [
        ActualResource(
            kind=Kind.SCHEDULE,
            name=f"{name}#by-hand",
            parent=name,
            id=f"h-{name}",
            managed=False,
            updated=AUTUMN,
            fields={},
        )
        for name in there
    ]
    wanted = data.draw(renamed(data.draw(states())))
    before = [*ours, *theirs, *by_hand]
    found = make_plan(wanted, before)
    after = applied(found, before)

    assert not make_plan(wanted, after)
    mine = {(each.kind, each.name): each for each in after if each.managed}
    assert {key: each.fields for key, each in mine.items()} == {(each.kind, each.name): each.fields for each in wanted}
    assert [each for each in after if each in theirs] == theirs
    kept = {each.name for each in wanted if each.kind is Kind.DEPLOYMENT}
    assert {each.id for each in by_hand if each.parent in kept} <= {each.id for each in after}
    for each in ours:  # a pause survives
        same = next((one for one in after if one.id == each.id), None)
        assert same is None or same.active is each.active


# --- schedules -----------------------------------------------------------------------------------------------------


def cron(text: str, zone: str = "Europe/Paris") -> schedules.Schedule:
    return schedules.parse({"cron": text, "timezone": zone})


def interval(seconds: int, zone: str) -> schedules.Schedule:
    return schedules.parse({"interval": seconds, "anchor_date": "2026-01-01T00:00:00+00:00", "timezone": zone})


def test_next_runs_are_in_the_schedules_timezone() -> None:
    fires = schedules.next_runs(cron("15 3 * * *"), SPRING, 2)
    assert [f"{each:%Y-%m-%d %H:%M %Z}" for each in fires] == ["2027-03-28 03:15 CEST", "2027-03-29 03:15 CEST"]


@pytest.mark.parametrize(
    ("schedule", "now", "limit", "expected"),
    [
        pytest.param(cron("30 2 * * *"), SPRING, 60, ["2027-03-28 02:30 does not exist in Europe/Paris (clock change): runs at 03:30 CEST", "2027-10-31 02:30 occurs twice in Europe/Paris (clock change): runs at 02:30 CEST"], id="clock change"),
        pytest.param(cron("15 3 * * *"), SPRING, 60, [], id="outside of the changed hour"),
        pytest.param(cron("*/5 * * * *"), SPRING, 60, [], id="fires through the change"),
        pytest.param(interval(86400, "Europe/Paris"), SPRING, 60, [], id="an interval has no wall clock"),
        pytest.param(cron("0 6 * * MON-FRI", "UTC"), SPRING, 60, [], id="clocks never change"),
        pytest.param(interval(60, "UTC"), AUTUMN, 60, [], id="at the limit"),
        pytest.param(interval(30, "UTC"), AUTUMN, 60, ["120 runs per hour, above TIDEPOOL_DEPLOY_RUNS_PER_HOUR=60"], id="above the limit"),
        pytest.param(cron("*/5 * * * *", "UTC"), AUTUMN, 10, ["12 runs per hour, above TIDEPOOL_DEPLOY_RUNS_PER_HOUR=10"], id="cron above the limit"),
    ],
)  # fmt: skip
def test_warnings_about_a_schedule(
    schedule: schedules.Schedule, now: datetime, limit: int, expected: list[str]
) -> None:
    assert schedules.warnings(schedule, now, limit) == expected


@pytest.mark.parametrize(
    ("values", "key", "sentence"),
    [
        ({"cron": "0 1 * * *", "timezone": "Europe"}, "timezone", "unknown timezone 'Europe'; did you mean "),
        ({"cron": "0 1 * * *", "timezone": "x" * 300}, "timezone", f"unknown timezone '{'x' * 300}'; an example is "),
        *(
            ({"rrule": rule}, "rrule", f"'{rule}': {text}")
            for rule, text in (
                ("BYDAY=MO", "FREQ is missing; an example is FREQ=DAILY;BYHOUR=7"),
                ("DTSTART:20260101T000000", "FREQ is missing; an example is FREQ=DAILY;BYHOUR=7"),
                ("FREQ=DAILY;INTERVAL=0", "INTERVAL '0' is not accepted: 1 to 1000000"),
                ("FREQ=DAILY;BYHOUR=7,25", "BYHOUR '25' is not accepted: 0 to 23"),
                ("FREQ=DAILY;BYMONTH=x", "BYMONTH 'X' is not accepted: 1 to 12"),
                ("FREQ=DAILY;BYMONTHDAY=-40", "BYMONTHDAY '-40' is not accepted: 1 to 31, or -31 to -1 from the end"),
                (
                    "FREQ=DAILY;BYMONTH=2,4;BYMONTHDAY=31",
                    "it never fires: BYMONTHDAY is a day that no month of BYMONTH has",
                ),
            )
        ),
        ({"interval": 0.9, "anchor_date": "2026-01-01"}, "interval", "0.9: the shortest interval is one second"),
        ({"interval": 1e30, "anchor_date": "2026-01-01"}, "interval", "1e+30: not a duration; use seconds (3600) or "),
    ],
)
def test_a_schedule_that_cannot_be_is_one_sentence(values: dict[str, Any], key: str, sentence: str) -> None:
    [found] = schedules.problems(values, AUTUMN)
    assert (found[0], found[1][: len(sentence)]) == (key, sentence)


def test_the_shortest_interval_is_accepted() -> None:
    assert list(schedules.problems({"interval": 1, "anchor_date": "2026-01-01"}, AUTUMN)) == []


def test_next_runs_are_computed_inside_an_event_loop_too() -> None:
    """`prefect deploy` runs the step that validates in its loop."""

    async def step() -> int:
        return len(schedules.next_runs(cron("15 3 * * *"), SPRING, 2))

    assert asyncio.run(step()) == 2


def test_the_markdown_of_a_change_across_a_clock_change() -> None:
    before = {"slug": "nightly", "schedule": cron("15 3 * * *"), "parameters": {}}
    after = {**before, "schedule": cron("30 2 * * *")}
    names = {"kind": Kind.SCHEDULE, "name": "sell/sell#nightly", "parent": "sell/sell"}
    found = make_plan(
        [resource("sell/sell"), Resource(**names, fields=after)],
        [
            actual("sell/sell"),
            ActualResource(**names, fields=before, id="1", managed=True, updated=datetime(2027, 3, 25, 12, tzinfo=UTC)),
        ],
    )
    assert markdown.render(PlanView(found, "production", SPRING, 60)) == (
        "### tidepool plan: production\n"
        "\n"
        "**0 to create, 1 to update, 0 to delete, 1 unchanged**\n"
        "\n"
        "#### `~` update schedule `sell/sell#nightly`  (last written on the server 2 days ago)\n"
        "\n"
        "| field | before | after |\n"
        "|---|---|---|\n"
        "| schedule.cron | `15 3 * * *` | `30 2 * * *` |\n"
        "\n"
        "| next runs (Europe/Paris) | before | after |\n"
        "|---|---|---|\n"
        "| 1 | Sun 2027-03-28 03:15 CEST | Sun 2027-03-28 03:30 CEST |\n"
        "| 2 | Mon 2027-03-29 03:15 CEST | Mon 2027-03-29 02:30 CEST |\n"
        "| 3 | Tue 2027-03-30 03:15 CEST | Tue 2027-03-30 02:30 CEST |\n"
        "\n"
        "> ⚠️ 2027-03-28 02:30 does not exist in Europe/Paris (clock change): runs at 03:30 CEST\n"
        "> ⚠️ 2027-10-31 02:30 occurs twice in Europe/Paris (clock change): runs at 02:30 CEST\n"
    )
