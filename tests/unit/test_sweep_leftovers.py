"""The decision about what flow runs have left behind on Kubernetes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.compute.clusters.kubernetes import manifest
from tidepool.compute.clusters.kubernetes.driver import Driver, Run
from tidepool.operate.sweep.leftovers import leftovers
from tidepool.operate.sweep.observation import Observation
from tidepool.settings import KubernetesSettings, SizeSettings

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
RUN = str(UUID(int=7))
Object = dict[str, Any]


def ago(seconds: float) -> str:
    """A time in the past, as Kubernetes writes it."""
    return (NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def made(shared: str = "") -> dict[str, Object]:
    """The objects of a cluster as its driver makes them, a minute ago, without spec: as the loop reads them."""
    size, settings = SizeSettings(workers=2), KubernetesSettings(pod_name="driver", adaptive_minimum=1)
    cluster = manifest.manifest(
        "c", run=Run(RUN, "weekly", 1), driver=Driver("image", owner=("job", "uid-job")), size=size, settings=settings,
        dask_settings={}, shared=shared,
    )  # fmt: skip
    cluster["metadata"]["uid"] = "uid-c"
    found = {
        "DaskCluster": cluster,
        "DaskWorkerGroup": manifest.worker_group(cluster),
        "DaskAutoscaler": manifest.autoscaler(cluster, size, settings),
    }
    labels = cluster["metadata"]["labels"] | {"dask.org/cluster-name": "c"}
    for kind in ("Deployment", "Service"):
        found[kind] = {"metadata": {"name": "c-scheduler", "labels": labels}}
    for kind, each in found.items():
        each["metadata"] = {"uid": f"uid-{kind}"} | each["metadata"] | {"creationTimestamp": ago(60)}
    return found


def pod(phase: str = "Running", **metadata: str) -> Object:
    metadata = {"name": "driver", "creationTimestamp": ago(70), **metadata}
    return {"metadata": metadata, "spec": {"nodeName": "n1"}, "status": {"phase": phase}}


def job(condition: str = "", status: str = "True", **details: str) -> Object:
    conditions = [{"type": condition, "status": status, **details}] if condition else []
    return {"metadata": {"name": "job", "uid": "uid-job"}, "status": {"conditions": conditions}}


def world(shared: str = "", **changed: Any) -> Observation:
    """A namespace with one complete, living cluster, but for what is changed."""
    found = made(shared)
    parts = {kind: (each,) for kind, each in found.items() if kind != "DaskCluster"}
    whole = Observation("ns", (job(),), (pod(),), (found["DaskCluster"],), parts)
    return replace(whole, **changed)


def with_metadata(observation: Observation, **changed: Any) -> Observation:
    """Change metadata of the cluster; None removes."""
    [cluster] = observation.clusters
    metadata = {key: each for key, each in (cluster["metadata"] | changed).items() if each is not None}
    return replace(observation, clusters=({"metadata": metadata},))


def annotated(observation: Observation, **changed: str | None) -> Observation:
    [cluster] = observation.clusters
    changes = {f"tidepool.dev/{name.replace('_', '-')}": value for name, value in changed.items()}
    annotations = cluster["metadata"]["annotations"] | changes
    return with_metadata(observation, annotations={key: each for key, each in annotations.items() if each is not None})


def reasons(observation: Observation, finished: dict[str, datetime] | None = None) -> dict[str, str]:
    return {each.kind: each.reason for each in leftovers(observation, finished or {}, NOW)}


NO_DRIVER = {"annotations": None}
TWO_OWNERS = {"ownerReferences": [{"kind": "Job", "name": name, "uid": f"uid-{name}"} for name in ("gone", "job")]}
ORPHANED_PARTS = dict.fromkeys(
    ("DaskWorkerGroup", "DaskAutoscaler", "Deployment", "Service"), "its Dask cluster c is gone"
)


@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        pytest.param(world(), "", id="alive"),
        pytest.param(world(drivers=()), "its driver pod driver is gone", id="pod gone"),
        pytest.param(world(drivers=(pod("Failed"),)), "its driver pod driver has ended (Failed)", id="pod failed"),
        pytest.param(world(drivers=(pod("Succeeded"),)), "its driver pod driver has ended (Succeeded)", id="pod ended"),
        pytest.param(world(drivers=(pod("Pending"),)), "", id="pod not started"),
        pytest.param(world(drivers=(pod("Unknown"),)), "", id="node silent for a moment"),
        pytest.param(world(drivers=(pod(deletionTimestamp=ago(-20)),)), "", id="pod closes its cluster"),
        pytest.param(world(drivers=(pod(deletionTimestamp=ago(10)),)), "", id="pod killed a moment ago"),
        pytest.param(
            world(drivers=(pod(deletionTimestamp=ago(20)),)),
            f"its driver pod driver should have ended by {ago(20)}; does node n1 answer?",
            id="pod does not go",
        ),
        pytest.param(world(jobs=()), "its Job job is gone", id="Job gone"),
        pytest.param(world(jobs=(job("Complete"),)), "its Job job has ended (Complete)", id="Job complete"),
        pytest.param(
            world(jobs=(job("Failed", reason="DeadlineExceeded"),)),
            "its Job job has ended (DeadlineExceeded)",
            id="Job's deadline",
        ),
        pytest.param(world(jobs=(job("Failed", "False"),)), "", id="Job not failed"),
        pytest.param(world(jobs=(job("SuspendedNow"),)), "", id="another condition"),
        pytest.param(
            world(jobs=({"metadata": {"name": "job", "uid": "another"}},)),
            "its Job job is gone",
            id="another Job of that name",
        ),
        pytest.param(with_metadata(world(), **TWO_OWNERS), "", id="one of two Jobs gone"),
        pytest.param(with_metadata(world(jobs=()), **TWO_OWNERS), "its Job gone is gone", id="both Jobs gone"),
        pytest.param(with_metadata(world(jobs=()), ownerReferences=None), "", id="no Job, pod alive"),
        pytest.param(annotated(world(drivers=()), driver=None), "", id="no pod, Job alive"),
        pytest.param(
            with_metadata(world(jobs=(), drivers=()), ownerReferences=None, **NO_DRIVER), "", id="driver elsewhere"
        ),
        pytest.param(annotated(world(), deadline_seconds="60"), "", id="deadline now"),
        pytest.param(annotated(world(), deadline_seconds="59"), "its deadline of 59 s is over", id="deadline over"),
        pytest.param(annotated(world(), deadline_seconds="9" * 5000), "", id="a number too long to read"),
        pytest.param(annotated(world(), deadline_seconds="٣"), "", id="a digit of another script"),
        pytest.param(annotated(world(), deadline_seconds="-1"), "", id="a deadline before its start"),
        pytest.param(world("warm", jobs=(), drivers=()), "", id="shared, creator gone"),
        pytest.param(
            annotated(world("warm", jobs=(), drivers=()), deadline_seconds="59"),
            "its deadline of 59 s is over",
            id="shared, deadline over",
        ),
        pytest.param(with_metadata(world(drivers=()), deletionTimestamp=ago(1)), "", id="is being deleted"),
        pytest.param(with_metadata(world(drivers=()), creationTimestamp=ago(4)), "", id="has just been made"),
        pytest.param(with_metadata(world(drivers=()), labels=None), "", id="without our labels"),
        pytest.param(
            with_metadata(world(drivers=()), labels={"app.kubernetes.io/part-of": "tidepool"}),
            "",
            id="with half of our labels",
        ),
    ],
)
def test_a_cluster_goes_when_its_driver_has_ended_or_its_time_is_over(observation: Observation, reason: str) -> None:
    assert reasons(observation) == ({"DaskCluster": reason} if reason else {})


@pytest.mark.parametrize(
    ("run", "ended", "created", "goes"),
    [
        (RUN, 61, 600, True),
        (RUN, 59, 600, False),  # its driver closes it
        (RUN, 300, 200, False),  # of a later execution of the run
        (str(UUID(int=8)), 300, 600, False),
    ],
)
def test_a_cluster_whose_run_has_ended_goes_when_its_driver_had_time_to_close_it(
    run: str, ended: int, created: int, *, goes: bool
) -> None:
    found = leftovers(
        with_metadata(world(), creationTimestamp=ago(created)), {run: NOW - timedelta(seconds=ended)}, NOW
    )
    assert [(each.run, each.reason) for each in found] == ([(RUN, f"its flow run {RUN} has ended")] if goes else [])


def test_parts_without_a_cluster_go() -> None:
    assert reasons(world(clusters=(), drivers=(), jobs=())) == ORPHANED_PARTS


def test_parts_of_a_predecessor_of_the_same_name_go() -> None:
    owned = dict.fromkeys(("DaskWorkerGroup", "DaskAutoscaler"), "its Dask cluster c is gone")
    assert reasons(with_metadata(world(), uid="uid-of-a-successor")) == owned, "the others do not say whose they are"


@pytest.mark.parametrize("changed", [{"labels": {"dask.org/cluster-name": "c"}}, {"creationTimestamp": ago(4)}])
def test_parts_that_are_not_ours_or_have_just_been_made_stay(changed: Object) -> None:
    found = {kind: ({"metadata": each["metadata"] | changed},) for kind, each in made().items()}
    del found["DaskCluster"]
    assert reasons(world(clusters=(), parts=found)) == {}


def test_a_leftover_says_what_it_is() -> None:
    [found] = leftovers(world(drivers=()), {}, NOW)
    assert (found.kind, found.namespace, found.name, found.uid, found.run) == ("DaskCluster", "ns", "c", "uid-c", RUN)


@given(dead=st.sets(st.integers(0, 19)))
def test_exactly_the_dead_go(dead: set[int]) -> None:
    def named(number: int) -> Object:
        [cluster] = annotated(world(), driver=f"driver-{number}").clusters
        return {"metadata": cluster["metadata"] | {"name": f"c-{number}", "uid": f"uid-{number}"}}

    drivers = tuple(pod(name=f"driver-{number}") for number in range(20) if number not in dead)
    observation = world(clusters=tuple(map(named, range(20))), drivers=drivers, parts={})
    assert {each.name for each in leftovers(observation, {}, NOW)} == {f"c-{number}" for number in dead}
