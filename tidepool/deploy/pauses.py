"""Pauses with a reason and an end. Each is recorded in a Prefect variable, which a deploy leaves alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tidepool.deploy.config import automations
from tidepool.deploy.reconcile import actual
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_RELATIVE = re.compile(r"\+?(\d+)\s*(m|min|h|d|w)")
_UNITS = {"m": "minutes", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Pause:
    """Who paused a deployment, why, and until when.

    Attributes:
        deployment: `flow/deployment`.
        by: A person.
        reason: In their words.
        at: When it began.
        until: When it ends; the drift job resumes the deployment then.
    """

    deployment: str
    by: str
    reason: str
    at: datetime
    until: datetime


def parse_until(text: str, now: datetime) -> datetime:
    """The end of a pause: `4h`, `30min`, `2d`, or a date and time in ISO 8601; UTC, where it names no offset.

    Raises:
        UsageError: it is neither, or not in the future.
    """
    if match := _RELATIVE.fullmatch(text.strip()):
        return now + timedelta(**{_UNITS[match[2]]: int(match[1])})
    try:
        until = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--until {text!r} is no time: write 4h, 30min, 2d, or 2026-11-30T09:00+01:00") from None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    if until <= now:
        raise UsageError(f"--until {text!r} is over: it must be after {now:%Y-%m-%d %H:%M %Z}")
    return until


def find(client: SyncPrefectClient, name: str, owner: str) -> tuple[str, dict[str, Any]]:
    """A deployment of ours by `name` or `flow/name`, as the API has it.

    Raises:
        UsageError: there is none, or more than one.
    """
    tag = automations.owner_tag(owner)
    ours = {key: each for key, each in actual.read_deployments(client, tag, []).items() if tag in each["tags"]}
    found = [key for key in ours if name in (key, key.split("/", 1)[1])]
    if len(found) != 1:
        hint = f"which of {', '.join(sorted(found))}?" if found else f"known: {', '.join(sorted(ours)) or 'none'}"
        raise UsageError(f"deployment {name!r} is {'ambiguous' if found else 'not on the server'}: {hint}")
    return found[0], ours[found[0]]


def pause(client: SyncPrefectClient, wanted: Pause, owner: str) -> None:
    """Records a pause, and pauses the deployment.

    Raises:
        UsageError: there is no such deployment.
    """
    name, deployment = find(client, wanted.deployment, owner)
    value = {
        "deployment": name,
        "by": wanted.by,
        "reason": wanted.reason,
        "at": wanted.at.isoformat(timespec="seconds"),
        "until": wanted.until.isoformat(timespec="seconds"),
    }
    _write(client, _variable(name, owner), value, owner)
    client.pause_deployment(deployment["id"])


def resume(client: SyncPrefectClient, name: str, owner: str) -> str:
    """Resumes a deployment and all its schedules, and forgets the pause.

    Returns:
        `flow/deployment`.

    Raises:
        UsageError: there is no such deployment.
    """
    full, deployment = find(client, name, owner)
    client.resume_deployment(deployment["id"])
    for schedule in deployment["schedules"]:
        if not schedule["active"]:
            client.request(
                "PATCH",
                "/deployments/{id}/schedules/{schedule_id}",
                path_params={"id": deployment["id"], "schedule_id": schedule["id"]},
                json={"active": True},
            )
    _forget(client, full, owner)
    return full


def recorded(client: SyncPrefectClient, owner: str) -> list[Pause]:
    """The pauses on record, soonest end first."""
    tag = automations.owner_tag(owner)
    found = [
        Pause(
            deployment=each["value"]["deployment"],
            by=each["value"]["by"],
            reason=each["value"]["reason"],
            at=datetime.fromisoformat(each["value"]["at"]),
            until=datetime.fromisoformat(each["value"]["until"]),
        )
        for each in actual.pages(client, "/variables/filter", {})
        if {actual.PAUSE_TAG, tag} <= set(each["tags"])
    ]
    return sorted(found, key=lambda each: each.until)


def expire(client: SyncPrefectClient, owner: str, now: datetime) -> list[Pause]:
    """Resumes what was paused until now, and forgets pauses that somebody ended by hand.

    Returns:
        The pauses that ended because their time had come.
    """
    tag = automations.owner_tag(owner)
    there = actual.read_deployments(client, tag, [])
    ended = []
    for each in recorded(client, owner):
        deployment = there.get(each.deployment)
        if deployment is None or not is_paused(deployment):
            _forget(client, each.deployment, owner)
        elif each.until <= now:
            resume(client, each.deployment, owner)
            ended.append(each)
    return ended


def is_paused(deployment: dict[str, Any]) -> bool:
    """Nothing of it is scheduled, because somebody paused it or all its schedules."""
    schedules = deployment["schedules"]
    return bool(deployment["paused"]) or (bool(schedules) and not any(each["active"] for each in schedules))


def _variable(deployment: str, owner: str) -> str:
    return f"{owner}-pause-{re.sub('[^a-z0-9]+', '-', deployment.lower())}"


def _write(client: SyncPrefectClient, name: str, value: dict[str, str], owner: str) -> None:
    from prefect.client.schemas.actions import VariableCreate, VariableUpdate

    tags = [automations.owner_tag(owner), actual.PAUSE_TAG]
    if client.read_variable_by_name(name) is None:
        client.create_variable(VariableCreate(name=name, value=value, tags=tags))
    else:
        client.update_variable(VariableUpdate(name=name, value=value, tags=tags))


def _forget(client: SyncPrefectClient, deployment: str, owner: str) -> None:
    from prefect.exceptions import ObjectNotFound

    try:
        client.delete_variable_by_name(_variable(deployment, owner))
    except ObjectNotFound:
        return
