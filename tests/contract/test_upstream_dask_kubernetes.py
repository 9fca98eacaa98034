"""tidepool.upstream.dask_kubernetes: the controller's handlers, called as kopf calls them.

If one fails: read the new controller, change `tidepool.operate.dask_operator`, and run `make test-cluster`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import kopf
from dask_kubernetes.operator.controller import controller
from kopf._core.actions import execution
from kopf._core.intents import causes

from tidepool.upstream import dask_kubernetes
from tidepool.upstream.kopf import remove_handlers, remove_timer

if TYPE_CHECKING:
    import pytest

    from tests.conftest import KubernetesServer

CLUSTER: Any = {
    "apiVersion": "kubernetes.dask.org/v1",
    "kind": "DaskCluster",
    "metadata": {"name": "c", "namespace": "ns", "uid": "uid-c", "labels": {}, "annotations": {}},
    "spec": {
        "scheduler": {"spec": {"containers": [{"name": "s"}]}, "service": {}},
        "worker": {"replicas": 1, "spec": {}},
    },
}


def test_the_controller_creates_worker_groups_with_their_owner(
    kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "build_default_worker_group_spec", controller.build_default_worker_group_spec)
    dask_kubernetes.own_worker_groups()
    absent, created = (404, {"message": "not found"}), (201, {"metadata": {"name": "x", "namespace": "ns"}})
    kubernetes.answers = [absent, created] * 3
    body = kopf.Body(CLUSTER)

    async def handle() -> None:
        execution.cause_var.set(Mock(spec=causes.ResourceCause, body=body))
        await controller.daskcluster_create_components(
            spec=body.spec,
            name="c",
            namespace="ns",
            logger=logging.getLogger(__name__),
            patch=kopf.Patch(),
            meta=body.metadata,
        )

    asyncio.run(handle())
    [group] = [each for each in kubernetes.requests if each.startswith("POST") and "/daskworkergroups" in each]
    [owner] = json.loads(group.split(" ", 2)[2])["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("DaskCluster", "uid-c")


def test_without_the_idle_timer_no_handler_asks_for_a_finalizer_on_a_cluster() -> None:
    registry = copy.copy(kopf.get_default_registry())
    registry._spawning = copy.copy(registry._spawning)
    timers = {each.fn.__name__ for each in registry._spawning.get_all_handlers()}
    assert timers == {"daskcluster_autoshutdown", "daskautoscaler_adapt"}

    remove_timer(registry, dask_kubernetes.IDLE_TIMER)

    assert [each.fn for each in registry._spawning.get_all_handlers()] == [controller.daskautoscaler_adapt]
    removers = [each for each in registry._changing.get_all_handlers() if each.requires_finalizer]
    assert removers == [], "a handler of removals"


def test_without_the_handlers_for_pods_of_jobs_no_pod_is_watched() -> None:
    registry = copy.copy(kopf.get_default_registry())
    registry._changing = copy.copy(registry._changing)

    remove_handlers(registry, *dask_kubernetes.JOB_PODS)

    watched = {each.any_name for each in registry._changing.get_all_selectors()}
    assert "service" in watched
    assert not watched & {"pod", "pods"}


def test_the_number_of_workers_has_one_handler_and_a_new_group_another() -> None:
    """That a new group gets its workers without the first is seen on the cluster: each run's workers."""
    handlers = kopf.get_default_registry()._changing.get_all_handlers()
    fields = [each.field for each in handlers if each.fn is dask_kubernetes.SCALE_WORKERS]
    assert fields == [("spec", "worker", "replicas")]
