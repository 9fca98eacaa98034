"""A plan as a coloured table, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidepool.deploy.reconcile.plan import Action
from tidepool.deploy.view.plan_view import SYMBOLS, conflict, run_time, short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from tidepool.deploy.reconcile.plan import Change
    from tidepool.deploy.view.plan_view import PlanView

_STYLES = {Action.CREATE: "green", Action.UPDATE: "yellow", Action.DELETE: "red", Action.CONFLICT: "bold red"}


def show(view: PlanView, out: Console) -> None:
    """Print a plan."""
    from rich.table import Table
    from rich.text import Text

    out.print(f"[bold]{view.environment}[/]: {view.summary}")
    if view.plan.changes:
        grid = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for change in view.plan.changes:
            style = _STYLES[change.action]
            name = Text.assemble((change.resource.name, f"bold {style}"), (view.written(change), "dim"))
            grid.add_row(Text(SYMBOLS[change.action], style), change.resource.kind, name)
            for line in _details(change, view):
                grid.add_row("", "", line)
        out.print(grid)
    for paused in view.paused_lines:
        out.print(Text(paused, "cyan"))
    for note in view.notes:
        out.print(Text(f"note: {note}", "dim"))


def _details(change: Change, view: PlanView) -> list[Text]:
    from rich.text import Text

    lines: list[Text] = []
    if change.action is Action.UPDATE:
        for each in change.differences:
            old, new = (short(each.old, each.field), "red"), (short(each.new, each.field), "green")
            lines.append(Text.assemble(f"{each.field}: ", old, " -> ", new))
    if runs := view.next_runs(change):
        for word, times in (("before", runs.before), ("next", runs.after)):
            if times:
                lines.append(Text(f"{word}: " + ", ".join(run_time(time) for time in times), "dim"))
        lines += [Text(f"warning: {warning}", "magenta") for warning in runs.warnings]
    if change.action is Action.CONFLICT:
        lines.append(Text(conflict(change), "red"))
    return lines
