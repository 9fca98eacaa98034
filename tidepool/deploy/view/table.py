"""A plan for people and machines: a table, JSON, Markdown for a pull-request comment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidepool.deploy.config import schedules
from tidepool.deploy.config.checks import looks_secret
from tidepool.deploy.reconcile.plan import ABSENT, Action, Change, Difference, Kind, Live, Mark, Masked, Plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from rich.console import Console

    from tidepool.deploy.pauses import Pause

SYMBOLS = {Action.CREATE: "+", Action.UPDATE: "~", Action.DELETE: "-", Action.CONFLICT: "!"}
_STYLES = {Action.CREATE: "green", Action.UPDATE: "yellow", Action.DELETE: "red", Action.CONFLICT: "bold red"}
_WIDTH = 100
_FIRES = 3
# GitHub takes 65,536 characters in a comment.
_COMMENT = 60_000


@dataclass(frozen=True)
class Ticks:
    """When a schedule fires, before and after a change, and what is odd about it."""

    before: tuple[datetime, ...]
    after: tuple[datetime, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """A plan with everything that is shown with it.

    Attributes:
        plan: The plan.
        environment: Whose it is.
        ticks: Of each schedule that changes, by its name.
        notes: What else a person should know.
        pauses: Pauses on record, by deployment.
        now: When it was made.
    """

    plan: Plan
    environment: str
    ticks: Mapping[str, Ticks]
    notes: tuple[str, ...]
    pauses: Mapping[str, Pause]
    now: datetime


def view(
    found: Plan,
    environment: str,
    now: datetime,
    runs_per_hour: int,
    *,
    notes: Sequence[str] = (),
    pauses: Sequence[Pause] = (),
) -> View:
    """Prepares a plan to be shown.

    Args:
        found: The plan.
        environment: Whose it is.
        now: The schedules' next times start here.
        runs_per_hour: More runs within an hour are warned about.
        notes: What else a person should know.
        pauses: Pauses on record.
    """
    ticks = {
        change.thing.name: _ticks(change, now, runs_per_hour)
        for change in found.changes
        if change.thing.kind is Kind.SCHEDULE and change.action is not Action.CONFLICT
    }
    return View(
        plan=found,
        environment=environment,
        ticks=ticks,
        notes=tuple(notes),
        pauses={each.deployment: each for each in pauses},
        now=now,
    )


def summary(found: Plan) -> str:
    """`1 to create, 2 to update, 1 to delete, 12 unchanged`."""
    parts = [f"{len(found.of(action))} to {action}" for action in (Action.CREATE, Action.UPDATE, Action.DELETE)]
    conflicts = len(found.of(Action.CONFLICT))
    parts += [f"{conflicts} in conflict"] if conflicts else []
    return ", ".join([*parts, f"{len(found.unchanged)} unchanged"])


def as_json(shown: View) -> str:
    """One JSON object."""
    return json.dumps(
        {
            "environment": shown.environment,
            "time": shown.now.isoformat(timespec="seconds"),
            "changes": [
                {
                    "action": change.action,
                    "kind": change.thing.kind,
                    "name": change.thing.name,
                    "since": change.live.updated.isoformat() if change.live and change.live.updated else None,
                    "fields": [
                        {"field": each.field, "old": _json(each.old, each), "new": _json(each.new, each)}
                        for each in change.differences
                    ],
                    **_json_ticks(shown.ticks.get(change.thing.name)),
                }
                for change in shown.plan.changes
            ],
            "unchanged": [{"kind": thing.kind, "name": thing.name} for thing in shown.plan.unchanged],
            "paused": [
                {"kind": thing.kind, "name": thing.name, **_json_pause(thing, shown)} for thing in shown.plan.paused
            ],
            "notes": list(shown.notes),
        },
        indent=2,
    )


def table(shown: View, out: Console) -> None:
    """Prints a coloured table."""
    from rich.table import Table
    from rich.text import Text

    out.print(f"[bold]{shown.environment}[/]: {summary(shown.plan)}")
    if shown.plan.changes:
        grid = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for change in shown.plan.changes:
            style = _STYLES[change.action]
            name = Text.assemble((change.thing.name, f"bold {style}"), (_since(change, shown), "dim"))
            grid.add_row(Text(SYMBOLS[change.action], style), change.thing.kind, name)
            for line in _details(change, shown):
                grid.add_row("", "", line)
        out.print(grid)
    for line in paused_lines(shown):
        out.print(Text(line, "cyan"))
    for note in shown.notes:
        out.print(Text(f"note: {note}", "dim"))


def markdown(shown: View) -> str:
    """GitHub-flavoured Markdown for a pull-request comment."""
    lines = [f"### tidepool plan: {shown.environment}", "", f"**{summary(shown.plan)}**", ""]
    if not shown.plan.changes:
        lines += ["Nothing to do: the server is as Git wants it.", ""]
    for change in shown.plan.changes:
        head = f"#### `{SYMBOLS[change.action]}` {change.action} {change.thing.kind} `{change.thing.name}`"
        lines += [head + _since(change, shown), ""]
        lines += _markdown_change(change, shown)
    if paused_lines(shown):
        lines += ["#### Paused by somebody", "", *(f"- {line}" for line in paused_lines(shown)), ""]
    lines += [f"> {note}" for note in shown.notes]
    text = "\n".join(lines).rstrip() + "\n"
    if len(text) > _COMMENT:
        return text[:_COMMENT] + "\n\n… the rest is too long for a comment: run `tidepool plan`.\n"
    return text


def _markdown_change(change: Change, shown: View) -> list[str]:
    lines = []
    if change.action is Action.UPDATE:
        lines += ["| field | before | after |", "|---|---|---|"]
        lines += [
            f"| {each.field} | {_cell(each.old, each)} | {_cell(each.new, each)} |" for each in change.differences
        ]
        lines.append("")
    ticks = shown.ticks.get(change.thing.name)
    if ticks:
        zone = _zone(change)
        lines += [f"| next runs ({zone}) | before | after |", "|---|---|---|"]
        for index in range(_FIRES):
            lines.append(f"| {index + 1} | {_tick(ticks.before, index)} | {_tick(ticks.after, index)} |")
        lines.append("")
        lines += [f"> ⚠️ {warning}" for warning in ticks.warnings]
        lines += [""] if ticks.warnings else []
    if change.action is Action.CONFLICT:
        lines += [_conflict(change), ""]
    return lines


def _details(change: Change, shown: View) -> list[Any]:
    from rich.text import Text

    lines: list[Any] = []
    if change.action is Action.UPDATE:
        for each in change.differences:
            old, new = (_short(each.old, each), "red"), (_short(each.new, each), "green")
            lines.append(Text.assemble(f"{each.field}: ", old, " -> ", new))
    ticks = shown.ticks.get(change.thing.name)
    if ticks:
        for word, times in (("before", ticks.before), ("next", ticks.after)):
            if times:
                lines.append(Text(f"{word}: " + ", ".join(_time(time) for time in times), "dim"))
        lines += [Text(f"warning: {warning}", "magenta") for warning in ticks.warnings]
    if change.action is Action.CONFLICT:
        lines.append(Text(_conflict(change), "red"))
    return lines


def _since(change: Change, shown: View) -> str:
    if change.live is None or change.live.updated is None:
        return ""
    return f"  (last written on the server {age(shown.now - change.live.updated)} ago)"


def _conflict(change: Change) -> str:
    tags = (change.live.fields.get("tags") if change.live else None) or []
    return (
        f"this {change.thing.kind} exists and is not ours (tags: {', '.join(tags) or 'none'}): give yours another "
        "name, or add our tag to the existing one"
    )


def paused_lines(shown: View) -> list[str]:
    """One sentence for each thing that somebody paused."""
    lines = []
    for thing in shown.plan.paused:
        pause = shown.pauses.get(thing.parent or thing.name)
        if pause is None:
            since = f"for {age(shown.now - thing.updated)} or longer" if thing.updated else "for an unknown time"
            lines.append(f"{thing.kind} {thing.name} is paused {since}; nobody said why")
        else:
            over = " (over)" if pause.until <= shown.now else ""
            lines.append(
                f"{thing.kind} {thing.name} is paused for {age(shown.now - pause.at)} by {pause.by}, until "
                f"{pause.until:%Y-%m-%d %H:%M %Z}{over}: {pause.reason}"
            )
    return lines


def age(distance: Any) -> str:
    """`3 min`, `5 h`, `2 days`."""
    minutes = int(distance.total_seconds() // 60)
    if minutes < 60:  # noqa: PLR2004 - an hour
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h" if hours < 48 else f"{hours // 24} days"  # noqa: PLR2004 - two days


def _ticks(change: Change, now: datetime, runs_per_hour: int) -> Ticks:
    old = change.live.fields["schedule"] if change.live else None
    new = change.desired.fields["schedule"] if change.desired else None
    changed = any(each.field.startswith("schedule.") for each in change.differences)
    if new is None:
        warnings: list[str] = []
    else:
        warnings = schedules.warnings(old if changed else None, new, now, runs_per_hour)
    return Ticks(before=_fires(old, now), after=_fires(new, now), warnings=tuple(warnings))


def _fires(schedule: schedules.Schedule | None, now: datetime) -> tuple[datetime, ...]:
    return () if schedule is None else tuple(schedules.next_fires(schedule, now, _FIRES))


def _zone(change: Change) -> str:
    return str(change.thing.fields["schedule"].get("timezone") or "UTC")


def _time(time: datetime) -> str:
    return f"{time:%a %Y-%m-%d %H:%M %Z}"


def _tick(times: Sequence[datetime], index: int) -> str:
    return _time(times[index]) if index < len(times) else "-"


def _json_ticks(ticks: Ticks | None) -> dict[str, Any]:
    if ticks is None:
        return {}
    return {
        "fires": {
            "before": [time.isoformat() for time in ticks.before],
            "after": [time.isoformat() for time in ticks.after],
        },
        "warnings": list(ticks.warnings),
    }


def _json_pause(thing: Live, shown: View) -> dict[str, Any]:
    pause = shown.pauses.get(thing.parent or thing.name)
    if pause is None:
        return {"since": thing.updated.isoformat() if thing.updated else None}
    return {
        "since": pause.at.isoformat(),
        "by": pause.by,
        "reason": pause.reason,
        "until": pause.until.isoformat(),
    }


def _hidden(value: Any, difference: Difference) -> bool:
    """Somebody put a secret in clear on the server: the plan does not spread it."""
    name = difference.field.rsplit(".", 1)[-1]
    return isinstance(value, str) and ".env." in f".{difference.field}" and looks_secret(name, value)


def _json(value: Any, difference: Difference) -> Any:
    if value is ABSENT:
        return None
    if isinstance(value, Masked | Mark) or _hidden(value, difference):
        return "(secret)" if not isinstance(value, Mark) else repr(value)
    if isinstance(value, dict):
        return {key: _json(item, Difference(f"{difference.field}.{key}", None, None)) for key, item in value.items()}
    return value


def _short(value: Any, difference: Difference) -> str:
    plain = _json(value, difference)
    if value is ABSENT:
        return repr(ABSENT)
    text = plain if isinstance(plain, str) else json.dumps(plain, default=str)
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _cell(value: Any, difference: Difference) -> str:
    text = _short(value, difference).replace("|", "\\|").replace("`", "'")
    return f"`{text}`"


def drift_rows(shown: View) -> list[str]:
    """Rows of a Markdown table, one for each field: symbol, thing, field, server, Git, since."""
    rows = []
    for change in shown.plan.changes:
        head = f"| `{SYMBOLS[change.action]}` | {change.thing.kind} `{change.thing.name}` "
        live = change.live
        since = f"{age(shown.now - live.updated)} at most" if live and live.updated else "-"
        if change.action is Action.CREATE:
            rows.append(f"{head}| | missing | there | {since} |")
        elif change.action is Action.DELETE:
            rows.append(f"{head}| | there | gone | {since} |")
        elif change.action is Action.CONFLICT:
            rows.append(f"{head}| | somebody else's | ours | {since} |")
        rows += [
            f"{head}| {each.field} | {_cell(each.old, each)} | {_cell(each.new, each)} | {since} |"
            for each in (change.differences if change.action is Action.UPDATE else ())
        ]
    return rows
