"""A plan as GitHub-flavoured Markdown: a comment of a pull request, and the drift report."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tidepool.deploy.reconcile.plan import Action
from tidepool.deploy.view.plan_view import SYMBOLS, age, conflict, run_time, short

if TYPE_CHECKING:
    from tidepool.deploy.reconcile.plan import Change
    from tidepool.deploy.view.plan_view import PlanView

# GitHub accepts 65,536 characters in a comment.
_COMMENT = 60_000


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
        lines += ["| field | before | after |", "|---|---|---|"]
        lines += [
            f"| {each.field} | {_cell(each.old, each.field)} | {_cell(each.new, each.field)} |"
            for each in change.differences
        ]
        lines.append("")
    if runs := view.next_runs.get(change.resource.name):
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
        written = change.actual.updated if change.actual else None
        since = f"{age(view.now - written)} at most" if written else "-"
        if change.action is Action.CREATE:
            rows.append(f"{head}| | missing | present | {since} |")
        elif change.action is Action.DELETE:
            rows.append(f"{head}| | present | missing | {since} |")
        elif change.action is Action.CONFLICT:
            rows.append(f"{head}| | unmanaged | managed | {since} |")
        else:
            rows += [
                f"{head}| {each.field} | {_cell(each.old, each.field)} | {_cell(each.new, each.field)} | {since} |"
                for each in change.differences
            ]
    return rows


def _cell(value: Any, field: str) -> str:
    text = short(value, field).replace("|", "\\|").replace("`", "'")
    return f"`{text}`"
