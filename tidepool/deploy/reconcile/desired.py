"""What Git wants on the server, in the normal form that is compared: prefect.yaml and automations.yaml."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from tidepool.deploy.config import automations, environments, schedules
from tidepool.deploy.reconcile.plan import UNKNOWN, Kind, Masked, Thing
from tidepool.errors import UsageError
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from prefect import Flow

PLACEHOLDER = re.compile(r"{{\s*([\w.\-\[\]$]+)\s*}}")
_RUN_TIME = "ctx."  # filled in by the worker when a run starts: part of the value
DEFAULT_QUEUE = "default"


@dataclass(frozen=True)
class Desired:
    """What Git wants.

    Attributes:
        things: All of it, in normal form.
        manifest: The prefect file of the environment.
        configs: Each deployment's part of it, by `flow/deployment`.
        server_file: automations.yaml.
        templates: Base job template of each work pool.
        unset: Environment variables that the prefect file asks for and that are not set.
    """

    things: tuple[Thing, ...]
    manifest: Mapping[str, Any]
    configs: Mapping[str, dict[str, Any]]
    server_file: automations.ServerFile
    templates: Mapping[str, dict[str, Any]]
    unset: tuple[str, ...]

    def with_automations(self, owner: str, *, block: bool) -> list[Thing]:
        """All things, automations too: whether they tell somebody depends on the server.

        Args:
            owner: Whose the things are.
            block: The server has a block with notification targets.
        """
        notified = block or any(thing.kind is Kind.NOTIFICATION for thing in self.things)
        return [
            *self.things,
            *(
                Thing(kind=Kind.AUTOMATION, name=each.name, fields=automations.fields(each, owner, notified=notified))
                for each in self.server_file.automations
            ),
        ]


def load(
    repository: Path, environment: str, owner: str, *, image: str | None = None, version: str | None = None
) -> Desired:
    """Reads what Git wants. The files have been checked by `manifest.check`.

    Args:
        repository: The folder that holds prefect.yaml.
        environment: production, or the name of an overlay.
        owner: Whose the things are.
        image: As for `environments.load`. Without it, an image that is still to be built is not compared.
        version: As for `environments.load`.

    Raises:
        UsageError: a file cannot be read, or an entrypoint cannot be imported.
    """
    manifest = environments.load(repository, environment, image, version)
    server_file = automations.load(repository)
    things: list[Thing] = []
    configs: dict[str, dict[str, Any]] = {}
    flows = Flows(repository)
    unset: set[str] = set()
    for raw in manifest["deployments"]:
        config = from_environment(raw)
        flow = flows.load(config["entrypoint"])
        name = f"{flow.name}/{config['name']}"
        configs[name] = raw
        unset.update(placeholder[1:] for placeholder in placeholders(config) if placeholder.startswith("$"))
        things.append(Thing(kind=Kind.DEPLOYMENT, name=name, fields=_deployment(config, flow, manifest)))
        things += [_schedule(name, each) for each in config.get("schedules") or []]
    pools = {thing.fields["work_pool"] for thing in things if thing.kind is Kind.DEPLOYMENT}
    used = [pool for pool in server_file.work_pools if pool.name in pools]
    templates = {pool.name: automations.template(repository, pool) for pool in used}
    things += [
        Thing(
            kind=Kind.WORK_POOL,
            name=pool.name,
            fields={"type": pool.type, "template": comparable(templates[pool.name])},
        )
        for pool in used
    ]
    things += _others(server_file, owner)
    return Desired(
        things=tuple(things),
        manifest=manifest,
        configs=configs,
        server_file=server_file,
        templates=templates,
        unset=tuple(sorted(unset)),
    )


class Flows:
    """Imports entrypoints, each once."""

    def __init__(self, repository: Path) -> None:
        self._loaded: dict[str, Flow[..., Any]] = {}
        # As `prefect deploy` does in that folder.
        if str(repository) not in sys.path:
            sys.path.insert(0, str(repository))

    def load(self, entrypoint: str) -> Flow[..., Any]:
        """The flow at an entrypoint.

        Raises:
            UsageError: it cannot be imported, or is no flow.
        """
        from prefect.exceptions import PrefectException
        from prefect.flows import load_flow_from_entrypoint

        if entrypoint not in self._loaded:
            try:
                self._loaded[entrypoint] = load_flow_from_entrypoint(entrypoint)
            # What an import raises is up to the module: the reason goes into the sentence.
            except (
                ImportError,
                AttributeError,
                ValueError,
                TypeError,
                OSError,
                SyntaxError,
                PrefectException,
            ) as error:
                reason = " ".join(str(error).split())
                raise UsageError(f"entrypoint {entrypoint!r} cannot be imported: {reason}") from error
        return self._loaded[entrypoint]


def placeholders(value: Any) -> set[str]:
    """The names in `{{ … }}` that a deploy has to fill in."""
    if isinstance(value, str):
        return {name for name in PLACEHOLDER.findall(value) if not name.startswith(_RUN_TIME)}
    if isinstance(value, dict):
        return set().union(*(placeholders(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(placeholders(item) for item in value))
    return set()


def from_environment(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deployment with its `{{ $VARIABLE }}`s filled in, as Prefect does it; unset ones stay."""
    from prefect.utilities.templating import apply_values
    from pydantic_core import to_jsonable_python

    # As JSON: Prefect's function takes no dates, which YAML makes of what looks like one.
    return cast("dict[str, Any]", apply_values(to_jsonable_python(dict(config)), {}, remove_notset=False))


def comparable(template: Mapping[str, Any]) -> dict[str, Any]:
    """A base job template without the defaults of its variables: an installation sets these."""
    variables = template.get("variables") or {}
    properties = {
        name: {key: value for key, value in each.items() if key != "default"}
        for name, each in (variables.get("properties") or {}).items()
    }
    return {**template, "variables": {**variables, "properties": properties}}


def _deployment(config: Mapping[str, Any], flow: Flow[..., Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    pool = config["work_pool"]
    limit = config.get("concurrency_limit")
    limits = limit if isinstance(limit, dict) else {"limit": limit}
    fields = {
        "entrypoint": config["entrypoint"],
        "description": config.get("description") or flow.description,
        "tags": sorted(config.get("tags") or []),
        "parameters": config.get("parameters") or {},
        "parameter_schema": parameter_schema(flow).model_dump(exclude_unset=True),
        "enforce_parameter_schema": config.get("enforce_parameter_schema", True),
        "work_pool": pool["name"],
        "work_queue": pool.get("work_queue_name") or DEFAULT_QUEUE,
        "job_variables": pool.get("job_variables") or {},
        "concurrency_limit": limits.get("limit"),
        "collision_strategy": limits.get("collision_strategy"),
        "grace_period_seconds": limits.get("grace_period_seconds"),
        "pull_steps": config.get("pull", manifest.get("pull")) or [],
    }
    if "paused" in config:
        fields["paused"] = config["paused"]
    return {name: _value(value) for name, value in fields.items()}


def _value(value: Any) -> Any:
    """A value as JSON has it; what a step has to fill in is `UNKNOWN`."""
    from pydantic_core import to_jsonable_python

    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items()}
    return UNKNOWN if placeholders(value) else to_jsonable_python(value)


def _schedule(deployment: str, config: Mapping[str, Any]) -> Thing:
    slug, replaces = config["slug"], config.get("replaces")
    return Thing(
        kind=Kind.SCHEDULE,
        name=f"{deployment}#{slug}",
        parent=deployment,
        replaces=f"{deployment}#{replaces}" if replaces else "",
        fields={
            "slug": slug,
            "schedule": schedules.parse({key: config[key] for key in schedules.KEYS if key in config}),
            "parameters": _value(config.get("parameters") or {}),
        },
    )


def _others(content: automations.ServerFile, owner: str) -> list[Thing]:
    urls = settings().notify.urls.get_secret_value().split()
    things = [
        Thing(kind=Kind.VARIABLE, name=each.name, fields={"value": each.value, "tags": [automations.owner_tag(owner)]})
        for each in content.variables
    ]
    things += [
        Thing(
            kind=Kind.CONCURRENCY_LIMIT,
            name=each.name,
            fields={"limit": each.limit, "slot_decay_per_second": each.slot_decay_per_second},
        )
        for each in content.concurrency_limits
    ]
    if urls:
        things.append(
            Thing(kind=Kind.NOTIFICATION, name=automations.notify_block(owner), fields={"urls": Masked(" ".join(urls))})
        )
    return things
