"""`tidepool doctor`: is everything there that a run needs? A line for each check, with what to do.

The checks run side by side; each has its own time limit, and fails in words by itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import re
import textwrap
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote
from uuid import uuid4

import httpx

from tidepool.compute.clusters.kubernetes.names import GROUP
from tidepool.errors import TidepoolError
from tidepool.operate.status import sources
from tidepool.settings import repository, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from pathlib import Path

    import kr8s

Word = Literal["ok", "warning", "wrong", "unknown"]
Json = dict[str, Any]

_SECONDS = 10.0
# A test message goes to one target after the other.
_NOTIFY_SECONDS = 60.0
# A store that refuses connections is asked for 57 s at most (`tidepool.storage`); its own words say more than a time.
_STORAGE_SECONDS = 70.0
_KUBERNETES_SECONDS = 30.0
_CLOCK_SECONDS = 5.0
_KUBERNETES = (1, 29)
_GROUP = GROUP.partition("/")[0]
_KINDS = ("daskautoscalers", "daskclusters", "daskworkergroups")
_LABEL, _WIDTH = 9, 22
# What `tidepool status` and `tidepool reap` read and delete, beside the parts of the sweep.
_NEEDED = (("list", "", "events"), ("list", "", "pods"), ("list", "batch", "jobs"), ("list", _GROUP, "daskclusters"),
           ("delete", _GROUP, "daskclusters"))  # fmt: skip


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: What was looked at.
        word: Result; `unknown` if it could not be looked at.
        text: What was found.
        do: What to do; empty if nothing.
    """

    name: str
    word: Word
    text: str
    do: str = ""


def doctor(default_api: str = "", *, notify: bool) -> list[Check]:
    """Check this machine, the Prefect server, the store, the targets of notifications and Kubernetes.

    Args:
        default_api: URL of the API if PREFECT_API_URL is not set.
        notify: Send a test message.
    """
    return asyncio.run(_all(default_api, notify=notify))


def as_text(checks: Iterable[Check], width: int) -> str:
    """Return a line for each check, and below it what to do."""
    lines = []
    for each in checks:
        text = f"{each.name:<{_WIDTH - 2}}  {each.text}" + (f". {each.do}" if each.do else "")
        indent = " " * (_LABEL + _WIDTH)
        first = f"{each.word:<{_LABEL}}"
        lines += textwrap.wrap(
            text,
            max(width, 60),
            initial_indent=first,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def as_json(checks: Iterable[Check]) -> str:
    """Return the checks as one JSON object."""
    return json.dumps({"checks": [asdict(each) for each in checks]}, indent=2)


async def _all(default_api: str, *, notify: bool) -> list[Check]:
    parts = await asyncio.gather(
        _part("python", _in_thread(lambda: _packages(repository() / "requirements" / "runtime.txt"))),
        # It reads Prefect's settings before it waits for anything: only then may threads import Prefect.
        _part("Prefect server", _server(default_api)),
        _part("storage", _in_thread(_storage), _STORAGE_SECONDS),
        _part("notifications", _in_thread(lambda: _notifications(send=notify)), _NOTIFY_SECONDS),
        # In a thread: the import of its client takes as long as all other parts.
        _part("Kubernetes", _in_thread(lambda: asyncio.run(_kubernetes())), _KUBERNETES_SECONDS),
    )
    return [each for found in parts for each in found]


async def _part(name: str, checks: Coroutine[Any, Any, list[Check]], seconds: float = _SECONDS) -> list[Check]:
    try:
        async with asyncio.timeout(seconds):
            return await checks
    except TimeoutError:
        return [Check(name, "unknown", f"no answer within {seconds:g} s")]
    except Exception as error:  # noqa: BLE001 - what a check raises is its result: the others are still shown
        return [Check(name, "unknown", sources.words(error))]


async def _in_thread(function: Callable[[], list[Check]]) -> list[Check]:
    """Return what a function returns, in a thread that the end of the process does not wait for."""
    future: Future[list[Check]] = Future()
    future.set_running_or_notify_cancel()  # it cannot be cancelled

    def call() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return await asyncio.wrap_future(future)


# --- this machine, store and messages ---------------------------------------------------------------------------------


def _packages(lock: Path) -> list[Check]:
    """Compare what is installed with a checkout's lock file; the image has none, and is what was locked."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = [Check("python", "ok", platform.python_version())]
    if not lock.is_file():
        return found
    lines = [line.rstrip(" \\") for line in lock.read_text(encoding="utf-8").splitlines() if re.match(r"\w", line)]
    # Some are for other versions of Python, or other systems.
    locked = [each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate()]
    installed = {canonicalize_name(each.name): each.version for each in distributions()}
    other = [
        f"{each.name} {version} instead of {each.specifier}"
        for each in locked
        if (version := installed.get(canonicalize_name(each.name))) and not each.specifier.contains(version)
    ]
    if other:
        return [*found, Check("packages", "wrong", ", ".join(other), "make setup")]
    return [*found, Check("packages", "ok", f"as {lock.name} has them")]


def _storage() -> list[Check]:
    from tidepool import storage

    key, probe = f"doctor/{uuid4().hex}", uuid4().bytes
    where = f"{settings().storage.root}, from this machine"
    try:
        storage.write(key, probe)
        try:
            whole = storage.read(key) == probe
        finally:
            storage.delete(key)
    except (OSError, TidepoolError) as error:
        return [Check("storage", "wrong", str(error), "Check TIDEPOOL_STORAGE_ROOT and the credentials of the store.")]
    if not whole:
        return [Check("storage", "wrong", f"{where}: it returned another content than was written", "Do not use it.")]
    return [Check("storage", "ok", f"{where}: written, read, deleted")]


def _notifications(*, send: bool) -> list[Check]:
    from tidepool import notify

    targets = len(settings().notify.urls.get_secret_value().split())
    if not targets:
        return [Check("notifications", "warning", "no targets", "Set TIDEPOOL_NOTIFY_URLS (docs/on-call.md).")]
    if not send:
        return [Check("notifications", "ok", f"{targets} targets; --notify sends a test message")]
    accepted = notify.send(logging.getLogger(__name__), "tidepool doctor", "A test message: nothing to do.")
    text = f"{accepted} of {targets} targets accepted a test message"
    return [Check("notifications", "ok" if accepted == targets else "wrong", text)]


# --- the Prefect server -----------------------------------------------------------------------------------------------


async def _server(default_api: str) -> list[Check]:
    async with sources.client(default_api) as client:
        began = time.time()
        try:
            version = (await client.get("/admin/version")).raise_for_status()
        except httpx.HTTPError as error:
            return [
                Check("Prefect server", "wrong", sources.words(error), "See docs/runbooks/TidepoolPrefectApiDown.md.")
            ]
        found = [Check("Prefect server", "ok", str(client.base_url))]
        found += [_version(version.json()), *_clock(version, began, time.time())]

        async def ready() -> list[Check]:
            return [_ready(await client.get("/ready"))]

        async def retention() -> list[Check]:
            return _retention((await client.get("/admin/settings")).raise_for_status().json())

        async def pools() -> list[Check]:
            listed = (await client.post("/work_pools/filter", json={"limit": 200})).raise_for_status().json()
            return [check for pool in listed for check in await _part(f"work pool {pool['name']}", _pool(client, pool))]

        parts = await asyncio.gather(
            _part("database", ready()), _part("retention", retention()), _part("work pools", pools())
        )
    return [*found, *(each for checks in parts for each in checks)]


async def _pool(client: httpx.AsyncClient, pool: Json) -> list[Check]:
    path = f"/work_pools/{quote(pool['name'], safe='')}/workers/filter"
    workers = (await client.post(path, json={"limit": 200})).raise_for_status().json()
    used = {"work_pools": {"name": {"any_": [pool["name"]]}}}
    deployments = (await client.post("/deployments/count", json=used)).raise_for_status().json()
    return [_workers(pool, workers, deployments)]


def _version(server: str) -> Check:
    from prefect import __version__

    text = f"server {server}, client {__version__}"
    if server == __version__:
        return Check("Prefect", "ok", text)
    same = server.split(".")[:2] == __version__.split(".")[:2]
    return Check("Prefect", "warning" if same else "wrong", text, "Use the image and the lock file of one commit.")


def _clock(answer: httpx.Response, began: float, ended: float) -> list[Check]:
    if "date" not in answer.headers:
        return []
    there = parsedate_to_datetime(answer.headers["date"]).timestamp()
    # The header has whole seconds.
    off = max(began - 1 - there, there - ended, 0.0)
    text = f"{off:.0f} s apart from the server's"
    if off > _CLOCK_SECONDS:
        return [Check("clock", "wrong", text, "Synchronise both: schedules and leases go by them.")]
    return [Check("clock", "ok", text)]


def _ready(answer: httpx.Response) -> Check:
    if answer.is_success:
        return Check("database", "ok", "the server reaches it")
    return Check("database", "wrong", "the server does not reach it", "See docs/runbooks/TidepoolPrefectApiDown.md.")


def _retention(configured: Json) -> list[Check]:
    server = configured.get("server", {})
    vacuum, events = server.get("services", {}).get("db_vacuum", {}), server.get("events", {})
    broker = events.get("messaging_broker")
    found = [Check("messages of servers", "ok", str(broker))] if broker else []
    enabled = vacuum.get("enabled") or []
    if "flow_runs" in enabled or enabled is True:
        return [*found, Check("retention", "ok", f"finished flow runs are kept for {vacuum.get('retention_period')}")]
    text = "finished flow runs are never deleted from the database"
    return [*found, Check("retention", "warning", text, "Set PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED on the server.")]


def _workers(pool: Json, workers: list[Json], deployments: int) -> Check:
    name, online = f"work pool {pool['name']}", sum(each["status"] == "ONLINE" for each in workers)
    if pool["is_paused"]:
        return Check(name, "warning", "paused", f"prefect work-pool resume {pool['name']}")
    if pool["type"].endswith((":push", ":managed")):
        return Check(name, "ok", "needs no workers")
    if online:
        return Check(name, "ok", f"{online} workers online")
    if not deployments:
        return Check(name, "warning", "no worker online, and no deployment uses it")
    return Check(name, "wrong", "no worker online", "See docs/runbooks/TidepoolWorkerSilent.md.")


# --- Kubernetes -------------------------------------------------------------------------------------------------------


async def _kubernetes() -> list[Check]:
    from tidepool.operate.sweep.observation import connect
    from tidepool.upstream.kr8s import close_connection

    api = await connect()
    try:
        namespaces = settings().operator.namespaces.split() or [api.namespace]
        checks = [
            ("Kubernetes", _kubernetes_version(api)),
            ("Dask's resources", _crds(api)),
            ("platform", _platform(api)),
            ("admission policies", _admission(api)),
            *((f"rights in {each}", _rights(api, each)) for each in namespaces),
            *((f"namespace {each}", _walls(api, each)) for each in namespaces),
        ]
        # One after another: a refusal ends the connection that others would share.
        parts = [await _part(name, each) for name, each in checks]
    finally:
        await close_connection(api)
    return [each for found in parts for each in found]


async def _kubernetes_version(api: kr8s.asyncio.Api) -> list[Check]:
    found = str((await api.version())["gitVersion"])
    numbers = tuple(int(each) for each in re.findall(r"\d+", found)[:2])
    if numbers >= _KUBERNETES:
        return [Check("Kubernetes", "ok", found)]
    return [Check("Kubernetes", "wrong", found, f"The chart needs {'.'.join(map(str, _KUBERNETES))} or newer.")]


async def _crds(api: kr8s.asyncio.Api) -> list[Check]:
    served = {each["name"] for each in (await _get(api, "", GROUP)).get("resources", [])}
    missing = [each for each in _KINDS if each not in served]
    if missing:
        do = "kubectl apply --server-side --kustomize k8s/crds"
        return [Check("Dask's resources", "wrong", f"no {', '.join(missing)}", do)]
    return [Check("Dask's resources", "ok", ", ".join(_KINDS))]


async def _platform(api: kr8s.asyncio.Api) -> list[Check]:
    labels = {"labelSelector": "app.kubernetes.io/name=tidepool"}
    found = (await _get(api, "deployments", "apps/v1", params=labels)).get("items", [])
    if not found:
        return [Check("platform", "warning", "no Deployment of tidepool", "helm upgrade --install (docs/deploying.md)")]
    releases: dict[str, list[Json]] = {}
    for each in found:
        meta = each["metadata"]
        releases.setdefault(f"{meta['namespace']}/{meta['labels']['app.kubernetes.io/instance']}", []).append(each)
    return [check for name, each in sorted(releases.items()) for check in _release(name, each)]


def _release(name: str, deployments: list[Json]) -> list[Check]:
    """Check the Deployments of one installation."""
    checks = []
    for each in deployments:
        component, ready = each["metadata"]["name"], each.get("status", {}).get("readyReplicas", 0)
        wanted = each["spec"].get("replicas", 1)
        if min(ready, each.get("status", {}).get("updatedReplicas", 0)) < wanted:
            do = f"kubectl --namespace {each['metadata']['namespace']} describe deployment {component}"
            checks.append(
                Check(f"platform {name}", "wrong", f"{component}: not {wanted} pods of its last version ready", do)
            )
    if not checks:
        checks.append(Check(f"platform {name}", "ok", f"{len(deployments)} Deployments ready"))
    containers = [one for each in deployments for one in each["spec"]["template"]["spec"]["containers"]]
    images = {each["image"] for each in containers}
    if len(images) > 1:
        return [
            *checks,
            Check(f"image of {name}", "wrong", f"{len(images)} different ones: {', '.join(sorted(images))}"),
        ]
    if "@sha256:" not in (image := images.pop()):
        return [
            *checks,
            Check(f"image of {name}", "warning", f"{image} is a tag, which may change", "Set image.digest."),
        ]
    return [*checks, Check(f"image of {name}", "ok", image)]


async def _admission(api: kr8s.asyncio.Api) -> list[Check]:
    path = "validatingadmissionpolicybindings"
    found = (await _get(api, path, "admissionregistration.k8s.io/v1")).get("items", [])
    ours = [each["metadata"]["name"] for each in found if each["metadata"]["name"].startswith("tidepool")]
    if ours:
        return [Check("admission policies", "ok", f"{len(ours)} bound")]
    do = "kubectl apply --kustomize k8s/cluster (docs/security.md)"
    return [Check("admission policies", "wrong", "none is bound: flow runs may create what they like", do)]


async def _rights(api: kr8s.asyncio.Api, namespace: str) -> list[Check]:
    from tidepool.operate.sweep.observation import PARTS

    async def allowed(verb: str, group: str, resource: str) -> bool:
        attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": resource}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        body = json.dumps({**review, "spec": {"resourceAttributes": attributes}})
        answer = await _get(api, "selfsubjectaccessreviews", "authorization.k8s.io/v1", method="POST", data=body)
        return bool(answer["status"]["allowed"])

    parts = [(version.rpartition("/")[0], path) for version, path, _ in PARTS.values()]
    needed = [*_NEEDED, *((verb, *part) for part in parts for verb in ("list", "delete"))]
    missing = [f"{verb} {resource}" for verb, group, resource in needed if not await allowed(verb, group, resource)]
    name = f"rights in {namespace}"
    if missing:
        return [Check(name, "warning", f"may not {', '.join(missing)}", "Status and reap need these.")]
    return [Check(name, "ok", "enough for status and reap")]


async def _walls(api: kr8s.asyncio.Api, namespace: str) -> list[Check]:
    whole = await _get(api, f"namespaces/{namespace}")
    policies = await _get(api, "networkpolicies", "networking.k8s.io/v1", namespace=namespace)
    quotas = await _get(api, "resourcequotas", namespace=namespace)
    missing = []
    if (whole.get("metadata", {}).get("labels") or {}).get("pod-security.kubernetes.io/enforce") != "restricted":
        missing.append("no Pod Security level `restricted`")
    missing += [] if policies.get("items") else ["no NetworkPolicy"]
    missing += [] if quotas.get("items") else ["no ResourceQuota"]
    name = f"namespace {namespace}"
    if missing:
        return [Check(name, "warning", ", ".join(missing), "kubectl apply --kustomize k8s/overlays/<environment>")]
    return [Check(name, "ok", "restricted, with NetworkPolicies and a quota")]


async def _get(api: kr8s.asyncio.Api, path: str, version: str = "v1", *, method: str = "GET", **options: Any) -> Json:
    """Return what Kubernetes answers; an empty object if it knows no such path.

    Raises:
        TidepoolError: it refuses.
    """
    import kr8s

    options.setdefault("namespace", None)
    try:
        async with api.call_api(method, version=version, url=path, **options) as answer:
            return dict(json.loads(answer.text))
    except kr8s.ServerError as error:
        if error.response is not None and error.response.status_code == HTTPStatus.NOT_FOUND:
            return {}
        raise TidepoolError(f"Kubernetes refused it: {error}") from error
