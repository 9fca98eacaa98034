"""Actual state: what the Prefect server has, in the normal form that is compared."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, SecretStr

from tidepool.deploy.client import pages
from tidepool.deploy.config import automations, schedules
from tidepool.deploy.reconcile.desired import DEFAULT_QUEUE, DesiredState
from tidepool.deploy.reconcile.plan import ActualResource, Kind
from tidepool.deploy.reconcile.work_pool import comparable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.client import Json

PAUSE_TAG = "tidepool:pause"
"""Tag of the variables that record pauses. They are created and deleted on the server, not in Git."""


class Pause(BaseModel):
    """Record of who paused a deployment, why, and until when.

    Attributes:
        deployment: `flow/deployment`.
        by: A person.
        reason: In their words.
        at: Time at which it began.
        until: Time at which the drift job resumes the deployment.
    """

    model_config = ConfigDict(frozen=True)

    deployment: str
    by: str
    reason: str
    at: datetime
    until: datetime


def read(client: SyncPrefectClient, owner: str, desired: DesiredState) -> list[ActualResource]:
    """Return all managed resources, and whoever manages them, those with a desired name."""
    tag = automations.owner_tag(owner)
    names = {kind: sorted(each.name for each in desired.resources if each.kind is kind) for kind in Kind}
    found: list[ActualResource] = []
    listed = read_deployments(client, tag, [name.split("/", 1)[1] for name in names[Kind.DEPLOYMENT]])
    for name, each in listed.items():
        # An unmanaged deployment of the same name, but of another flow, does not matter here.
        if tag in each["tags"] or name in names[Kind.DEPLOYMENT]:
            found += _deployment(name, each, managed=tag in each["tags"])
    for each in pages(client, "/work_pools/filter", {"work_pools": {"name": {"any_": names[Kind.WORK_POOL]}}}):
        fields = {"type": each["type"], "template": comparable(each["base_job_template"])}
        # The API addresses it by its name.
        found.append(
            _resource(Kind.WORK_POOL, each["name"], each, fields, id=each["name"], active=not each["is_paused"])
        )
    for each in _variables(client, tag, names[Kind.VARIABLE]):
        fields = {"value": each["value"], "tags": sorted(each["tags"])}
        found.append(_resource(Kind.VARIABLE, each["name"], each, fields, managed=tag in each["tags"]))
    for each in pages(client, "/v2/concurrency_limits/filter", {}):
        if each["name"].startswith(f"{owner}-"):
            fields = {"limit": each["limit"], "slot_decay_per_second": each["slot_decay_per_second"]}
            found.append(_resource(Kind.CONCURRENCY_LIMIT, each["name"], each, fields, active=each["active"]))
    # Without TIDEPOOL_NOTIFY_URLS, as on a laptop, the block stays as it is.
    found += _notification(client, owner, managed=bool(names[Kind.NOTIFICATION]))
    in_git = {each.name for each in desired.server_file.automations}
    names_by_id = {identity: name for name, identity in ids(found).items()}
    for each in pages(client, "/automations/filter", {}):
        managed = tag in each["tags"]
        if managed or each["name"] in in_git:
            fields = automations.normal(each, names_by_id)
            found.append(
                _resource(Kind.AUTOMATION, each["name"], each, fields, managed=managed, active=each["enabled"])
            )
    return found


def ids(resources: Iterable[ActualResource]) -> dict[str, str]:
    """Return the ids that automations refer to: of `flow/deployment`, and of the notification block as `notify`."""
    return {
        automations.NOTIFY if each.kind is Kind.NOTIFICATION else each.name: each.id
        for each in resources
        if each.kind in (Kind.DEPLOYMENT, Kind.NOTIFICATION)
    }


def read_deployments(client: SyncPrefectClient, tag: str, names: Sequence[str]) -> dict[str, Json]:
    """Return deployments with the tag or with one of the names, as the API returns them, by `flow/deployment`."""
    criteria = {"deployments": {"operator": "or_", "tags": {"all_": [tag]}, "name": {"any_": sorted(names)}}}
    found = pages(client, "/deployments/filter", criteria)
    flows = {each["id"]: each["name"] for each in pages(client, "/flows/filter", criteria)}
    # The flow of a deployment that was deleted in between is not found.
    return {f"{flows[each['flow_id']]}/{each['name']}": each for each in found if each["flow_id"] in flows}


def _resource(kind: Kind, name: str, each: Json, fields: Json, **more: Any) -> ActualResource:
    values = {"id": each["id"], "updated": datetime.fromisoformat(each["updated"]), "managed": True, **more}
    return ActualResource(kind, name, fields, **values)


def _deployment(name: str, each: Json, *, managed: bool) -> list[ActualResource]:
    options = each["concurrency_options"] or {}
    limit = each["global_concurrency_limit"] or {}
    fields = {
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
    }
    found = [_resource(Kind.DEPLOYMENT, name, each, fields, managed=managed, active=not each["paused"])]
    for schedule in each["schedules"]:
        slug = schedule["slug"]
        values = {
            "slug": slug,
            "schedule": schedules.normal_form(schedule["schedule"]),
            "parameters": schedule["parameters"] or {},
        }
        own = {"managed": managed and bool(slug), "parent": name, "active": schedule["active"]}
        found.append(_resource(Kind.SCHEDULE, f"{name}#{slug or schedule['id']}", schedule, values, **own))
    return found


def _variables(client: SyncPrefectClient, tag: str, names: Sequence[str]) -> list[Json]:
    """Return the managed variables, and unmanaged ones with one of the names unless a flow run is refused them."""
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    managed = pages(client, "/variables/filter", {"variables": {"tags": {"all_": [tag]}}})
    others: list[Json] = []
    if missing := sorted({*names} - {each["name"] for each in managed}):
        try:
            others = pages(client, "/variables/filter", {"variables": {"name": {"any_": missing}}})
        except PrefectHTTPStatusError as error:
            if error.response.status_code != httpx.codes.FORBIDDEN:
                raise
    return [each for each in [*managed, *others] if PAUSE_TAG not in each["tags"]]


def _notification(client: SyncPrefectClient, owner: str, *, managed: bool) -> list[ActualResource]:
    block = {
        "block_documents": {"name": {"any_": [automations.notify_block(owner)]}},
        "block_types": {"slug": {"any_": ["slack-webhook"]}},
        # Their only use is the comparison with the settings' own.
        "include_secrets": managed,
    }
    found = []
    for each in pages(client, "/block_documents/filter", block):
        fields = {"urls": SecretStr(str(each["data"].get("url", "")))}
        found.append(_resource(Kind.NOTIFICATION, each["name"], each, fields, managed=managed))
    return found


def read_pauses(client: SyncPrefectClient, owner: str) -> list[Pause]:
    """Return the recorded pauses, soonest end first."""
    recorded = {"variables": {"tags": {"all_": [PAUSE_TAG, automations.owner_tag(owner)]}}}
    found = [Pause.model_validate(each["value"]) for each in pages(client, "/variables/filter", recorded)]
    return sorted(found, key=lambda each: each.until)
