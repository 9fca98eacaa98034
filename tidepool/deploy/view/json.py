"""A plan as one JSON object, for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tidepool.deploy.view.plan_view import visible

if TYPE_CHECKING:
    from tidepool.deploy.reconcile.plan import ActualResource, Change
    from tidepool.deploy.view.plan_view import PlanView


def render(view: PlanView) -> str:
    """Return a plan as one JSON object."""
    return json.dumps(
        {
            "environment": view.environment,
            "time": view.now.isoformat(timespec="seconds"),
            "changes": [_change(each, view) for each in view.plan.changes],
            "unchanged": [{"kind": each.kind, "name": each.name} for each in view.plan.unchanged],
            "paused": [{"kind": each.kind, "name": each.name, **_pause(each, view)} for each in view.plan.paused],
            "notes": view.notes,
        },
        indent=2,
    )


def _change(change: Change, view: PlanView) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "action": change.action,
        "kind": change.resource.kind,
        "name": change.resource.name,
        "since": change.actual.updated.isoformat() if change.actual else None,
        "fields": [
            {"field": each.field, "old": visible(each.old, each.field), "new": visible(each.new, each.field)}
            for each in change.differences
        ],
    }
    if runs := view.next_runs(change):
        times = {"before": runs.before, "after": runs.after}
        shown["fires"] = {key: [each.isoformat() for each in value] for key, value in times.items()}
        shown["warnings"] = runs.warnings
    return shown


def _pause(resource: ActualResource, view: PlanView) -> dict[str, Any]:
    if pause := view.pause_of(resource):
        return {"since": pause.at.isoformat(), "by": pause.by, "reason": pause.reason, "until": pause.until.isoformat()}
    return {"since": resource.updated.isoformat()}
