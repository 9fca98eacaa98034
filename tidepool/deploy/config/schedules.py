"""When a schedule fires, as Prefect's own scheduler computes it, and what is odd about it.

Odd are ticks that a clock change moves, skips or doubles, a gap or a clash between an old and a new schedule, and too
many runs.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Schedule = dict[str, Any]
"""`{cron, timezone, day_or}`, `{interval, anchor_date, timezone}` or `{rrule, timezone}`, as the server stores it."""

KEYS = ("cron", "interval", "rrule", "timezone", "anchor_date", "day_or")
"""The keys of prefect.yaml that make a schedule's times."""

# Prefect looks at 1,000 ticks at most in one call.
_STEP = timedelta(hours=6)
_LOOK_BACK = tuple(timedelta(days=days) for days in (1 / 24, 1, 8, 40, 400))
_DAY = timedelta(days=1)
_HORIZON_DAYS = 364
# A change of schedule makes a gap of more than 1.5, or less than half, of the usual distance of two runs.
_GAP, _CLASH = 1.5, 0.5
_SHOWN = 3


def next_fires(schedule: Schedule, start: datetime, count: int = 3) -> list[datetime]:
    """The next times at which a schedule fires, in its timezone.

    Raises:
        ValueError: Prefect does not take the schedule, or it never fires.
    """
    times = _dates(schedule, start=start, n=count)
    if not times:
        raise ValueError("it never fires")
    return times


def between(schedule: Schedule, start: datetime, end: datetime) -> list[datetime]:
    """All times from `start` to `end`, in the schedule's timezone."""
    times: dict[float, datetime] = {}  # by instant: in a repeated hour two of them show the same wall time
    while start < end:
        times.update({each.timestamp(): each for each in _dates(schedule, start=start, end=min(start + _STEP, end))})
        start += _STEP
    return [times[instant] for instant in sorted(times)]


def warnings(old: Schedule | None, new: Schedule, now: datetime, runs_per_hour: int) -> list[str]:
    """What a person should know before a schedule becomes live.

    Args:
        old: The schedule that it replaces, if there is one.
        new: The schedule.
        now: The time of the change.
        runs_per_hour: More runs than this within an hour are said.
    """
    return [
        *_clock_changes(new, now),
        *([] if old is None else _seam(old, new, now)),
        *_too_many(new, now, runs_per_hour),
    ]


def parse(values: Mapping[str, Any]) -> Schedule:
    """A schedule as prefect.yaml has it, in the form in which the server stores it.

    Raises:
        ValueError: Prefect does not take it; the reason in one line.
    """
    return dict(_parsed(json.dumps(dict(values), sort_keys=True)))


@cache
def _parsed(text: str) -> Schedule:
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

    values = json.loads(text)
    timezone = values.get("timezone")
    if values.get("cron") is not None:
        day_or = values.get("day_or")
        return dump(
            CronSchedule(cron=values["cron"], timezone=timezone, day_or=True if day_or is None else day_or),
        )
    if values.get("interval") is not None:
        interval = values["interval"]
        if isinstance(interval, int | float):
            interval = timedelta(seconds=interval)
        return dump(IntervalSchedule(interval=interval, anchor_date=values.get("anchor_date"), timezone=timezone))
    return dump(RRuleSchedule(rrule=values["rrule"], timezone=timezone))


def dump(schedule: Any) -> Schedule:
    """One of Prefect's schedules in the form that is compared."""
    result: Schedule = schedule.model_dump(mode="json")
    if result.get("anchor_date"):
        result["anchor_date"] = utc(result["anchor_date"])
    return result


def utc(time: str) -> str:
    """An ISO 8601 time in UTC, in one spelling."""
    return datetime.fromisoformat(time).astimezone(UTC).isoformat()


def _dates(schedule: Schedule, **limits: Any) -> list[datetime]:
    zone = _zone(schedule)
    coroutine = _model(json.dumps(schedule, sort_keys=True)).get_dates(**limits)
    try:
        coroutine.send(None)  # it awaits nothing: no event loop is needed, and one that runs is not in the way
    except StopIteration as done:
        times = done.value
    return [datetime.fromtimestamp(time.timestamp(), zone) for time in times]


@cache
def _model(schedule: str) -> Any:
    """The class with which the server's scheduler computes.

    Constructed without validation, which `parse` has done: it lists all timezone files each time (10 ms).
    """
    from prefect.server.schemas import schedules as server
    from prefect.types import DateTime
    from pydantic import TypeAdapter

    values = json.loads(schedule)
    if "cron" in values:
        return server.CronSchedule.model_construct(**values)
    if "rrule" in values:
        return server.RRuleSchedule.model_construct(**values)
    anchor = TypeAdapter(DateTime).validate_python(values["anchor_date"])
    interval = timedelta(seconds=float(values["interval"]))
    return server.IntervalSchedule.model_construct(interval=interval, anchor_date=anchor, timezone=values["timezone"])


def _zone(schedule: Schedule) -> ZoneInfo:
    return ZoneInfo(schedule.get("timezone") or "UTC")


# --- the clocks change ---------------------------------------------------------------------------------------------


def clock_changes(zone: ZoneInfo, start: datetime, days: int = _HORIZON_DAYS) -> list[datetime]:
    """The instants (UTC, to the minute) at which a timezone's clocks change."""
    changes = []
    start = start.astimezone(UTC).replace(second=0, microsecond=0)
    for day in range(days):
        low, high = start + day * _DAY, start + (day + 1) * _DAY
        if low.astimezone(zone).utcoffset() == high.astimezone(zone).utcoffset():
            continue
        while high - low > timedelta(minutes=1):
            middle = low + (high - low) // 2
            same = middle.astimezone(zone).utcoffset() == low.astimezone(zone).utcoffset()
            low, high = (middle, high) if same else (low, middle)
        changes.append(high.replace(second=0, microsecond=0))
    return changes


def _clock_changes(schedule: Schedule, now: datetime) -> list[str]:
    zone = _zone(schedule)
    soon = next_fires(schedule, now)[-1]
    found = []
    for change in clock_changes(zone, now):
        before = (change - timedelta(minutes=1)).astimezone(zone)
        after = change.astimezone(zone)
        ahead = (after.utcoffset() or timedelta()) > (before.utcoffset() or timedelta())
        moved = f"{after:%Y-%m-%d} clocks go {'forward' if ahead else 'back'} in {zone.key}"
        odd = _odd_ticks(schedule, change, zone)
        if odd:
            found += [f"{moved}: {each}" for each in odd]
        elif now <= change <= soon:
            shift = f"{_offset(before)} to {_offset(after)}"
            found.append(f"{moved}: the next runs keep their local time, and move in UTC ({shift})")
    return found


def _offset(time: datetime) -> str:
    return f"UTC{time:%z}"


def _odd_ticks(schedule: Schedule, change: datetime, zone: ZoneInfo) -> list[str]:
    """Ticks of a day with a clock change that are not where the wall clock says."""
    start, end = change - _DAY / 2, change + _DAY / 2
    actual = _dates(schedule, start=start, end=end)  # in one go, as the scheduler looks ahead
    if "interval" in schedule:
        return _odd_intervals(schedule, start, end)
    wall = {**schedule, "timezone": "UTC"}
    first, last = start.astimezone(zone).replace(tzinfo=UTC), end.astimezone(zone).replace(tzinfo=UTC)
    expected = Counter(time.replace(tzinfo=None) for time in _dates(wall, start=first, end=last))
    there = Counter(time.replace(tzinfo=None) for time in actual)
    missing, extra = sorted((expected - there).elements()), sorted((there - expected).elements())
    if missing and len(missing) == len(extra):
        pairs = zip(missing[:_SHOWN], extra[:_SHOWN], strict=True)
        return [f"{tick:%H:%M} does not exist, this run starts at {moved:%H:%M}" for tick, moved in pairs]
    if missing:
        return [f"{len(missing)} tick{_s(missing)} skipped ({_times(missing)})"]
    if extra:
        return [f"{len(extra)} tick{_s(extra)} doubled ({_times(extra)})"]
    usual = _usual_distance(sorted(expected.elements()))
    gap = max((_instant(right) - _instant(left) for left, right in pairwise(actual)), default=timedelta())
    if usual and usual <= timedelta(hours=1) < gap:
        return [f"no run for {_duration(gap)}: the repeated hour is skipped"]
    return []


def _odd_intervals(schedule: Schedule, start: datetime, end: datetime) -> list[str]:
    interval = timedelta(seconds=float(schedule["interval"]))
    if interval >= _DAY:
        times = _dates(schedule, start=start - interval, end=end + interval)
        local = sorted({f"{time:%H:%M}" for time in times})
        return [f"the run moves between {' and '.join(local)} local time"] if len(local) > 1 else []
    times = _dates(schedule, start=start, end=end)
    found = []
    for left, right in pairwise(times):
        distance = _instant(right) - _instant(left)
        if distance > interval:
            found.append(f"a tick is skipped: no run between {left:%H:%M %Z} and {right:%H:%M %Z}")
        elif distance < interval:
            found.append(f"a tick is doubled: {left:%H:%M %Z} and {right:%H:%M %Z}")
    return found[:_SHOWN]


# --- the seam between an old and a new schedule --------------------------------------------------------------------


def _seam(old: Schedule, new: Schedule, now: datetime) -> list[str]:
    last, following = _previous(old, now), next_fires(new, now)
    if last is None:
        return []
    usual = [distance for each in (old, new) if (distance := _usual_distance(next_fires(each, now, 5)))]
    if not usual:
        return []
    gap = following[0].astimezone(UTC) - last.astimezone(UTC)
    instants = f"{_stamp(last)} (before) and {_stamp(following[0])} (after)"
    if gap > _GAP * max(usual):
        return [f"the change skips a tick: {_duration(gap)} without a run, between {instants}"]
    if gap <= _CLASH * min(usual):
        return [f"the change doubles a tick: {_duration(gap)} between the runs of {instants}"]
    return []


def _previous(schedule: Schedule, now: datetime) -> datetime | None:
    for distance in _LOOK_BACK:
        times = [time for time in between(schedule, now - distance, now) if time < now]
        if times:
            return times[-1]
    return None


def _usual_distance(times: Sequence[datetime]) -> timedelta | None:
    distances = sorted(_instant(right) - _instant(left) for left, right in pairwise(times))
    return distances[len(distances) // 2] if distances else None


def _instant(time: datetime) -> datetime:
    """For differences in elapsed time: two times of one timezone are subtracted by their wall clocks."""
    return time if time.tzinfo is None else time.astimezone(UTC)


def _too_many(schedule: Schedule, now: datetime, runs_per_hour: int) -> list[str]:
    hours = Counter(
        time.astimezone(UTC).replace(minute=0, second=0, microsecond=0) for time in between(schedule, now, now + _DAY)
    )
    most = max(hours.values(), default=0)
    return [f"{most} runs in an hour; more than {runs_per_hour} are worth a thought"] if most > runs_per_hour else []


# --- words ---------------------------------------------------------------------------------------------------------


def _s(items: Sequence[object]) -> str:
    return "" if len(items) == 1 else "s"


def _times(times: Sequence[datetime]) -> str:
    more = f" and {len(times) - _SHOWN} more" if len(times) > _SHOWN else ""
    return ", ".join(f"{time:%H:%M}" for time in times[:_SHOWN]) + more


def _stamp(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M %Z}"


def _duration(distance: timedelta) -> str:
    minutes = round(distance.total_seconds() / 60)
    if minutes < 60:  # noqa: PLR2004 - minutes of an hour
        return f"{minutes} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"  # noqa: PLR2004 - two days in hours
