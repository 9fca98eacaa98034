"""Schedules without a next flow run, as the alerts SchedulerStopped and NothingScheduled see them. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from tidepool.operate.status.picture import Finding

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

Json = dict[str, Any]

# Of the deployments with active schedules: if more than that have no next run, it is not a matter of one schedule.
STOPPED_SHARE = 0.5
# Prefect's scheduler creates the runs of a new schedule within seconds, and those of all within a minute.
_NEW = timedelta(minutes=2)


def scheduled(deployments: Iterable[Json], now: datetime) -> dict[str, str]:
    """Return the names of the deployments that should have a next flow run, by id.

    Args:
        deployments: Deployments that are not paused.
        now: The time.
    """
    return {
        each["id"]: each["name"]
        for each in deployments
        if any(one["active"] for one in each["schedules"]) and now > datetime.fromisoformat(each["updated"]) + _NEW
    }


def without_next_run(names: dict[str, str], missing: Collection[str]) -> list[Finding]:
    """Return the deployments without a next flow run; if they are many, that Prefect's scheduler does not run.

    Args:
        names: The deployments that should have one, as of `scheduled`.
        missing: Ids of those that have none.
    """
    share = len(missing) / len(names) if names else 0.0
    if share > STOPPED_SHARE:
        # As Prometheus writes a share, and with the words of the alert.
        text = f"{100 * share:.4g}% of the active schedules have no next flow run: Prefect's scheduler does not run"
        return [Finding("scheduler", "server", text, "TidepoolSchedulerStopped.md")]
    text, runbook = "it has an active schedule and no next flow run", "TidepoolNothingScheduled.md"
    return [Finding("unscheduled", names[each], text, runbook) for each in sorted(missing, key=names.__getitem__)]
