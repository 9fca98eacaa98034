"""The check before each step of the Dask operator: an object that asks for more than a flow run may have is refused."""

from __future__ import annotations

import json
from collections import OrderedDict
from http import HTTPStatus
from typing import Any

import httpx
import kopf
import kr8s
import kr8s.asyncio

from tidepool.compute.clusters.kubernetes.names import ANNOTATION_DRIVER, GROUP, LABEL_SHARED, REFUSED
from tidepool.operate.log_lines import escaped
from tidepool.operate.object_rules import violations
from tidepool.settings import settings

_KINDS = {"DaskCluster", "DaskWorkerGroup", "DaskAutoscaler", "DaskJob"}
_TIMEOUT_SECONDS = 10.0
_RETRY_SECONDS = 2.0
_MESSAGE = 1000  # characters: an Event has at most 1,024
_REMEMBERED = 10_000
# uid -> generation of objects that were refused, the latest last.
_refused: OrderedDict[str, int] = OrderedDict()


async def check(body: kopf.Body, namespace: str, patch: kopf.Patch, **_: Any) -> bool:
    """Refuse an object that breaks a rule: a Warning event says which, and a cluster's phase becomes Refused.

    Returns:
        False for one that was refused before, or whose cluster is gone, and that has not changed since. It costs no
        request, event or line of log any more: kopf calls the timer of an autoscaler again and again.

    Raises:
        kopf.PermanentError: it is refused, or its cluster is gone.
        kopf.TemporaryError: the Kubernetes API did not answer.
    """
    if body["kind"] not in _KINDS or "deletionTimestamp" in body["metadata"]:
        return True
    uid, generation = body["metadata"].get("uid", ""), body["metadata"].get("generation", 0)
    if uid in _refused and _refused[uid] == generation:
        _refused.move_to_end(uid)
        return False
    try:
        reasons = await _reasons(dict(body), namespace)
    except kopf.PermanentError:
        _remember(uid, generation)
        raise
    except (httpx.TransportError, kr8s.APITimeoutError, kr8s.ServerError) as error:
        raise kopf.TemporaryError(f"the Kubernetes API does not answer: {error}", delay=_RETRY_SECONDS) from error
    if not reasons:
        return True
    message = escaped("; ".join(reasons))[:_MESSAGE]
    _remember(uid, generation)
    kopf.warn(body, reason=REFUSED, message=message)
    if body["kind"] == "DaskCluster":
        patch.status["phase"] = REFUSED
    raise kopf.PermanentError(f"refused: {message}")


def _remember(uid: str, generation: int) -> None:
    if uid:
        _refused[uid] = generation
        if len(_refused) > _REMEMBERED:
            _refused.popitem(last=False)


async def _reasons(manifest: dict[str, Any], namespace: str) -> list[str]:
    name = settings().operator.rules_config_map
    rules = await _read(namespace, "v1", f"configmaps/{name}")
    if rules is None:
        return [f"namespace {namespace} has no ConfigMap {name}, which says what flow runs may have"]
    parameters = rules.get("data", {})
    found = violations(manifest, parameters)
    if not found and manifest["kind"] in {"DaskWorkerGroup", "DaskAutoscaler"}:
        cluster = await _read(namespace, GROUP, f"daskclusters/{manifest['spec']['cluster']}")
        if cluster is None:
            raise kopf.PermanentError("its DaskCluster is gone")
        found = _foreign(manifest, cluster) + violations(cluster, parameters)
    return found


def _foreign(manifest: dict[str, Any], cluster: dict[str, Any]) -> list[str]:
    """Return what shows that an object is not its cluster's own: pods of a cluster mount its key."""
    name, uid = cluster["metadata"]["name"], cluster["metadata"]["uid"]
    found = []
    # By these two, admission has checked who creates it.
    for part, key in (("annotations", ANNOTATION_DRIVER), ("labels", LABEL_SHARED)):
        if (manifest["metadata"].get(part) or {}).get(key) != (cluster["metadata"].get(part) or {}).get(key):
            found.append(f"metadata.{part}.{key} must be that of DaskCluster {name}")
    if {each.get("uid") for each in manifest["metadata"]["ownerReferences"]} != {uid}:
        found.append(f"metadata.ownerReferences must have the uid of DaskCluster {name}")
    if manifest["kind"] == "DaskWorkerGroup" and (
        manifest["spec"]["worker"] | {"replicas": 0} != cluster["spec"]["worker"] | {"replicas": 0}
    ):
        found.append(f"spec.worker must be that of DaskCluster {name}, but for replicas")
    return found


async def _read(namespace: str, version: str, url: str) -> dict[str, Any] | None:
    """Return an object, or None if there is none. Not by kr8s' objects: their `get` is a list, and needs that right."""
    api = await kr8s.asyncio.api()
    try:
        async with api.call_api(
            "GET", version=version, namespace=namespace, url=url, timeout=_TIMEOUT_SECONDS
        ) as response:
            return dict(json.loads(response.text))
    except kr8s.ServerError as error:
        if error.response is not None and error.response.status_code == HTTPStatus.NOT_FOUND:
            return None
        raise
