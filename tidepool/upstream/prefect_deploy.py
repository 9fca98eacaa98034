"""Private parts of Prefect that `prefect deploy` turns an entry of prefect.yaml into a request with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.cli.deploy._models import RawScheduleConfig
from prefect.cli.deploy._schedules import _schedule_config_to_deployment_schedule
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.server.schemas import actions

if TYPE_CHECKING:
    from collections.abc import Mapping


def stored_schedule(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the server stores for a schedule of prefect.yaml, after the models of command, client and server.

    Why: each of them completes a schedule: the command takes an anchor date without offset for UTC, and the server
    puts a DTSTART before an rrule. A plan that compares anything else never converges.
    Watch: `prefect.cli.deploy._schedules`.
    Delete when: `prefect deploy` has a dry run, or a public function for a schedule's entry.

    Raises:
        ValueError: one of them refuses it (most often a pydantic.ValidationError).
    """
    read = RawScheduleConfig.model_validate(dict(entry)).model_dump(exclude_unset=True, mode="json")
    sent = DeploymentScheduleCreate(**_schedule_config_to_deployment_schedule(read)).model_dump(mode="json")
    stored = actions.DeploymentScheduleCreate.model_validate(sent).schedule
    return stored.model_dump(mode="json")
