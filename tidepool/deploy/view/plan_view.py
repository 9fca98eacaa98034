"""A plan prepared for readers: the next runs of its schedules, pauses on record, and values without secrets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidepool.deploy.config import schedules
from tidepool.deploy.config.placeholders import is_secret_variable
from tidepool.deploy.reconcile.plan import ABSENT, Action, Change, Kind, Mark, Masked, Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime, timedelta

    from tidepool.deploy.reconcile.actual import Pause
    from tidepool.deploy.reconcile.plan import ActualResource

SYMBOLS = {Action.CREATE: "+", Action.UPDATE: "~", Action.DELETE: "-", Action.CONFLICT: "!"}
RUNS = 3
"""Number of next runs that are shown."""
_WIDTH = 100


@dataclass(frozen=True)
class NextRuns:
    """Next runs of a schedule before and after a change, and warnings about them."""

    before: tuple[datetime, ...]
    after: tuple[datetime, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PlanView:
    """A plan with everything that is shown with it.

    Attributes:
        plan: The plan.
        environment: Its environment.
        next_runs: Of each schedule that changes, by its name.
        notes: Remarks that a reviewer should read with it.
        pauses: Recorded pauses, by deployment.
        now: Time at which it was made.
    """

    plan: Plan
    environment: str
    next_runs: Mapping[str, NextRuns]
    notes: tuple[str, ...]
    pauses: Mapping[str, Pause]
    now: datetime

    @property
    def summary(self) -> str:
        """Numbers of changes: `1 to create, 2 to update, 1 to delete, 12 unchanged`."""
        writes = (Action.CREATE, Action.UPDATE, Action.DELETE)
        parts = [f"{len(self.plan.of(action))} to {action}" for action in writes]
        conflicts = len(self.plan.of(Action.CONFLICT))
        parts += [f"{conflicts} in conflict"] if conflicts else []
        return ", ".join([*parts, f"{len(self.plan.unchanged)} unchanged"])

    @property
    def paused_lines(self) -> list[str]:
        """One line for each paused resource: since when, by whom, until when and why."""
        return [self._paused_line(each) for each in self.plan.paused]

    def _paused_line(self, resource: ActualResource) -> str:
        name, pause = f"{resource.kind} {resource.name}", self.pause_of(resource)
        if pause is None:
            since = f"for at least {age(self.now - resource.updated)}" if resource.updated else "for an unknown time"
            return f"{name} is paused {since}; no reason recorded"
        expired = " (expired)" if pause.until <= self.now else ""
        return (
            f"{name} is paused for {age(self.now - pause.at)} by {pause.by}, until "
            f"{pause.until:%Y-%m-%d %H:%M %Z}{expired}: {pause.reason}"
        )

    def pause_of(self, resource: ActualResource) -> Pause | None:
        """Return the recorded pause of a deployment, or of a schedule's deployment."""
        return self.pauses.get(resource.parent or resource.name)

    def written(self, change: Change) -> str:
        """Return when the resource of a change was last written on the server, as an addition to its name."""
        if change.actual is None or change.actual.updated is None:
            return ""
        return f"  (last written on the server {age(self.now - change.actual.updated)} ago)"


def prepare(
    plan: Plan,
    environment: str,
    now: datetime,
    runs_per_hour: int,
    *,
    notes: Sequence[str] = (),
    pauses: Iterable[Pause] = (),
) -> PlanView:
    """Prepare a plan to be shown.

    Args:
        plan: The plan.
        environment: Its environment.
        now: Start of the schedules' next runs.
        runs_per_hour: Warn about a schedule with more runs per hour.
        notes: Remarks that a reviewer should read with it.
        pauses: Recorded pauses.
    """
    return PlanView(
        plan=plan,
        environment=environment,
        next_runs={
            change.resource.name: _next_runs(change, now, runs_per_hour)
            for change in plan.changes
            if change.resource.kind is Kind.SCHEDULE and change.action is not Action.CONFLICT
        },
        notes=tuple(notes),
        pauses={each.deployment: each for each in pauses},
        now=now,
    )


def _next_runs(change: Change, now: datetime, runs_per_hour: int) -> NextRuns:
    before, after = (state.fields["schedule"] if state else None for state in (change.actual, change.desired))
    return NextRuns(
        before=tuple(schedules.next_runs(before, now, RUNS)) if before else (),
        after=tuple(schedules.next_runs(after, now, RUNS)) if after else (),
        warnings=tuple(schedules.warnings(after, now, runs_per_hour)) if after else (),
    )


def conflict(change: Change) -> str:
    """Return the reason of a conflict, and what to do."""
    tags = (change.actual.fields.get("tags") if change.actual else None) or []
    return (
        f"this {change.resource.kind} exists and is unmanaged (tags: {', '.join(tags) or 'none'}): give yours another "
        "name, or add the owner's tag to the existing one"
    )


def age(duration: timedelta) -> str:
    """Return a duration as `3 min`, `5 h` or `2 days`."""
    minutes = int(duration.total_seconds() // 60)
    if minutes < 60:  # noqa: PLR2004 - an hour
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h" if hours < 48 else f"{hours // 24} days"  # noqa: PLR2004 - two days


def run_time(time: datetime) -> str:
    """Return the time of a run as `Sun 2027-03-28 03:15 CEST`."""
    return f"{time:%a %Y-%m-%d %H:%M %Z}"


def visible(value: Any, field: str) -> Any:
    """Return a value of a field as JSON has it, without secrets.

    A secret that was put in clear into a job's environment on the server is masked too.
    """
    if value is ABSENT:
        return None
    if isinstance(value, Masked | Mark):
        return repr(value)
    if isinstance(value, dict):
        return {key: visible(item, f"{field}.{key}") for key, item in value.items()}
    name = field.rsplit(".", 1)[-1]
    in_environment = ".env." in f".{field}" and isinstance(value, str)
    return "(secret)" if in_environment and is_secret_variable(name, value) else value


def short(value: Any, field: str) -> str:
    """Return a value of a field in one line of at most 100 characters, without secrets."""
    if value is ABSENT:
        return repr(ABSENT)
    shown = visible(value, field)
    text = " ".join((shown if isinstance(shown, str) else json.dumps(shown, default=str)).split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
