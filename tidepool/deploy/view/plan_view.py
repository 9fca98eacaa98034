"""A plan prepared for readers: the next runs of its schedules, pauses on record, and values without secrets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import SecretStr

from tidepool.deploy.config import schedules
from tidepool.deploy.config.placeholders import is_secret
from tidepool.deploy.reconcile.plan import ABSENT, Action, Change, Kind, Mark, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from tidepool.deploy.reconcile.actual import Pause
    from tidepool.deploy.reconcile.plan import ActualResource

SYMBOLS = {Action.CREATE: "+", Action.UPDATE: "~", Action.DELETE: "-", Action.CONFLICT: "!"}
RUNS = 3
"""Number of next runs that are shown."""
_WIDTH = 100


class NextRuns(NamedTuple):
    """Next runs of a schedule before and after a change, and warnings about them."""

    before: list[datetime]
    after: list[datetime]
    warnings: list[str]


@dataclass(frozen=True)
class PlanView:
    """A plan with everything that is shown with it.

    Attributes:
        plan: The plan.
        environment: Its environment.
        now: Time at which it was made: the start of the schedules' next runs.
        runs_per_hour: A schedule with more runs per hour has a warning.
        notes: Remarks that a reviewer should read with it.
        pauses: Recorded pauses.
    """

    plan: Plan
    environment: str
    now: datetime
    runs_per_hour: int
    notes: Sequence[str] = ()
    pauses: Sequence[Pause] = ()

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
        """One line for each paused resource: since when, by whom, until when and why.

        A recorded pause is listed where Git pauses the deployment too.
        """
        shown = {each.parent or each.name for each in self.plan.paused}
        rest = [each for each in self.pauses if each.deployment not in shown and each.deployment in self._known]
        own = [self._recorded_line(f"{Kind.DEPLOYMENT} {each.deployment}", each) for each in rest]
        return [*(self._paused_line(each) for each in self.plan.paused), *own]

    @property
    def _known(self) -> set[str]:
        resources = [*self.plan.unchanged, *(each.resource for each in self.plan.changes)]
        return {each.name for each in resources if each.kind is Kind.DEPLOYMENT}

    def _paused_line(self, resource: ActualResource) -> str:
        name, pause = f"{resource.kind} {resource.name}", self.pause_of(resource)
        if pause is None:
            return f"{name} is paused for at least {age(self.now - resource.updated)}; no reason recorded"
        return self._recorded_line(name, pause)

    def _recorded_line(self, name: str, pause: Pause) -> str:
        expired = " (expired)" if pause.until <= self.now else ""
        return (
            f"{name} is paused for {age(self.now - pause.at)} by {pause.by}, until "
            f"{pause.until:%Y-%m-%d %H:%M %Z}{expired}: {pause.reason}"
        )

    def pause_of(self, resource: ActualResource) -> Pause | None:
        """Return the recorded pause of a deployment, or of a schedule's deployment."""
        return next((each for each in self.pauses if each.deployment == (resource.parent or resource.name)), None)

    def next_runs(self, change: Change) -> NextRuns | None:
        """Return the next runs of a schedule that changes; None for another resource, a conflict and a pause in Git."""
        if change.resource.kind is not Kind.SCHEDULE or change.action is Action.CONFLICT:
            return None
        if change.resource.parent in self.plan.paused_in_git:
            return None
        before, after = (state.fields["schedule"] if state else None for state in (change.actual, change.desired))
        return NextRuns(
            before=schedules.next_runs(before, self.now, RUNS) if before else [],
            after=schedules.next_runs(after, self.now, RUNS) if after else [],
            warnings=schedules.warnings(after, self.now, self.runs_per_hour) if after else [],
        )

    def written(self, change: Change) -> str:
        """Return when the resource of a change was last written on the server, as an addition to its name."""
        return f"  (last written on the server {age(self.now - change.actual.updated)} ago)" if change.actual else ""


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
    """Return the time of a run as `Sun 2027-03-28 03:15 CEST`, with seconds unless they are zero."""
    return f"{time:%a %Y-%m-%d %H:%M:%S %Z}" if time.second else f"{time:%a %Y-%m-%d %H:%M %Z}"


def visible(value: Any, field: str) -> Any:
    """Return a value of a field as JSON has it, without secrets.

    A secret that was put in clear into a job's environment on the server is masked too.
    """
    if value is ABSENT:
        return None
    if isinstance(value, Mark):
        return repr(value)
    if isinstance(value, dict):
        return {key: visible(item, f"{field}.{key}") for key, item in value.items()}
    name = field.rsplit(".", 1)[-1]
    in_environment = ".env." in f".{field}" and isinstance(value, str) and is_secret(value, name)
    return "(secret)" if in_environment or isinstance(value, SecretStr) else value


def short(value: Any, field: str) -> str:
    """Return a value of a field in one line of at most 100 characters, without secrets."""
    if value is ABSENT:
        return repr(ABSENT)
    shown = visible(value, field)
    text = " ".join((shown if isinstance(shown, str) else json.dumps(shown, default=str)).split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
