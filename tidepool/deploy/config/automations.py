"""automations.yaml: what the server holds besides deployments.

Alerts and repairs (Prefect automations), templates of work pools, global concurrency limits and variables. Ownership is
the tag `managed-by:<owner>`; concurrency limits have no tags, so that their names start with `<owner>-`.

An action may say `type: notify`: it becomes a notification through the block `<owner>-notify`, which holds the targets
of the setting TIDEPOOL_NOTIFY_URLS. `deployment: flow/name` stands for the id that Prefect wants.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any
from uuid import NAMESPACE_URL, uuid5

from pydantic import BaseModel, ConfigDict, Field

from tidepool.deploy.config import yaml_source

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from prefect.events.schemas.automations import AutomationCore

FILE = "automations.yaml"
NOTIFY = "notify"
_NOTHING = {"type": "do-nothing"}
# Sets in Prefect's models: their order means nothing.
_SETS = ("expect", "after", "for_each")
_LATER = ("name", "enabled", "tags", "owner_resource")

Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WorkPool(_Strict):
    """A work pool and the file of its base job template."""

    name: str
    type: str
    base_job_template: str


class ConcurrencyLimit(_Strict):
    """A global concurrency limit."""

    name: Name
    limit: int = Field(ge=0)
    slot_decay_per_second: float = Field(default=0.0, ge=0)


class Variable(_Strict):
    """A Prefect variable: any JSON value."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    value: Any


class Automation(_Strict):
    """An automation; trigger and actions as Prefect has them, with `notify` and `deployment` besides."""

    name: Name
    description: str
    trigger: dict[str, Any]
    actions: list[dict[str, Any]] = Field(min_length=1)


class ServerFile(_Strict):
    """The whole of automations.yaml."""

    work_pools: list[WorkPool] = []
    concurrency_limits: list[ConcurrencyLimit] = []
    variables: list[Variable] = []
    automations: list[Automation] = []


def read(repository: Path) -> yaml_source.YamlFile | None:
    """The file with its lines; None where there is none.

    Raises:
        UsageError: it is no YAML.
    """
    path = repository / FILE
    return yaml_source.read(path, FILE) if path.is_file() else None


def load(repository: Path) -> ServerFile:
    """The file's content.

    Raises:
        UsageError: it is no YAML.
        pydantic.ValidationError: it has another shape. `manifest.check` says this with the lines.
    """
    found = read(repository)
    return ServerFile() if found is None or found.data is None else ServerFile.model_validate(found.data)


def owner_tag(owner: str) -> str:
    """The tag that says whose a thing is."""
    return f"managed-by:{owner}"


def notify_block(owner: str) -> str:
    """Name of the block with the notification targets."""
    return f"{owner}-notify"


def stand_in(name: str) -> str:
    """An id in the place of one that only the server knows."""
    return str(uuid5(NAMESPACE_URL, name))


def model(entry: Automation, owner: str, ids: Mapping[str, str]) -> AutomationCore:
    """The automation as Prefect takes it.

    Args:
        entry: As in automations.yaml.
        owner: Whose it is.
        ids: Ids of deployments by `flow/name`, and of the notification block by `notify`; without the latter,
            nobody is told.

    Raises:
        ValueError: Prefect does not take the trigger or an action (a pydantic.ValidationError), or a deployment is
            not among the ids.
    """
    from prefect.events.schemas.automations import AutomationCore

    return AutomationCore.model_validate(
        {
            "name": entry.name,
            "description": entry.description,
            "tags": [owner_tag(owner)],
            "trigger": entry.trigger,
            "actions": [_action(action, ids) for action in entry.actions],
        }
    )


def deployments_of(entry: Automation) -> list[str]:
    """The deployments that its actions name."""
    return [str(action["deployment"]) for action in entry.actions if "deployment" in action]


def fields(entry: Automation, owner: str, *, notified: bool) -> dict[str, Any]:
    """The normal form of an automation in Git.

    Args:
        entry: As in automations.yaml.
        owner: Whose it is.
        notified: There is somebody to notify.
    """
    names = {stand_in(name): name for name in [*deployments_of(entry), NOTIFY]}
    ids = {name: key for key, name in names.items() if notified or name != NOTIFY}
    return normal(model(entry, owner, ids).model_dump(mode="json"), names)


def normal(automation: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The normal form of an automation, as Prefect's API writes it.

    Args:
        automation: The JSON object.
        names: What each id is called.
    """
    from prefect.events.schemas.automations import AutomationCore

    core = AutomationCore.model_validate(automation).model_dump(mode="json", exclude=set(_LATER))
    return {**{key: _normal(value, names) for key, value in core.items()}, "tags": sorted(automation["tags"])}


def _normal(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            key: sorted(item, key=str) if key in _SETS else _normal(item, names)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        return [_normal(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def _action(action: Mapping[str, Any], ids: Mapping[str, str]) -> dict[str, Any]:
    if action.get("type") == NOTIFY:
        if NOTIFY not in ids:
            return dict(_NOTHING)
        return {**action, "type": "send-notification", "block_document_id": ids[NOTIFY]}
    if "deployment" in action:
        name = action["deployment"]
        if name not in ids:
            raise ValueError(f"deployment {name!r} does not exist; known: {', '.join(sorted(set(ids) - {NOTIFY}))}")
        rest = {key: value for key, value in action.items() if key != "deployment"}
        return {"source": "selected", **rest, "deployment_id": ids[name]}
    return dict(action)


def template(repository: Path, pool: WorkPool) -> dict[str, Any]:
    """A work pool's base job template.

    Raises:
        OSError: there is no such file.
        ValueError: it is no JSON object.
    """
    content = json.loads((repository / pool.base_job_template).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it must be a JSON object")  # noqa: TRY004 - of the file, not of an argument
    return content
