"""Drift: what differs between Git and the server, and since when; and the end of pauses whose time is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidepool.deploy import pauses
from tidepool.deploy.reconcile import comparison
from tidepool.deploy.view import table

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from prefect.client.orchestration import SyncPrefectClient


@dataclass(frozen=True)
class Drift:
    """What was found.

    Attributes:
        view: The differences: "before" is the server, "after" is Git.
        resumed: Pauses that ended now.
    """

    view: table.View
    resumed: tuple[pauses.Pause, ...]

    def __bool__(self) -> bool:
        """Something differs from Git. A pause is no drift: it is on record or the plan names it."""
        return bool(self.view.plan)

    @property
    def summary(self) -> str:
        """One line for a list of artifacts or a phone."""
        found = self.view.plan
        parts = [f"{len(found.changes)} differ from Git" if found else "as in Git"]
        if found.paused:
            parts.append(f"{len(found.paused)} paused")
        if self.resumed:
            parts.append(f"{len(self.resumed)} resumed, their time was over")
        return f"{self.view.environment}: {', '.join(parts)}"


def find(
    client: SyncPrefectClient,
    repository: Path,
    environment: str,
    owner: str,
    *,
    now: datetime,
    runs_per_hour: int,
    end_pauses: bool = False,
) -> Drift:
    """Looks for drift.

    Args:
        client: A client of the server.
        repository: The folder that holds prefect.yaml.
        environment: What the server should be like.
        owner: Whose the things are.
        now: The time.
        runs_per_hour: As for a plan.
        end_pauses: Resume what was paused until now.
    """
    resumed = pauses.expire(client, owner, now) if end_pauses else []
    found = comparison.look(client, repository, environment, owner, checked=True)
    view = table.view(
        found.plan, environment, now, runs_per_hour, notes=found.notes, pauses=pauses.recorded(client, owner)
    )
    return Drift(view=view, resumed=tuple(resumed))


def markdown(found: Drift) -> str:
    """The report: what differs, what is paused, what was resumed."""
    lines = [f"# Drift of {found.view.environment}", "", f"**{found.summary}**", ""]
    if found:
        lines += ["| | what | field | on the server | in Git | since |", "|---|---|---|---|---|---|"]
        lines += table.drift_rows(found.view)
        lines.append("")
        lines += ["`tidepool apply` makes the server as Git wants it. To keep what is there, put it into Git.", ""]
    lines += [f"- {line}" for line in table.paused_lines(found.view)]
    lines += [
        f"- resumed {each.deployment}: {each.by} paused it until {each.until:%Y-%m-%d %H:%M %Z} ({each.reason})"
        for each in found.resumed
    ]
    return "\n".join(lines).rstrip() + "\n"
