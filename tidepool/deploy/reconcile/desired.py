"""Desired state: what prefect.yaml and automations.yaml say, in the normal form that is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidepool.deploy.config import automations, environments, flows, placeholders, schedules
from tidepool.deploy.reconcile.plan import UNKNOWN, Kind, Masked, Resource
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from prefect import Flow

    from tidepool.deploy.config.models import ServerFile

DEFAULT_QUEUE = "default"


@dataclass(frozen=True)
class DesiredState:
    """Desired state.

    Attributes:
        resources: All of it but the automations, in normal form.
        manifest: The prefect file of the environment.
        configs: Entry of each deployment in it, by `flow/deployment`.
        server_file: automations.yaml.
        templates: Base job template of each work pool.
        unset: Environment variables that the prefect file refers to and that are not set.
    """

    resources: tuple[Resource, ...]
    manifest: Mapping[str, Any]
    configs: Mapping[str, dict[str, Any]]
    server_file: ServerFile
    templates: Mapping[str, dict[str, Any]]
    unset: tuple[str, ...]

    @property
    def has_notification_targets(self) -> bool:
        """True if TIDEPOOL_NOTIFY_URLS is set."""
        return any(each.kind is Kind.NOTIFICATION for each in self.resources)

    def with_automations(self, owner: str, *, block: bool) -> list[Resource]:
        """Return all resources, automations too: whether these notify depends on the server.

        Args:
            owner: Owner of the managed resources.
            block: The server has a block with notification targets.
        """
        notified = block or self.has_notification_targets
        return [
            *self.resources,
            *(
                Resource(
                    kind=Kind.AUTOMATION, name=each.name, fields=automations.fields(each, owner, notified=notified)
                )
                for each in self.server_file.automations
            ),
        ]


def load(
    repository: Path, environment: str, owner: str, *, image: str | None = None, version: str | None = None
) -> DesiredState:
    """Read the desired state. The files have been checked by `checks.check`.

    Args:
        repository: The folder that holds prefect.yaml.
        environment: production, or the name of an overlay.
        owner: Owner of the managed resources.
        image: As for `environments.load`. Without it, an image that has yet to be built is not compared.
        version: As for `environments.load`.

    Raises:
        UsageError: a file cannot be read, or an entrypoint cannot be imported.
    """
    manifest = environments.load(repository, environment, image, version)
    server_file = automations.load(repository)
    resources: list[Resource] = []
    configs: dict[str, dict[str, Any]] = {}
    unset: set[str] = set()
    for raw in manifest["deployments"]:
        config = placeholders.fill_from_environment(raw)
        flow = flows.load(repository, config["entrypoint"])
        name = f"{flow.name}/{config['name']}"
        configs[name] = raw
        unset.update(name[1:] for name in placeholders.find(config) if name.startswith("$"))
        resources.append(Resource(kind=Kind.DEPLOYMENT, name=name, fields=_deployment(config, flow, manifest)))
        resources += [_schedule(name, each) for each in config.get("schedules") or []]
    pools = {each.fields["work_pool"] for each in resources if each.kind is Kind.DEPLOYMENT}
    used = [pool for pool in server_file.work_pools if pool.name in pools]
    templates = {pool.name: automations.template(repository, pool) for pool in used}
    resources += [
        Resource(
            kind=Kind.WORK_POOL,
            name=pool.name,
            fields={"type": pool.type, "template": comparable(templates[pool.name])},
        )
        for pool in used
    ]
    resources += _others(server_file, owner)
    return DesiredState(
        resources=tuple(resources),
        manifest=manifest,
        configs=configs,
        server_file=server_file,
        templates=templates,
        unset=tuple(sorted(unset)),
    )


def comparable(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return a base job template without the defaults of its variables, which each installation sets."""
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
    """Return a value as JSON has it; `UNKNOWN` if a step has to fill it in."""
    from pydantic_core import to_jsonable_python

    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items()}
    return UNKNOWN if placeholders.find(value) else to_jsonable_python(value)


def _schedule(deployment: str, config: Mapping[str, Any]) -> Resource:
    slug, replaces = config["slug"], config.get("replaces")
    return Resource(
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


def _others(content: ServerFile, owner: str) -> list[Resource]:
    urls = settings().notify.urls.get_secret_value().split()
    resources = [
        Resource(
            kind=Kind.VARIABLE, name=each.name, fields={"value": each.value, "tags": [automations.owner_tag(owner)]}
        )
        for each in content.variables
    ]
    resources += [
        Resource(
            kind=Kind.CONCURRENCY_LIMIT,
            name=each.name,
            fields={"limit": each.limit, "slot_decay_per_second": each.slot_decay_per_second},
        )
        for each in content.concurrency_limits
    ]
    if urls:
        resources.append(
            Resource(
                kind=Kind.NOTIFICATION, name=automations.notify_block(owner), fields={"urls": Masked(" ".join(urls))}
            )
        )
    return resources
