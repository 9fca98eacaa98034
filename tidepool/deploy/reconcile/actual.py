"""Actual state: what the Prefect server has, in the normal form that is compared."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from tidepool.deploy.client import PAGE, pages
from tidepool.deploy.config import automations, schedules
from tidepool.deploy.reconcile.desired import DEFAULT_QUEUE, DesiredState, comparable
from tidepool.deploy.reconcile.plan import ActualResource, Kind, Masked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.client import Json

PAUSE_TAG = "tidepool:pause"
"""Tag of the variables that record pauses. They are created and deleted on the server, not in Git."""


@dataclass(frozen=True)
class ActualState:
    """Actual state.

    Attributes:
        resources: All managed resources, and unmanaged ones with a desired name.
        deployments: Ids of the deployments, by `flow/deployment`.
        block: Id of the block with the notification targets; empty if there is none.
    """

    resources: tuple[ActualResource, ...]
    deployments: Mapping[str, str]
    block: str


@dataclass(frozen=True)
class Pause:
    """Record of who paused a deployment, why, and until when.

    Attributes:
        deployment: `flow/deployment`.
        by: A person.
        reason: In their words.
        at: Time at which it began.
        until: Time at which the drift job resumes the deployment.
    """

    deployment: str
    by: str
    reason: str
    at: datetime
    until: datetime


def read(client: SyncPrefectClient, owner: str, desired: DesiredState) -> ActualState:
    """Read the actual state.

    Args:
        client: A client of the server.
        owner: Owner of the managed resources.
        desired: The desired state: its names are read whoever manages them.
    """
    names = {kind: {each.name for each in desired.resources if each.kind is kind} for kind in Kind}
    wanted = names[Kind.DEPLOYMENT]
    tag = automations.owner_tag(owner)
    found = read_deployments(client, tag, [name.split("/", 1)[1] for name in wanted])
    # An unmanaged deployment of the same name, but of another flow, does not matter here.
    deployments = {name: each for name, each in found.items() if tag in each["tags"] or name in wanted}
    ids = {name: str(each["id"]) for name, each in deployments.items()}
    resources = [each for config in deployments.values() for each in _deployment(config, tag)]
    resources += [pool for name in sorted(names[Kind.WORK_POOL]) for pool in _work_pool(client, name)]
    resources += _variables(client, tag, names[Kind.VARIABLE])
    resources += _limits(client, owner)
    block = _block(client, owner)
    if block and names[Kind.NOTIFICATION]:
        resources.append(block)
    known = {key: name for name, key in ids.items()} | ({block.id: automations.NOTIFY} if block else {})
    resources += _automations(client, tag, {each.name for each in desired.server_file.automations}, known)
    return ActualState(resources=tuple(resources), deployments=ids, block=block.id if block else "")


def read_deployments(client: SyncPrefectClient, tag: str, names: Sequence[str]) -> dict[str, Json]:
    """Return deployments with the tag or with one of the names, as the API returns them, by `flow/deployment`."""
    criteria = {"operator": "or_", "tags": {"all_": [tag]}, "name": {"any_": sorted(names)}}
    found = pages(client, "/deployments/filter", {"deployments": criteria})
    flow_ids = sorted({each["flow_id"] for each in found})
    flows = {}
    for start in range(0, len(flow_ids), PAGE):
        some = {"flows": {"id": {"any_": flow_ids[start : start + PAGE]}}}
        flows.update({each["id"]: each["name"] for each in pages(client, "/flows/filter", some)})
    return {f"{flows[each['flow_id']]}/{each['name']}": {**each, "flow_name": flows[each["flow_id"]]} for each in found}


def _deployment(each: Json, tag: str) -> list[ActualResource]:
    name = f"{each['flow_name']}/{each['name']}"
    managed = tag in each["tags"]
    options = each.get("concurrency_options") or {}
    limit = each.get("global_concurrency_limit") or {}
    deployment = ActualResource(
        kind=Kind.DEPLOYMENT,
        name=name,
        id=each["id"],
        managed=managed,
        updated=datetime.fromisoformat(each["updated"]),
        active=not each["paused"],
        fields={
            "entrypoint": each["entrypoint"],
            "description": each["description"],
            "tags": sorted(each["tags"]),
            "parameters": each["parameters"],
            "parameter_schema": each["parameter_openapi_schema"] or {},
            "enforce_parameter_schema": each["enforce_parameter_schema"],
            "work_pool": each["work_pool_name"],
            "work_queue": each["work_queue_name"] or DEFAULT_QUEUE,
            "job_variables": each["job_variables"],
            "concurrency_limit": limit.get("limit"),
            "collision_strategy": options.get("collision_strategy"),
            "grace_period_seconds": options.get("grace_period_seconds"),
            "pull_steps": each["pull_steps"] or [],
            "paused": each["paused"],
            "version": each["version"],
        },
    )
    return [deployment, *(_schedule(schedule, name, managed=managed) for schedule in each["schedules"])]


def _schedule(each: Json, deployment: str, *, managed: bool) -> ActualResource:
    slug = each.get("slug")
    return ActualResource(
        kind=Kind.SCHEDULE,
        name=f"{deployment}#{slug or each['id']}",
        parent=deployment,
        id=each["id"],
        managed=managed and bool(slug),
        updated=datetime.fromisoformat(each["updated"]),
        active=each["active"],
        fields={
            "slug": slug,
            "schedule": schedules.normal_form(each["schedule"]),
            "parameters": each.get("parameters") or {},
        },
    )


def _work_pool(client: SyncPrefectClient, name: str) -> list[ActualResource]:
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        return []
    return [
        ActualResource(
            kind=Kind.WORK_POOL,
            name=name,
            id=str(pool.id),
            managed=True,
            updated=pool.updated,
            active=not pool.is_paused,
            fields={"type": pool.type, "template": comparable(pool.base_job_template)},
        )
    ]


def _variables(client: SyncPrefectClient, tag: str, names: set[str]) -> list[ActualResource]:
    return [
        ActualResource(
            kind=Kind.VARIABLE,
            name=each["name"],
            id=each["id"],
            managed=tag in each["tags"],
            updated=datetime.fromisoformat(each["updated"]),
            fields={"value": each["value"], "tags": sorted(each["tags"])},
        )
        for each in pages(client, "/variables/filter", {})
        if PAUSE_TAG not in each["tags"] and (tag in each["tags"] or each["name"] in names)
    ]


def _limits(client: SyncPrefectClient, owner: str) -> list[ActualResource]:
    return [
        ActualResource(
            kind=Kind.CONCURRENCY_LIMIT,
            name=each["name"],
            id=each["id"],
            managed=True,
            updated=datetime.fromisoformat(each["updated"]),
            active=each["active"],
            fields={"limit": each["limit"], "slot_decay_per_second": each["slot_decay_per_second"]},
        )
        for each in pages(client, "/v2/concurrency_limits/filter", {})
        if each["name"].startswith(f"{owner}-")
    ]


def _block(client: SyncPrefectClient, owner: str) -> ActualResource | None:
    from prefect.exceptions import ObjectNotFound

    name = automations.notify_block(owner)
    try:
        block = client.read_block_document_by_name(name, block_type_slug="slack-webhook", include_secrets=True)
    except ObjectNotFound:
        return None
    return ActualResource(
        kind=Kind.NOTIFICATION,
        name=name,
        id=str(block.id),
        managed=True,
        updated=block.updated,
        fields={"urls": Masked(str(block.data.get("url", "")))},
    )


def _automations(client: SyncPrefectClient, tag: str, names: set[str], ids: Mapping[str, str]) -> list[ActualResource]:
    return [
        ActualResource(
            kind=Kind.AUTOMATION,
            name=each["name"],
            id=each["id"],
            managed=tag in each["tags"],
            updated=datetime.fromisoformat(each["updated"]),
            active=each["enabled"],
            fields=automations.normal(each, ids),
        )
        for each in pages(client, "/automations/filter", {})
        if tag in each["tags"] or each["name"] in names
    ]


def read_pauses(client: SyncPrefectClient, owner: str) -> list[Pause]:
    """Return the recorded pauses, soonest end first."""
    tags = {PAUSE_TAG, automations.owner_tag(owner)}
    values = [each["value"] for each in pages(client, "/variables/filter", {}) if tags <= set(each["tags"])]
    found = [
        Pause(
            deployment=value["deployment"],
            by=value["by"],
            reason=value["reason"],
            at=datetime.fromisoformat(value["at"]),
            until=datetime.fromisoformat(value["until"]),
        )
        for value in values
    ]
    return sorted(found, key=lambda each: each.until)
