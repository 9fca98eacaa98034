"""Times at which a schedule fires, computed by Prefect's own scheduler, and warnings about them."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect.server.schemas.schedules import SCHEDULE_TYPES

Schedule = dict[str, Any]
"""`{cron, timezone, day_or}`, `{interval, anchor_date, timezone}` or `{rrule, timezone}`, as the server stores it."""

# The keys of prefect.yaml that define a schedule's times.
_KEYS = ("cron", "interval", "rrule", "timezone", "anchor_date", "day_or")
# Prefect computes at most 1,000 times in one call.
_STEP = timedelta(hours=6)
_DAY = timedelta(days=1)
_HORIZON_DAYS = 364
# A schedule that fires more often on a day keeps firing through a clock change.
_FEW = 12


def parse(values: Mapping[str, Any]) -> Schedule:
    """Convert a schedule of prefect.yaml to the form in which the server stores it.

    Raises:
        ValueError: Prefect rejects it; the reason in one line.
    """
    given = {key: values[key] for key in _KEYS if values.get(key) is not None}
    return normal_form(_model(json.dumps(given, sort_keys=True)).model_dump(mode="json"))


def normal_form(schedule: Mapping[str, Any]) -> Schedule:
    """Return a schedule with its anchor date, an ISO 8601 time, in UTC: equal schedules become equal values."""
    result = dict(schedule)
    if result.get("anchor_date"):
        result["anchor_date"] = datetime.fromisoformat(result["anchor_date"]).astimezone(UTC).isoformat()
    return result


def next_runs(schedule: Schedule, start: datetime, count: int = 3) -> list[datetime]:
    """Return the next times at which a schedule fires, in its timezone.

    Raises:
        ValueError: Prefect rejects the schedule, or it never fires.
    """
    times = _dates(schedule, start=start, n=count)
    if not times:
        raise ValueError("it never fires")
    return times


def warnings(schedule: Schedule, now: datetime, limit: int) -> list[str]:
    """Return what a reviewer should know before a schedule becomes active.

    Args:
        schedule: The schedule.
        now: Time of the change.
        limit: Warn above this number of runs per hour: TIDEPOOL_DEPLOY_RUNS_PER_HOUR.
    """
    most = _runs_per_hour(schedule, now)
    frequent = [f"{most} runs per hour, above TIDEPOOL_DEPLOY_RUNS_PER_HOUR={limit}"] if most > limit else []
    return [*_clock_changes(schedule, now), *frequent]


def _runs_per_hour(schedule: Schedule, now: datetime) -> int:
    """Return the largest number of runs in one clock hour of the next day."""
    steps = (now + index * _STEP for index in range(_DAY // _STEP))
    instants = {each.timestamp() for start in steps for each in _dates(schedule, start=start, end=start + _STEP)}
    return max(Counter(instant // 3600 for instant in instants).values(), default=0)


def _clock_changes(schedule: Schedule, now: datetime) -> list[str]:
    """Find wall-clock times of a cron or rrule schedule that a clock change of the next year skips or repeats."""
    if "interval" in schedule:
        return []
    zone = _zone(schedule)
    found = []
    for day in range(_HORIZON_DAYS):
        start, end = ((now + (day + more) * _DAY).astimezone(zone) for more in (0, 1))
        if start.utcoffset() == end.utcoffset():
            continue
        # Read as UTC, whose clocks never change, the schedule yields every time that the wall clock should show.
        wall = _dates({**schedule, "timezone": "UTC"}, start=start.replace(tzinfo=UTC), end=end.replace(tzinfo=UTC))
        for each in wall if len(wall) <= _FEW else ():
            # PEP 495: the two readings of a time differ where it does not exist or exists twice.
            first, second = (each.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
            if first == second:
                continue
            runs = _dates(schedule, start=min(first, second), end=max(first, second))
            problem = "occurs twice" if first < second else "does not exist"
            times = " and ".join(f"{time:%H:%M %Z}" for time in runs) or "no time"
            found.append(f"{each:%Y-%m-%d %H:%M} {problem} in {zone.key} (clock change): runs at {times}")
    return found


def _dates(schedule: Schedule, **limits: Any) -> list[datetime]:
    """Return the times that Prefect's scheduler computes, in the schedule's timezone."""
    from prefect.utilities.asyncutils import run_coro_as_sync

    times: list[datetime] = run_coro_as_sync(_model(json.dumps(schedule, sort_keys=True)).get_dates(**limits))
    zone = _zone(schedule)
    return [datetime.fromtimestamp(time.timestamp(), zone) for time in times]


@cache
def _model(schedule: str) -> SCHEDULE_TYPES:
    """Return Prefect's model of a schedule: the server's, as the client's does not compute times."""
    from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

    values = json.loads(schedule)
    kind = CronSchedule if "cron" in values else IntervalSchedule if "interval" in values else RRuleSchedule
    return kind.model_validate(values)


def _zone(schedule: Schedule) -> ZoneInfo:
    return ZoneInfo(schedule.get("timezone") or "UTC")
