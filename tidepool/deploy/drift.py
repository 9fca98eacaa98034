"""Drift: differences between Git and the server, and since when; and the expiry of pauses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidepool.deploy import pauses
from tidepool.deploy.reconcile.actual import read_pauses
from tidepool.deploy.reconcile.comparison import compare
from tidepool.deploy.view import markdown
from tidepool.deploy.view.plan_view import PlanView
from tidepool.settings import repository, settings

if TYPE_CHECKING:
    from datetime import datetime

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.reconcile.actual import Pause


@dataclass(frozen=True)
class Drift:
    """Drift of an environment.

    Attributes:
        view: The differences: "before" is the server, "after" is Git.
        resumed: Pauses that have just expired.
        overdue: Expired pauses that the server does not let this process end: a flow run with a restricted API.
    """

    view: PlanView
    resumed: tuple[Pause, ...]
    overdue: tuple[Pause, ...] = ()

    def __bool__(self) -> bool:
        """Return True if a resource differs from Git, or a pause is overdue. Another pause is recorded or listed."""
        return bool(self.view.plan or self.overdue)

    @property
    def summary(self) -> str:
        """One line for a list of artifacts or a phone."""
        plan = self.view.plan
        parts = [f"{len(plan.changes)} differ from Git" if plan else "as in Git"]
        if paused := len(self.view.paused_lines):
            parts.append(f"{paused} paused")
        if self.resumed:
            parts.append(f"{len(self.resumed)} resumed, as their pause expired")
        if self.overdue:
            parts.append(f"{len(self.overdue)} to resume, as their pause expired")
        return f"{self.view.environment}: {', '.join(parts)}"

    def markdown(self) -> str:
        """Return the report: differences, pauses, and resumed deployments."""
        lines = [f"# Drift of {self.view.environment}", "", f"**{self.summary}**", ""]
        if self.view.plan:
            lines += ["| | resource | field | on the server | in Git | since |", "|---|---|---|---|---|---|"]
            lines += [*markdown.drift_rows(self.view), ""]
            lines += ["`tidepool apply` brings the server to the state in Git. To keep a difference, commit it.", ""]
        lines += [f"- {line}" for line in self.view.paused_lines]
        lines += [
            f"- resumed {each.deployment}: {each.by} paused it until {each.until:%Y-%m-%d %H:%M %Z} ({each.reason})"
            for each in self.resumed
        ]
        lines += [
            f"- {each.deployment} is still paused: {each.by} paused it until {each.until:%Y-%m-%d %H:%M %Z} "
            f"({each.reason}). A flow run may not resume it: run `tidepool drift --end-pauses`."
            for each in self.overdue
        ]
        return "\n".join(lines).rstrip() + "\n"


def find(client: SyncPrefectClient, environment: str, *, now: datetime, end_pauses: bool = False) -> Drift:
    """Find the drift between this repository and the server. The files have been checked when the image was built.

    Args:
        client: A client of the server.
        environment: production, or the name of an overlay.
        now: The current time.
        end_pauses: Resume deployments whose pause has expired.
    """
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    deploy = settings().deploy
    resumed: list[Pause] = []
    overdue: list[Pause] = []
    try:
        resumed = pauses.expire(client, deploy.owner, now) if end_pauses else []
    except PrefectHTTPStatusError as error:
        if error.response.status_code != httpx.codes.FORBIDDEN:
            raise
        overdue = pauses.overdue(client, deploy.owner, now)
    found = compare(client, repository(), environment, deploy.owner)
    recorded = read_pauses(client, deploy.owner)
    view = PlanView(found.plan, environment, now, deploy.runs_per_hour, found.notes, recorded)
    return Drift(view, tuple(resumed), tuple(overdue))
