"""What is on the Prefect server, in the normal form that is compared."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from tidepool.deploy.config import automations, schedules
from tidepool.deploy.reconcile.desired import DEFAULT_QUEUE, Desired, comparable
from tidepool.deploy.reconcile.plan import Kind, Live, Masked
from tidepool.errors import TidepoolError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prefect.client.orchestration import SyncPrefectClient

Json = dict[str, Any]

_PAGE = 200  # the server's own limit
PAUSE_TAG = "tidepool:pause"  # variables with it record pauses; they come and go without Git


class ServerError(TidepoolError):
    """The Prefect server does not answer, or refuses."""


@contextmanager
def connect(retries: int = 1) -> Iterator[SyncPrefectClient]:
    """A client of the server of PREFECT_API_URL.

    Args:
        retries: How often a request that gets no answer is sent again; the waits double from two seconds.

    Raises:
        UsageError: PREFECT_API_URL is not set.
        ServerError: the server does not answer or refuses, while the client is in use.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    url = PREFECT_API_URL.value()
    if not url:
        raise UsageError("PREFECT_API_URL is not set: it says which Prefect server is meant (http://host:4200/api)")
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}), get_client(sync_client=True) as client:
        try:
            yield client
        except PrefectHTTPStatusError as error:
            detail = error.response.text[:500]
            raise ServerError(
                f"the Prefect server at {url} refuses {error.request.method} {error.request.url.path} "
                f"({error.response.status_code}): {detail}"
            ) from error
        except httpx.TransportError as error:
            raise ServerError(
                f"the Prefect server at {url} does not answer: {error or type(error).__name__}"
            ) from error


@dataclass(frozen=True)
class State:
    """What is on the server.

    Attributes:
        live: All that is owned, and whatever else has a name that Git wants.
        deployments: Ids of the deployments, by `flow/deployment`.
        block: Id of the block with the notification targets; empty: there is none.
    """

    live: tuple[Live, ...]
    deployments: Mapping[str, str]
    block: str


def read(client: SyncPrefectClient, owner: str, desired: Desired) -> State:
    """What is on the server.

    Args:
        client: A client of the server.
        owner: Whose the things are.
        desired: What Git wants.
    """
    names = {kind: {thing.name for thing in desired.things if thing.kind is kind} for kind in Kind}
    wanted = names[Kind.DEPLOYMENT]
    tag = automations.owner_tag(owner)
    found = read_deployments(client, tag, [name.split("/", 1)[1] for name in wanted])
    # A deployment of the same name of another flow is nothing of ours.
    deployments = {name: each for name, each in found.items() if tag in each["tags"] or name in wanted}
    ids = {name: str(each["id"]) for name, each in deployments.items()}
    live = [thing for each in deployments.values() for thing in _deployment(each, tag)]
    live += [pool for name in sorted(names[Kind.WORK_POOL]) for pool in _work_pool(client, name)]
    live += _variables(client, tag, names[Kind.VARIABLE])
    live += _limits(client, owner)
    block = _block(client, owner)
    if block and names[Kind.NOTIFICATION]:
        live.append(block)
    known = {key: name for name, key in ids.items()} | ({block.id: automations.NOTIFY} if block else {})
    live += _automations(client, tag, {each.name for each in desired.server_file.automations}, known)
    return State(live=tuple(live), deployments=ids, block=block.id if block else "")


def read_deployments(client: SyncPrefectClient, tag: str, names: Sequence[str]) -> dict[str, Json]:
    """Deployments with the tag or with one of the names, as the API has them, by `flow/deployment`."""
    criteria = {"operator": "or_", "tags": {"all_": [tag]}, "name": {"any_": sorted(names)}}
    found = pages(client, "/deployments/filter", {"deployments": criteria})
    flow_ids = sorted({each["flow_id"] for each in found})
    flows = {}
    for start in range(0, len(flow_ids), _PAGE):
        some = {"flows": {"id": {"any_": flow_ids[start : start + _PAGE]}}}
        flows.update({each["id"]: each["name"] for each in pages(client, "/flows/filter", some)})
    return {f"{flows[each['flow_id']]}/{each['name']}": {**each, "flow_name": flows[each["flow_id"]]} for each in found}


def pages(client: SyncPrefectClient, path: str, body: Mapping[str, Any]) -> list[Json]:
    """All objects that a filter call finds."""
    found: list[Json] = []
    while True:
        some = _json(client, "POST", path, json={**body, "limit": _PAGE, "offset": len(found)})
        found += some
        if len(some) < _PAGE:
            return found


def _json(client: SyncPrefectClient, method: str, path: str, **arguments: Any) -> Any:
    return client.request(cast("Any", method), cast("Any", path), **arguments).json()


def _deployment(each: Json, tag: str) -> list[Live]:
    name = f"{each['flow_name']}/{each['name']}"
    owned = tag in each["tags"]
    options = each.get("concurrency_options") or {}
    limit = each.get("global_concurrency_limit") or {}
    deployment = Live(
        kind=Kind.DEPLOYMENT,
        name=name,
        id=each["id"],
        owned=owned,
        updated=_time(each["updated"]),
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
    return [deployment, *(_schedule(schedule, name, owned=owned) for schedule in each["schedules"])]


def _schedule(each: Json, deployment: str, *, owned: bool) -> Live:
    slug = each.get("slug")
    timing = dict(each["schedule"])
    if timing.get("anchor_date"):
        timing["anchor_date"] = schedules.utc(timing["anchor_date"])
    return Live(
        kind=Kind.SCHEDULE,
        name=f"{deployment}#{slug or each['id']}",
        parent=deployment,
        id=each["id"],
        owned=owned and bool(slug),
        updated=_time(each["updated"]),
        active=each["active"],
        fields={"slug": slug, "schedule": timing, "parameters": each.get("parameters") or {}},
    )


def _work_pool(client: SyncPrefectClient, name: str) -> list[Live]:
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        return []
    return [
        Live(
            kind=Kind.WORK_POOL,
            name=name,
            id=str(pool.id),
            owned=True,
            updated=pool.updated,
            active=not pool.is_paused,
            fields={"type": pool.type, "template": comparable(pool.base_job_template)},
        )
    ]


def _variables(client: SyncPrefectClient, tag: str, names: set[str]) -> list[Live]:
    return [
        Live(
            kind=Kind.VARIABLE,
            name=each["name"],
            id=each["id"],
            owned=tag in each["tags"],
            updated=_time(each["updated"]),
            fields={"value": each["value"], "tags": sorted(each["tags"])},
        )
        for each in pages(client, "/variables/filter", {})
        if PAUSE_TAG not in each["tags"] and (tag in each["tags"] or each["name"] in names)
    ]


def _limits(client: SyncPrefectClient, owner: str) -> list[Live]:
    return [
        Live(
            kind=Kind.CONCURRENCY_LIMIT,
            name=each["name"],
            id=each["id"],
            owned=True,
            updated=_time(each["updated"]),
            active=each["active"],
            fields={"limit": each["limit"], "slot_decay_per_second": each["slot_decay_per_second"]},
        )
        for each in pages(client, "/v2/concurrency_limits/filter", {})
        if each["name"].startswith(f"{owner}-")
    ]


def _block(client: SyncPrefectClient, owner: str) -> Live | None:
    from prefect.exceptions import ObjectNotFound

    name = automations.notify_block(owner)
    try:
        block = client.read_block_document_by_name(name, block_type_slug="slack-webhook", include_secrets=True)
    except ObjectNotFound:
        return None
    return Live(
        kind=Kind.NOTIFICATION,
        name=name,
        id=str(block.id),
        owned=True,
        updated=block.updated,
        fields={"urls": Masked(str(block.data.get("url", "")))},
    )


def _automations(client: SyncPrefectClient, tag: str, names: set[str], ids: Mapping[str, str]) -> list[Live]:
    return [
        Live(
            kind=Kind.AUTOMATION,
            name=each["name"],
            id=each["id"],
            owned=tag in each["tags"],
            updated=_time(each["updated"]),
            active=each["enabled"],
            fields=automations.normal(each, ids),
        )
        for each in pages(client, "/automations/filter", {})
        if tag in each["tags"] or each["name"] in names
    ]


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
