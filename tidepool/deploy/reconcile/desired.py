"""Desired state: what prefect.yaml and automations.yaml say, in the normal form that is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from tidepool.deploy.config import automations, flows, placeholders, schedules
from tidepool.deploy.reconcile.plan import UNKNOWN, Kind, Resource
from tidepool.deploy.reconcile.work_pool import comparable
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


def load(repository: Path, manifest: Mapping[str, Any], owner: str) -> DesiredState:
    """Return the desired state. The files have been checked by `checks.check`.

    Args:
        repository: The folder that holds automations.yaml and the flows.
        manifest: The prefect file of the environment.
        owner: Owner of the managed resources.

    Raises:
        UsageError: automations.yaml cannot be read, or an entrypoint cannot be imported.
    """
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
        resources.append(Resource(Kind.DEPLOYMENT, name, _deployment(config, flow, manifest)))
        resources += [_schedule(name, each) for each in config.get("schedules") or []]
    used = {each.fields["work_pool"] for each in resources if each.kind is Kind.DEPLOYMENT}
    pools = [pool for pool in server_file.work_pools if pool.name in used]
    templates = {pool.name: automations.template(repository, pool) for pool in pools}
    for pool in pools:
        fields = {"type": pool.type, "template": comparable(templates[pool.name])}
        resources.append(Resource(Kind.WORK_POOL, pool.name, fields))
    tags = [automations.owner_tag(owner)]
    resources += [
        Resource(Kind.VARIABLE, each.name, {"value": each.value, "tags": tags}) for each in server_file.variables
    ]
    for limit in server_file.concurrency_limits:
        resources.append(Resource(Kind.CONCURRENCY_LIMIT, limit.name, limit.model_dump(exclude={"name"})))
    if urls := settings().notify.urls.get_secret_value().split():
        secret = SecretStr(" ".join(urls))
        resources.append(Resource(Kind.NOTIFICATION, automations.notify_block(owner), {"urls": secret}))
    return DesiredState(tuple(resources), manifest, configs, server_file, templates, tuple(sorted(unset)))


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
    fields = {
        "slug": config["slug"],
        "schedule": schedules.parse(config),
        "parameters": _value(config.get("parameters") or {}),
    }
    old = f"{deployment}#{config['replaces']}" if config.get("replaces") else ""
    return Resource(Kind.SCHEDULE, f"{deployment}#{config['slug']}", fields, parent=deployment, replaces=old)
