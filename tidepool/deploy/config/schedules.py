"""Times at which a schedule fires, computed by Prefect's own scheduler, and warnings about them."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import TypeAdapter, ValidationError

from tidepool.deploy.config import placeholders
from tidepool.errors import did_you_mean, reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect.server.schemas.schedules import SCHEDULE_TYPES

Schedule = dict[str, Any]
"""`{cron, timezone, day_or}`, `{interval, anchor_date, timezone}` or `{rrule, timezone}`, as the server stores it."""

# The keys of prefect.yaml that define a schedule's times.
_TYPES = {
    "cron": str,
    "interval": str | int | float,
    "rrule": str,
    "timezone": str,
    "anchor_date": str,
    "day_or": bool,
}
_KEYS = tuple(_TYPES)
_CRON_FIELDS = {
    "minute": "0 to 59",
    "hour": "0 to 23",
    "day of month": "1 to 31, or L for the last",
    "month": "1 to 12, or JAN to DEC",
    "day of week": "0 to 7, or SUN to SAT",
}
_CRON_FORM = ", ".join(_CRON_FIELDS)
_CRON_NAMES = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")
# The numbers of a recurrence rule (RFC 5545, section 3.3.10), and whether they may count from the end.
_RRULE_NUMBERS = {
    "INTERVAL": (1, 1_000_000, False),
    "COUNT": (1, 1_000_000, False),
    "BYSECOND": (0, 59, False),
    "BYMINUTE": (0, 59, False),
    "BYHOUR": (0, 23, False),
    "BYMONTH": (1, 12, False),
    "BYMONTHDAY": (1, 31, True),
    "BYYEARDAY": (1, 366, True),
    "BYWEEKNO": (1, 53, True),
}
_LONGEST_MONTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_FREQUENT = re.compile(r"FREQ=(MINUTELY|SECONDLY)", re.IGNORECASE)
# Prefect computes at most 1,000 times in one call.
_STEP = timedelta(hours=6)
_DAY = timedelta(days=1)
_HORIZON_DAYS = 364
# A schedule that fires more often on a day keeps firing through a clock change.
_FEW = 12


def problems(values: Mapping[str, Any], now: datetime) -> Iterator[tuple[str, str]]:
    """Yield all that is wrong with a schedule of prefect.yaml, each with its key; nothing if it is accepted and fires.

    Its keys are known ones. One whose value is of another type, which is reported elsewhere, is left out.
    """
    given = [key for key in _CHECKS if values.get(key) is not None]
    misspelt = any(did_you_mean(str(key), list(_CHECKS), "-") != "; -" for key in values if key not in _KEYS)
    if len(given) > 1 or not (given or misspelt):
        named = " and ".join(given) or "none"
        yield (given or ["cron"])[-1], f"exactly one of cron, interval and rrule is needed, not {named}"
    elif given == ["interval"] and values.get("anchor_date") is None:
        yield "anchor_date", "missing: an interval needs one, because without it each deploy moves the ticks"
    of_text = dict(_problems_of_text(values))
    yield from of_text.items()
    usable = {key: each for key, each in values.items() if key not in of_text and isinstance(each, _TYPES.get(key, ()))}
    for key in given:
        if key in usable:
            others = {other: each for other, each in usable.items() if other not in _CHECKS}
            if message := _refused({**others, key: usable[key]}, key, now):
                yield key, f"{usable[key]!r}: {message}"


def _refused(values: Mapping[str, Any], kind: str, now: datetime) -> str:
    """Return what is wrong with the value of a schedule's kind; empty if it is accepted and fires."""
    try:
        _CHECKS[kind](values[kind])
        next_runs(parse(values), now, 1)
    except ValidationError as error:
        return "; ".join(reason(each, show_input=False) for each in error.errors())
    except (ValueError, TypeError, OverflowError) as error:
        return str(error)
    return ""


def _problems_of_text(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in (*_KEYS, "slug"):
        if placeholders.find(values.get(key)):
            yield key, "a schedule cannot contain {{ }}: its reviewers must see the value"
    timezone, anchor = values.get("timezone") or "UTC", values.get("anchor_date")
    if isinstance(timezone, str) and not placeholders.find(timezone) and not _is_timezone(timezone):
        hint = did_you_mean(timezone, available_timezones(), "an example is Europe/Paris")
        yield "timezone", f"unknown timezone {timezone!r}{hint}"
    if isinstance(anchor, str) and not placeholders.find(anchor) and not _is_time(anchor):
        yield "anchor_date", f"{anchor!r} is not a time; write it in ISO 8601: 2026-01-01T00:00:00+00:00"


def _is_timezone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def parse(values: Mapping[str, Any]) -> Schedule:
    """Convert a schedule of prefect.yaml to the form in which the server stores it.

    Raises:
        ValueError: Prefect rejects it.
    """
    given = {key: values[key] for key in _KEYS if values.get(key) is not None}
    return normal_form(_stored(json.dumps(given, sort_keys=True)))


@cache
def _stored(values: str) -> Schedule:
    from tidepool.upstream.prefect_deploy import stored_schedule

    return stored_schedule(json.loads(values))


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except (ValueError, TypeError):
        return False
    return True


def _check_cron(cron: Any) -> None:
    """Refuse a cron expression that is not five fields, each in its range; Prefect's library reads six and seven too.

    Raises:
        ValueError: it is not; with what is accepted.
    """
    fields = str(cron).split()
    if len(fields) == 1 and fields[0].startswith("@"):
        if fields[0] not in _CRON_NAMES:
            raise ValueError(f"unknown name; use five fields ({_CRON_FORM}) or one of {', '.join(_CRON_NAMES)}")
        return
    if len(fields) != len(_CRON_FIELDS):
        raise ValueError(f"a cron expression has five fields, not {len(fields)}: {_CRON_FORM}")
    wrong = []
    for index, (field, (name, accepted)) in enumerate(zip(fields, _CRON_FIELDS.items(), strict=True)):
        alone = " ".join(field if position == index else "*" for position in range(len(fields)))
        try:
            _model(json.dumps({"cron": alone}))
        except ValueError:
            wrong.append(f"{name} {field!r} is not accepted: {accepted}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _check_interval(interval: Any) -> None:
    """Refuse an interval that is not a duration of a second or more.

    Raises:
        ValueError: it is not; with what is accepted.
    """
    try:
        duration = TypeAdapter(timedelta).validate_python(interval)
    except (ValidationError, OverflowError):
        raise ValueError("not a duration; use seconds (3600) or ISO 8601 (PT1H, P1D)") from None
    if duration < timedelta(seconds=1):
        raise ValueError("the shortest interval is one second")


def _check_rrule(rrule: Any) -> None:
    """Refuse a rule by the minute or second without a start, to which the server gives the time of each deploy.

    Before that, one whose next tick dateutil would look for without end, or that it accepts and cannot read.

    Raises:
        ValueError: it is such a rule; with what is accepted.
    """
    _check_rrule_numbers(str(rrule).upper())
    if _FREQUENT.search(str(rrule)) and "DTSTART" not in str(rrule).upper():
        rule = str(rrule).strip().removeprefix("RRULE:")
        example = f"DTSTART:20260101T000000\\nRRULE:{rule}"
        raise ValueError(f'no DTSTART, so that each deploy would move the ticks; write "{example}"')


def _check_rrule_numbers(rrule: str) -> None:
    if "FREQ=" not in rrule and "RDATE" not in rrule:
        raise ValueError("FREQ is missing; an example is FREQ=DAILY;BYHOUR=7")
    parts = dict(each.split("=", 1) for each in re.split(r"[;\s:]", rrule) if "=" in each)
    found: dict[str, list[int]] = {}
    wrong = []
    for name, (least, most, also_negative) in _RRULE_NUMBERS.items():
        for text in parts[name].split(",") if name in parts else ():
            accepted = f"{least} to {most}{f', or -{most} to -{least} from the end' if also_negative else ''}"
            if (
                not re.fullmatch(r"[+-]?[0-9]+", text)
                or not least <= (abs(int(text)) if also_negative else int(text)) <= most
            ):
                wrong.append(f"{name} {text!r} is not accepted: {accepted}")
            else:
                found.setdefault(name, []).append(int(text))
    if wrong:
        raise ValueError("; ".join(wrong))
    months, days = found.get("BYMONTH", [*range(1, 13)]), found.get("BYMONTHDAY", [1])
    if min(map(abs, days)) > max(_LONGEST_MONTHS[each - 1] for each in months):
        raise ValueError("it never fires: BYMONTHDAY is a day that no month of BYMONTH has")


_CHECKS = {"cron": _check_cron, "interval": _check_interval, "rrule": _check_rrule}


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
    changes = []
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
            changes.append(f"{each:%Y-%m-%d %H:%M} {problem} in {zone.key} (clock change): runs at {times}")
    return changes


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
