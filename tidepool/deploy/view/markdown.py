"""A plan as GitHub-flavoured Markdown: a comment of a pull request, and the drift report."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from tidepool.deploy.reconcile.plan import Action
from tidepool.deploy.view.plan_view import SYMBOLS, age, conflict, run_time, short

if TYPE_CHECKING:
    from tidepool.deploy.reconcile.plan import Change
    from tidepool.deploy.view.plan_view import PlanView

# GitHub accepts 65,536 characters in a comment.
_COMMENT = 60_000
# In place of fields, where a resource differs as a whole: on the server, and in Git.
_WHOLE = {
    Action.CREATE: "| | missing | present |",
    Action.DELETE: "| | present | missing |",
    Action.CONFLICT: "| | unmanaged | managed |",
}


def render(view: PlanView) -> str:
    """Return a plan as a comment of a pull request."""
    lines = [f"### tidepool plan: {view.environment}", "", f"**{view.summary}**", ""]
    if not view.plan.changes:
        lines += ["Nothing to do: the server is in the state in Git.", ""]
    for change in view.plan.changes:
        head = f"#### `{SYMBOLS[change.action]}` {change.action} {change.resource.kind} `{change.resource.name}`"
        lines += [head + view.written(change), "", *_change(change, view)]
    if view.paused_lines:
        lines += ["#### Paused on the server", "", *(f"- {line}" for line in view.paused_lines), ""]
    lines += [f"> {note}" for note in view.notes]
    text = "\n".join(lines).rstrip() + "\n"
    if len(text) > _COMMENT:
        return text[:_COMMENT] + "\n\n… the rest is too long for a comment: run `tidepool plan`.\n"
    return text


def _change(change: Change, view: PlanView) -> list[str]:
    lines = []
    if change.action is Action.UPDATE:
        lines += ["| field | before | after |", "|---|---|---|", *_rows(change), ""]
    if runs := view.next_runs(change):
        zone = change.resource.fields["schedule"].get("timezone") or "UTC"
        lines += [f"| next runs ({zone}) | before | after |", "|---|---|---|"]
        for index, times in enumerate(zip_longest(runs.before, runs.after), start=1):
            before, after = (run_time(time) if time else "-" for time in times)
            lines.append(f"| {index} | {before} | {after} |")
        lines.append("")
        lines += [f"> ⚠️ {warning}" for warning in runs.warnings]
        lines += [""] if runs.warnings else []
    if change.action is Action.CONFLICT:
        lines += [conflict(change), ""]
    return lines


def drift_rows(view: PlanView) -> list[str]:
    """Return rows of a table, one for each field: symbol, resource, field, server, Git, time since the last write."""
    rows = []
    for change in view.plan.changes:
        head = f"| `{SYMBOLS[change.action]}` | {change.resource.kind} `{change.resource.name}` "
        since = f" {age(view.now - change.actual.updated)} at most |" if change.actual else " - |"
        if change.action is Action.UPDATE:
            rows += [head + row + since for row in _rows(change)]
        else:
            rows.append(head + _WHOLE[change.action] + since)
    return rows


def _rows(change: Change) -> list[str]:
    cells = ((each.field, short(each.old, each.field), short(each.new, each.field)) for each in change.differences)
    return [f"| {field} | {_code(old)} | {_code(new)} |" for field, old, new in cells]


def _code(text: str) -> str:
    text = text.replace("|", "\\|").replace("`", "'")
    return f"`{text}`"
