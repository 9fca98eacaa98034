"""Pauses of deployments with a reason and an end, each recorded in a Prefect variable, which a deploy leaves alone."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tidepool.deploy.client import set_schedules_active
from tidepool.deploy.config import automations
from tidepool.deploy.reconcile.actual import PAUSE_TAG, Pause, read_deployments, read_pauses
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.client import Json

_RELATIVE = re.compile(r"\+?(\d+)\s*(m|min|h|d|w)")
_UNITS = {"m": "minutes", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_until(text: str, now: datetime) -> datetime:
    """Return the end of a pause.

    Args:
        text: `4h`, `30min`, `2d`, or a date and time in ISO 8601; in UTC if it has no offset.
        now: Start of the pause.

    Raises:
        UsageError: it is neither, or not in the future.
    """
    if match := _RELATIVE.fullmatch(text.strip()):
        try:
            return now + timedelta(**{_UNITS[match[2]]: int(match[1])})
        except OverflowError:
            raise UsageError(f"--until {text!r} is beyond the year 9999; use 4h, 30min, 2d") from None
    try:
        until = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--until {text!r} is not a time; use 4h, 30min, 2d, or 2026-11-30T09:00+01:00") from None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    if until <= now:
        raise UsageError(f"--until {text!r} is in the past; use a time after {now:%Y-%m-%d %H:%M %Z}")
    return until


def find(client: SyncPrefectClient, name: str, owner: str) -> tuple[str, Json]:
    """Return the full name of a managed deployment, and the deployment as the API returns it.

    Args:
        client: A client of the server.
        name: `deployment` or `flow/deployment`.
        owner: Owner of the managed resources.

    Raises:
        UsageError: none or several have that name.
    """
    managed = read_deployments(client, automations.owner_tag(owner), [])
    found = [key for key in managed if name in (key, key.split("/", 1)[1])]
    if not found:
        raise UsageError(f"deployment {name!r} is not on the server; managed: {', '.join(sorted(managed)) or 'none'}")
    if len(found) > 1:
        raise UsageError(f"deployment {name!r} is ambiguous: use one of {', '.join(sorted(found))}")
    return found[0], managed[found[0]]


def pause(client: SyncPrefectClient, wanted: Pause, owner: str) -> None:
    """Record a pause, and pause the deployment.

    Raises:
        UsageError: the deployment does not exist.
    """
    from prefect.variables import Variable

    name, deployment = find(client, wanted.deployment, owner)
    value = wanted.model_copy(update={"deployment": name}).model_dump(mode="json")
    Variable.set(_variable(name, owner), value, tags=[automations.owner_tag(owner), PAUSE_TAG], overwrite=True)
    client.pause_deployment(deployment["id"])


def resume(client: SyncPrefectClient, name: str, owner: str) -> str:
    """Resume a deployment and all its schedules, and delete the record of the pause.

    Returns:
        `flow/deployment`.

    Raises:
        UsageError: the deployment does not exist.
    """
    full_name, deployment = find(client, name, owner)
    client.resume_deployment(deployment["id"])
    set_schedules_active(client, deployment, active=True)
    _forget(client, full_name, owner)
    return full_name


def expire(client: SyncPrefectClient, owner: str, now: datetime) -> list[Pause]:
    """Resume deployments whose pause has expired, and delete records of pauses that were ended by hand.

    Returns:
        The pauses that have expired.
    """
    there = read_deployments(client, automations.owner_tag(owner), [])
    expired = []
    for each in read_pauses(client, owner):
        deployment = there.get(each.deployment)
        if deployment is None or not is_paused(deployment):
            _forget(client, each.deployment, owner)
        elif each.until <= now:
            resume(client, each.deployment, owner)
            expired.append(each)
    return expired


def overdue(client: SyncPrefectClient, owner: str, now: datetime) -> list[Pause]:
    """Return the pauses that have expired, but whose deployment is still paused."""
    there = read_deployments(client, automations.owner_tag(owner), [])
    found = [each for each in read_pauses(client, owner) if each.until <= now]
    return [each for each in found if each.deployment in there and is_paused(there[each.deployment])]


def is_paused(deployment: Json) -> bool:
    """Return True if a deployment or all its schedules are paused, so that none of its runs is scheduled."""
    schedules = deployment["schedules"]
    return bool(deployment["paused"]) or (bool(schedules) and not any(each["active"] for each in schedules))


def _variable(deployment: str, owner: str) -> str:
    return f"{owner}-pause-{re.sub('[^a-z0-9]+', '-', deployment.lower())}"


def _forget(client: SyncPrefectClient, deployment: str, owner: str) -> None:
    from prefect.exceptions import ObjectNotFound

    with suppress(ObjectNotFound):
        client.delete_variable_by_name(_variable(deployment, owner))
