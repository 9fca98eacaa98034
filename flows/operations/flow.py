"""drift-report: report the drift between Git and the server, and end pauses that have expired or report them.

Produces: the artifact `drift-report`, whose page is the history, and the event `tidepool.drift.found` when something
differs; the automation `drift-found` turns it into a notification.
Deployment: `drift-report`, every hour (prefect.yaml).
Idempotent: it only reads, and resumes what is due.
Requires: prefect.yaml, automations.yaml and environments/ in the current folder, as in the image.
Runbook: docs/runbooks/drift-report.md
"""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from tidepool import report

NAME = "drift-report"
EVENT = "tidepool.drift.found"
# Enough for a message on a phone; the rest is in the artifact.
_MESSAGE_CHARACTERS = 1500


@flow(name=NAME, flow_run_name=report.run_name("drift of {environment}"), timeout_seconds=600)
def drift_report(
    environment: Annotated[str, Field(min_length=1)] = "production", end_pauses: bool = True
) -> dict[str, Any]:
    """Report the drift between Git and the server.

    Args:
        environment: The desired state: production, or a name in environments/.
        end_pauses: Resume deployments whose pause, by tidepool pause, has expired.

    Returns:
        `differences`, `paused` and `resumed`, as counts.
    """
    return find_drift(environment, end_pauses=end_pauses)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=30)  # the server may be restarting
def find_drift(environment: str, *, end_pauses: bool) -> dict[str, Any]:
    """Compare desired and actual state, publish the report, and emit an event when they differ."""
    from datetime import UTC, datetime

    from prefect.events import emit_event

    from tidepool.deploy import drift
    from tidepool.deploy.client import connect

    log = get_run_logger()
    with connect(retries=5) as client:
        found = drift.find(client, environment, now=datetime.now(UTC), end_pauses=end_pauses)
    text = found.markdown()
    report.page(NAME, text.encode()[: report.LIMIT_BYTES].decode(errors="ignore"), found.summary)
    log.info("%s", found.summary)
    if found:
        emit_event(
            EVENT,
            resource={
                "prefect.resource.id": f"tidepool.environment.{environment}",
                "prefect.resource.name": environment,
            },
            payload={"summary": found.summary, "report": text[:_MESSAGE_CHARACTERS]},
        )
    return {
        "differences": len(found.view.plan.changes),
        "paused": len(found.view.plan.paused),
        "resumed": len(found.resumed),
    }
