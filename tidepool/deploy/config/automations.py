"""automations.yaml: the managed resources of the server besides deployments.

Alerts and repairs (Prefect automations), templates of work pools, global concurrency limits and variables. The tag
`managed-by:<owner>` marks them as managed; concurrency limits have no tags, so their names start with `<owner>-`.

An action of `type: notify` becomes a notification through the block `<owner>-notify`, which holds the targets of the
setting TIDEPOOL_NOTIFY_URLS. `deployment: flow/name` stands for the id that Prefect requires. In texts, the path of a
runbook gets the address TIDEPOOL_REPOSITORY_URL before it.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import NAMESPACE_URL, uuid5

from pydantic import BaseModel, RootModel, ValidationError

from tidepool.deploy.config import models, yaml_source
from tidepool.deploy.config.models import Automation, ServerFile, WorkPool
from tidepool.deploy.config.yaml_source import InvalidFileError, Problem, place_in
from tidepool.errors import UsageError, did_you_mean, reason
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from prefect.events.schemas.automations import AutomationCore

    from tidepool.deploy.config.yaml_lines import Finding, Place
    from tidepool.deploy.config.yaml_source import YamlFile

FILE = "automations.yaml"
NOTIFY = "notify"
# Sets in Prefect's models: their order has no meaning.
_SETS = ("expect", "after", "for_each")
_NOT_COMPARED = {"name", "enabled", "tags", "owner_resource"}
_RUNBOOKS = "docs/runbooks/"


def load(repository: Path) -> ServerFile:
    """Return the file's content; empty if the repository does not have the file.

    Raises:
        UsageError: the file is not valid YAML.
        pydantic.ValidationError: it does not fit the models. `check` reports this with the lines.
    """
    file = _read(repository)
    return ServerFile() if file.data is None else ServerFile.model_validate(file.data)


class Names:
    """The deployments in Git that an automation may name: `flow/name`.

    Attributes:
        known: Those whose flow could be imported.
        unresolved: Names, without the flow, of the others.
    """

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.unresolved: set[str] = set()

    def resolve(self, flow: str, name: str) -> None:
        """Record the flow of a deployment."""
        self.known.add(f"{flow}/{name}")
        self.unresolved.discard(name)


def variables(repository: Path) -> frozenset[str]:
    """Return the names of the Prefect variables in the file; empty if it is not valid, which `check` reports."""
    try:
        return frozenset(each.name for each in load(repository).variables)
    except (UsageError, ValueError):
        return frozenset()


def check(repository: Path, owner: str, names: Names | None, *, runbooks: bool) -> list[Problem]:
    """Return all problems of the file; of its automations only if the deployments in Git are known.

    With `runbooks`, each automation has to have one.
    """
    try:
        file = _read(repository)
    except InvalidFileError as error:
        return [error.problem]
    if file.data is None:
        return []
    # What has the wrong form is not looked at again; it hides nothing of the others.
    content = _Entries(file.data)
    found = [*models.problems(ServerFile, file), *_problems(repository, owner, file, content)]
    if names is not None:
        listed = {
            str(action["deployment"])
            for _, each in content.automations
            for action in each.actions
            if "deployment" in action
        }
        unresolved = {name for name in listed if name.rpartition("/")[2] in names.unresolved}
        ids = {name: _stand_in(name) for name in [*names.known, *unresolved, NOTIFY]}
        for index, entry in content.automations:
            for place, message in _entry_problems(owner, entry, ids):
                found.append(file.problem(("automations", index, *place), message))
            runbook = f"docs/runbooks/{entry.name}.md"
            # The image has the files that a deploy needs, and no documentation.
            if runbooks and (repository / "docs").is_dir() and not (repository / runbook).is_file():
                found.append(file.problem(("automations", index, "name"), f"the runbook {runbook} does not exist"))
    return found


class _Entries:
    """The entries of the file that have the form of their models, with their positions."""

    def __init__(self, data: Any) -> None:
        self.work_pools = _valid(data, "work_pools", WorkPool)
        self.concurrency_limits = _valid(data, "concurrency_limits", models.ConcurrencyLimit)
        self.variables = _valid(data, "variables", models.Variable)
        self.automations = _valid(data, "automations", Automation)


_Entry = TypeVar("_Entry", bound=BaseModel)


def _valid(data: Any, key: str, kind: type[_Entry]) -> list[tuple[int, _Entry]]:
    listed = data.get(key) if isinstance(data, dict) else None
    found = []
    for index, each in enumerate(listed if isinstance(listed, list) else []):
        with suppress(ValidationError):
            found.append((index, kind.model_validate(each)))
    return found


def _problems(repository: Path, owner: str, file: YamlFile, content: _Entries) -> Iterator[Problem]:
    """Yield the problems that do not depend on the deployments."""
    for key in ServerFile.model_fields:
        seen: set[str] = set()
        for index, each in getattr(content, key):
            if each.name in seen:
                yield file.problem((key, index), "duplicate name")
            seen.add(each.name)
    for index, limit in content.concurrency_limits:
        if not limit.name.startswith(f"{owner}-"):
            message = f"the name must start with {owner}-, which marks it as managed: a limit has no tags"
            yield file.problem(("concurrency_limits", index, "name"), message)
    templates: dict[str, Any] = {}
    for _, pool in content.work_pools:
        try:
            templates[pool.name] = template(repository, pool)
        except (OSError, ValueError) as error:
            found = error.strerror if isinstance(error, OSError) else error
            yield Problem(pool.base_job_template, 1, "", f"template of work pool {pool.name}: {found}")
    for place, message in _refused_by_the_server(content, templates):
        yield file.problem(place, message)


def _refused_by_the_server(content: _Entries, templates: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what cannot be sent to the server, and what its models of the requests refuse."""
    from prefect.server.schemas.actions import ConcurrencyLimitV2Create, VariableCreate, WorkPoolCreate

    requests: list[tuple[Place, type[BaseModel], dict[str, Any]]] = [
        (("variables", index, "value"), VariableCreate, each.model_dump()) for index, each in content.variables
    ]
    requests += [
        (("concurrency_limits", index), ConcurrencyLimitV2Create, each.model_dump())
        for index, each in content.concurrency_limits
    ]
    requests += [
        (
            ("work_pools", index, "base_job_template"),
            WorkPoolCreate,
            {"name": each.name, "type": each.type, "base_job_template": templates[each.name]},
        )
        for index, each in content.work_pools
        if each.name in templates
    ]
    for place, request, body in requests:
        try:
            request.model_validate_json(json.dumps(body, allow_nan=False))
        except ValidationError as error:
            yield place, f"the server refuses it: {reason(error.errors()[0], show_input=False)}"
        except (TypeError, ValueError):
            yield place, "it has a value that is not one of JSON, such as a date without quotes"


def _read(repository: Path) -> YamlFile:
    path = repository / FILE
    return yaml_source.read(path, FILE) if path.is_file() else yaml_source.YamlFile(FILE, data=None)


def _entry_problems(owner: str, entry: Automation, ids: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the problems of an automation: Prefect refuses it, or a deployment does not exist."""
    try:
        core = model(entry, owner, ids)
    except ValidationError as error:
        first = error.errors()[0]
        yield place_in(entry.model_dump(), first["loc"]), reason(first, show_input=False)
    except ValueError as error:
        yield ("actions",), str(error)
    else:
        yield from _unknown_keys(entry.trigger, core.trigger, ("trigger",))
        for position, (raw, action) in enumerate(zip(entry.actions, core.actions, strict=True)):
            rest = {key: value for key, value in raw.items() if key != "deployment"}
            yield from _unknown_keys(rest, action, ("actions", position))


def _unknown_keys(raw: Any, model: Any, place: Place) -> Iterator[Finding]:
    """Yield the keys that a Prefect model has ignored."""
    if isinstance(raw, dict) and isinstance(model, BaseModel) and not isinstance(model, RootModel):
        known = list(type(model).model_fields)
        for key, value in raw.items():
            if key not in known:
                yield (*place, key), f"unknown key{did_you_mean(str(key), known)}"
            else:
                yield from _unknown_keys(value, getattr(model, key), (*place, key))
    elif isinstance(raw, list) and isinstance(model, list):
        for index, (left, right) in enumerate(zip(raw, model, strict=False)):
            yield from _unknown_keys(left, right, (*place, index))


def owner_tag(owner: str) -> str:
    """Return the tag that marks a resource as managed by this owner."""
    return f"managed-by:{owner}"


def notify_block(owner: str) -> str:
    """Return the name of the block with the notification targets."""
    return f"{owner}-notify"


def _stand_in(name: str) -> str:
    """Return an id that stands for one that only the server knows."""
    return str(uuid5(NAMESPACE_URL, name))


def model(entry: Automation, owner: str, ids: Mapping[str, str]) -> AutomationCore:
    """Return the automation as Prefect's model.

    The ids are those of deployments by `flow/name`, and of the notification block by `notify`; without the latter, no
    notification is sent.

    Raises:
        ValueError: Prefect refuses the trigger or an action (a pydantic.ValidationError), or a deployment is not
            among the ids.
    """
    from prefect.events.schemas.automations import AutomationCore

    return AutomationCore.model_validate(
        {
            "name": entry.name,
            "description": _linked(entry.description),
            "tags": [owner_tag(owner)],
            "trigger": entry.trigger,
            "actions": [_action(action, ids) for action in entry.actions],
        }
    )


def _linked(text: str) -> str:
    """Return a text with the address of the repository's files before the path of a runbook, if it is known."""
    base = settings().repository.url.rstrip("/")
    return re.sub(rf"(?<![\w/]){_RUNBOOKS}", f"{base}/{_RUNBOOKS}", text) if base else text


def fields(entry: Automation, owner: str, *, notified: bool) -> dict[str, Any]:
    """Return the normal form of an automation in Git; `notified` if there is a block with notification targets."""
    deployments = [str(action["deployment"]) for action in entry.actions if "deployment" in action]
    ids = {name: _stand_in(name) for name in [*deployments, *([NOTIFY] if notified else [])]}
    return normal(model(entry, owner, ids).model_dump(mode="json"), {key: name for name, key in ids.items()})


def normal(automation: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the normal form of an automation that is as Prefect's API returns it, by the name of each id."""
    from prefect.events.schemas.automations import AutomationCore

    core = AutomationCore.model_validate(automation).model_dump(mode="json", exclude=_NOT_COMPARED)
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
    if not isinstance(value, str):
        return value
    if not settings().repository.url:  # then it is not compared
        value = re.sub(rf"https?://\S+/(?={_RUNBOOKS})", "", value)
    return names.get(value, value)


def _action(action: Mapping[str, Any], ids: Mapping[str, str]) -> dict[str, Any]:
    if action.get("type") == NOTIFY:
        if NOTIFY not in ids:
            return {"type": "do-nothing"}
        texts = {key: _linked(value) if isinstance(value, str) else value for key, value in action.items()}
        return {**texts, "type": "send-notification", "block_document_id": ids[NOTIFY]}
    if "deployment" in action:
        name = str(action["deployment"])
        if name not in ids:
            raise ValueError(f"unknown deployment {name!r}{did_you_mean(name, sorted(set(ids) - {NOTIFY}))}")
        rest = {key: value for key, value in action.items() if key != "deployment"}
        return {"source": "selected", **rest, "deployment_id": ids[name]}
    return dict(action)


def template(repository: Path, pool: WorkPool) -> dict[str, Any]:
    """Read a work pool's base job template.

    Raises:
        OSError: the file does not exist.
        ValueError: it is not a JSON object, or its `variables` are not a JSON schema.
    """
    from jsonschema import Draft202012Validator, SchemaError

    content = json.loads((repository / pool.base_job_template).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it must be a JSON object")  # noqa: TRY004 - of the file, not of an argument
    try:
        Draft202012Validator.check_schema(content.get("variables", {}))
    except SchemaError as error:
        where = ".".join(["variables", *(str(part) for part in error.absolute_path)])
        raise ValueError(f"{where} is not a JSON schema: {error.message}") from None
    return content
