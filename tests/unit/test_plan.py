"""The plan: what changes, what stays, whose it is, and what a schedule's change means for its next runs."""

# ruff: noqa: E501 - any field; rows of a table

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.deploy.config import schedules
from tidepool.deploy.reconcile.plan import UNKNOWN, Action, Kind, Live, Masked, Plan, Thing, compare, excess, plan
from tidepool.deploy.view import table

SPRING = datetime(2027, 3, 27, 12, tzinfo=UTC)  # the day before clocks go forward in Paris
AUTUMN = datetime(2026, 10, 24, 12, tzinfo=UTC)  # the day before they go back
NEW_YORK = {"timezone": "America/New_York", "day_or": True}


def thing(name: str, kind: Kind = Kind.DEPLOYMENT, **fields: Any) -> Thing:
    return Thing(kind=kind, name=name, fields=fields)


def live(name: str, kind: Kind = Kind.DEPLOYMENT, *, owned: bool = True, **fields: Any) -> Live:
    return Live(kind=kind, name=name, id=f"{kind}:{name}", owned=owned, fields=fields)


def schedule(parent: str, slug: str, cron: str = "0 6 * * *", replaces: str = "") -> Thing:
    fields = {"slug": slug, "schedule": {"cron": cron}}
    old = f"{parent}#{replaces}" if replaces else ""
    return Thing(kind=Kind.SCHEDULE, name=f"{parent}#{slug}", parent=parent, fields=fields, replaces=old)


def on_server(wanted: Thing, *, owned: bool = True, identity: str = "", active: bool = True) -> Live:
    return Live(
        kind=wanted.kind,
        name=wanted.name,
        parent=wanted.parent,
        fields=wanted.fields,
        id=identity or f"{wanted.kind}:{wanted.name}",
        owned=owned,
        active=active,
    )


def actions(found: Plan) -> list[tuple[str, str]]:
    return [(change.action, change.thing.name) for change in found.changes]


def test_what_is_the_same_is_no_change() -> None:
    found = plan([thing("a", tags=["x"])], [live("a", tags=["x"], version="1")])
    assert not found
    assert [each.name for each in found.unchanged] == ["a"]


def test_differences_are_told_field_by_field() -> None:
    found = plan([thing("a", parameters={"n": 2, "m": 1}, tags=[])], [live("a", parameters={"n": 1, "o": 0}, tags=[])])
    (change,) = found.changes
    assert [(each.field, repr(each.old), repr(each.new)) for each in change.differences] == [
        ("parameters.n", "1", "2"),
        ("parameters.m", "(none)", "1"),
        ("parameters.o", "0", "(none)"),
    ]


def test_what_only_the_build_knows_is_equal_to_anything() -> None:
    assert not plan([thing("a", job_variables={"image": UNKNOWN})], [live("a", job_variables={"image": "x@sha256:1"})])


def test_true_is_not_one() -> None:
    assert [each.field for each in compare({"a": 1}, {"a": True})] == ["a"]


def test_a_secret_is_compared_and_not_shown() -> None:
    found = plan(
        [thing("b", Kind.NOTIFICATION, urls=Masked("slack://new"))],
        [live("b", Kind.NOTIFICATION, urls=Masked("slack://old"))],
    )
    shown = table.view(found, "production", AUTUMN, 60)
    assert len(found.changes) == 1
    assert "slack" not in table.as_json(shown) + table.markdown(shown)


def test_what_left_git_is_deleted_and_takes_its_schedules_along() -> None:
    old, its = thing("gone"), schedule("gone", "s")
    found = plan([thing("a")], [live("a"), on_server(old), on_server(its)])
    assert actions(found) == [("delete", "gone")]


def test_what_somebody_else_owns_is_never_changed_or_deleted() -> None:
    theirs = [live("x", owned=False), on_server(schedule("x", "s"), owned=False)]
    assert not plan([], theirs)
    assert actions(plan([thing("x", a=1), schedule("x", "s", "0 7 * * *")], theirs)) == [("conflict", "x")]


def test_a_renamed_schedule_keeps_its_identity() -> None:
    before = [live("a"), on_server(schedule("a", "old"), identity="7")]
    found = plan([thing("a"), schedule("a", "new", replaces="old")], before)
    (change,) = found.changes
    assert change.live is not None
    assert (change.action, change.live.id) == ("update", "7")
    after = [live("a"), on_server(schedule("a", "new"), identity="7")]
    assert not plan([thing("a"), schedule("a", "new", replaces="old")], after)


def test_a_pause_is_reported_and_changes_nothing() -> None:
    found = plan([thing("a")], [replace(live("a"), active=False)])
    assert not found
    assert [each.name for each in found.paused] == ["a"]


def test_an_environment_that_wants_a_deployment_paused_is_no_somebody() -> None:
    assert plan([thing("a", paused=True)], [replace(live("a", paused=True), active=False)]).paused == ()


def test_one_of_two_automations_of_one_name_goes() -> None:
    twins = [replace(live("a", Kind.AUTOMATION), id=identity) for identity in "12"]
    found = plan([thing("a", Kind.AUTOMATION)], twins)
    assert [(change.action, change.live.id) for change in found.changes if change.live] == [("delete", "2")]


def test_the_share_of_deletions_counts_each_kind() -> None:
    there = [live(name) for name in "abcd"] + [live(name, Kind.VARIABLE) for name in "vw"]
    found = plan([thing("a"), thing("b"), thing("c"), thing("v", Kind.VARIABLE)], there)
    assert excess(found, there, 0.3) == ["1 of 2 variables"]


# --- a model of the server: what apply does with a plan ------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
SLUGS = st.sampled_from(["s", "t", "u"])
VALUES = st.dictionaries(st.sampled_from("xyz"), st.integers(0, 2), max_size=3)


@st.composite
def states(draw: st.DrawFn) -> list[Thing]:
    wanted: list[Thing] = []
    for name in draw(st.sets(NAMES)):
        wanted.append(thing(name, parameters=draw(VALUES)))
        wanted += [schedule(name, slug, f"0 {draw(st.integers(0, 3))} * * *") for slug in draw(st.sets(SLUGS))]
    wanted += [thing(name, Kind.AUTOMATION, text=draw(VALUES)) for name in draw(st.sets(NAMES))]
    wanted += [thing(name, Kind.VARIABLE, value=draw(VALUES)) for name in draw(st.sets(NAMES))]
    return wanted


@st.composite
def renamed(draw: st.DrawFn, wanted: list[Thing]) -> list[Thing]:
    """Some schedules are the new names of ones that Git no longer has."""
    slugs = {each.name for each in wanted}
    return [
        replace(each, replaces=old)
        if each.kind is Kind.SCHEDULE and (old := f"{each.parent}#{draw(SLUGS)}") not in slugs and draw(st.booleans())
        else each
        for each in wanted
    ]


def carried_out(found: Plan, there: list[Live]) -> list[Live]:
    """The server after an apply."""
    result = {each.id: each for each in there}
    for index, change in enumerate(found.changes):
        if change.action is Action.DELETE and change.live:
            result.pop(change.live.id)
            if change.live.kind is Kind.DEPLOYMENT:
                result = {key: each for key, each in result.items() if each.parent != change.live.name}
        elif change.desired is not None:
            identity = change.live.id if change.live else f"new-{index}"
            active = change.live.active if change.live else True
            result[identity] = on_server(change.desired, identity=identity, active=active)
    return list(result.values())


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_applied_plan_reaches_git_and_leaves_others_alone(data: st.DataObject) -> None:
    ours = [
        replace(on_server(each, identity=f"o{index}"), active=data.draw(st.booleans()))
        for index, each in enumerate(data.draw(states()))
    ]
    there = {each.name for each in ours if each.kind is Kind.DEPLOYMENT}
    theirs = [
        on_server(
            replace(each, name=f"their-{each.name}", parent=each.parent and f"their-{each.parent}"),
            owned=False,
            identity=f"t{index}",
        )
        for index, each in enumerate(data.draw(states()))
    ]
    by_hand = [
        Live(kind=Kind.SCHEDULE, name=f"{name}#by-hand", parent=name, id=f"h-{name}", owned=False, fields={})
        for name in there
    ]
    wanted = data.draw(renamed(data.draw(states())))
    before = [*ours, *theirs, *by_hand]
    found = plan(wanted, before)
    after = carried_out(found, before)

    assert not plan(wanted, after)
    mine = {(each.kind, each.name): each for each in after if each.owned}
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


def hourly(seconds: int, zone: str) -> schedules.Schedule:
    return schedules.parse({"interval": seconds, "anchor_date": "2026-01-01T00:00:00+00:00", "timezone": zone})


def test_next_fires_are_in_the_schedules_timezone() -> None:
    fires = schedules.next_fires(cron("15 3 * * *"), SPRING, 2)
    assert [f"{each:%Y-%m-%d %H:%M %Z}" for each in fires] == ["2027-03-28 03:15 CEST", "2027-03-29 03:15 CEST"]


def test_clock_changes_are_found_to_the_minute() -> None:
    found = schedules.clock_changes(ZoneInfo("Europe/Paris"), AUTUMN, 200)
    assert [f"{each:%Y-%m-%d %H:%M}" for each in found] == ["2026-10-25 01:00", "2027-03-28 01:00"]
    assert schedules.clock_changes(ZoneInfo("UTC"), AUTUMN) == []


@pytest.mark.parametrize(
    ("old", "new", "now", "expected"),
    [
        pytest.param(None, cron("15 3 * * *"), SPRING, "2027-03-28 clocks go forward in Europe/Paris: the next runs keep their local time, and move in UTC (UTC+0100 to UTC+0200)", id="wall clock kept"),
        pytest.param(None, cron("30 2 * * *"), SPRING, "2027-03-28 clocks go forward in Europe/Paris: 02:30 does not exist, this run starts at 03:30", id="does not exist"),
        pytest.param(None, cron("*/30 * * * *"), AUTUMN, "2026-10-25 clocks go back in Europe/Paris: ", id="repeated hour"),
        pytest.param(None, hourly(3600, "America/New_York"), datetime(2026, 10, 31, 12, tzinfo=UTC), "2026-11-01 clocks go back in America/New_York: a tick is skipped: no run between 01:00 EDT and 02:00 EST", id="interval"),
        pytest.param(cron("0 6 * * *", "UTC"), cron("0 5 * * *", "UTC"), datetime(2026, 6, 1, 5, 30, tzinfo=UTC), "the change skips a tick: 47.0 h without a run, between 2026-05-31 06:00 UTC (before) and 2026-06-02 05:00 UTC (after)", id="skips"),
        pytest.param(cron("0 3 * * *", "UTC"), cron("0 9 * * *", "UTC"), datetime(2026, 6, 1, 5, tzinfo=UTC), "the change doubles a tick: 6.0 h between the runs of 2026-06-01 03:00 UTC (before) and 2026-06-01 09:00 UTC (after)", id="doubles"),
        pytest.param(None, hourly(30, "UTC"), AUTUMN, "120 runs in an hour; more than 60 are worth a thought", id="too many"),
    ],
)  # fmt: skip
def test_what_is_odd_about_a_schedule_is_said(
    old: schedules.Schedule | None, new: schedules.Schedule, now: datetime, expected: str
) -> None:
    found = schedules.warnings(old, new, now, 60)
    assert any(each.startswith(expected) for each in found), found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (cron("0 6 * * *", "UTC"), cron("30 6 * * *", "UTC")),
        (None, cron("0 6 * * MON-FRI", "UTC")),
        (None, hourly(60, "UTC")),
        (cron("0 * * * *", "UTC"), cron("30 * * * *", "UTC")),
    ],
)
def test_what_is_not_odd_is_not_said(old: schedules.Schedule | None, new: schedules.Schedule) -> None:
    assert schedules.warnings(old, new, datetime(2026, 6, 1, 12, tzinfo=UTC), 60) == []


def test_the_comment_on_a_change_across_a_clock_change() -> None:
    before = {"slug": "nightly", "schedule": cron("15 3 * * *"), "parameters": {}}
    after = {**before, "schedule": cron("30 2 * * *")}
    names = {"kind": Kind.SCHEDULE, "name": "sell/sell#nightly", "parent": "sell/sell"}
    found = plan(
        [thing("sell/sell"), Thing(**names, fields=after)],
        [
            live("sell/sell"),
            Live(**names, fields=before, id="1", owned=True, updated=datetime(2027, 3, 25, 12, tzinfo=UTC)),
        ],
    )
    assert table.markdown(table.view(found, "production", SPRING, 60)) == (
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
        "> ⚠️ 2027-03-28 clocks go forward in Europe/Paris: 02:30 does not exist, this run starts at 03:30\n"
    )
