"""The manifests for the administrator: every folder builds and has the expected content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Manifest

    Build = Callable[[str], list[Manifest]]

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = {"dev": "tidepool-dev", "staging": "tidepool-staging", "production": "tidepool"}


@pytest.mark.parametrize(("overlay", "namespace"), NAMESPACES.items())
def test_namespaces_are_restricted_and_those_of_runs_bounded(kustomize: Build, overlay: str, namespace: str) -> None:
    manifests = kustomize(f"overlays/{overlay}")
    namespaces = {each["metadata"]["name"]: each for each in manifests if each["kind"] == "Namespace"}
    runs = f"{namespace}-runs"
    assert namespaces.keys() == {namespace, runs}
    labels = {name: each["metadata"]["labels"] for name, each in namespaces.items()}
    assert {each["pod-security.kubernetes.io/enforce"] for each in labels.values()} == {"restricted"}
    # The admission policies of k8s/cluster apply where this label is.
    assert [name for name, each in labels.items() if each.get("tidepool.dev/flow-runs") == "true"] == [runs]
    found = {each["kind"]: each for each in manifests if each["kind"] != "Namespace"}
    assert found.keys() == {"ResourceQuota", "LimitRange"}
    assert found["ResourceQuota"]["metadata"]["namespace"] == found["LimitRange"]["metadata"]["namespace"] == runs
    hard = found["ResourceQuota"]["spec"]["hard"]
    assert hard.keys() >= {"requests.cpu", "requests.memory", "limits.memory", "pods", "count/jobs.batch"}
    # What runs make, or the operator for them, is bounded in number; in size by the admission policies.
    dask = {f"count/dask{each}s.kubernetes.dask.org" for each in ("cluster", "workergroup", "autoscaler")}
    assert hard.keys() >= {*dask, "count/secrets", "count/deployments.apps", "services"}
    # A quota on CPU limits would refuse every pod of ours: they have requests only.
    assert "limits.cpu" not in hard
    assert hard["services.loadbalancers"] == "0"


def test_the_namespaces_of_production_are_those_of_its_values(kustomize: Build) -> None:
    values = yaml.safe_load((ROOT / "helm" / "tidepool" / "ci" / "production-values.yaml").read_text())
    runs = [values["flowRuns"]["namespace"], *(each["namespace"] for each in values.get("teams", {}).values())]
    labelled = [
        each["metadata"]["name"]
        for each in kustomize("overlays/production")
        if each["kind"] == "Namespace" and "tidepool.dev/flow-runs" in each["metadata"]["labels"]
    ]
    assert labelled == runs


def test_overlays_are_all_tested() -> None:
    assert {path.name for path in (ROOT / "k8s" / "overlays").iterdir()} == NAMESPACES.keys()


def test_workers_are_evicted_first(kustomize: Build) -> None:
    classes = {each["metadata"]["name"]: each for each in kustomize("cluster") if each["kind"] == "PriorityClass"}
    order = sorted(classes, key=lambda name: classes[name]["value"])
    assert order == ["tidepool-worker", "tidepool-driver", "tidepool-platform"]
    assert classes["tidepool-worker"]["preemptionPolicy"] == "Never"
    assert not [name for name, each in classes.items() if each.get("globalDefault")]


def test_all_custom_resources_are_installed(kustomize: Build) -> None:
    names = {each["spec"]["names"]["kind"] for each in kustomize("crds")}
    assert names == {"DaskCluster", "DaskWorkerGroup", "DaskAutoscaler", "DaskJob"}


def paths(node: object) -> list[str]:
    """Return every value in the repository that a GitOps example points to."""
    if isinstance(node, dict):
        here = [node[key] for key in ("path", "chart") if isinstance(node.get(key), str)]
        files = [*node.get("valuesFiles", []), *(f"helm/tidepool/{each}" for each in node.get("valueFiles", []))]
        return here + files + [found for value in node.values() for found in paths(value)]
    return [found for item in node for found in paths(item)] if isinstance(node, list) else []


@pytest.mark.parametrize("folder", ["argocd", "flux"])
def test_gitops_examples_point_to_existing_files(folder: str) -> None:
    found = [
        path
        for file in (ROOT / "k8s" / folder).glob("*.yaml")
        for document in yaml.safe_load_all(file.read_text())
        for path in paths(document)
    ]
    assert len(found) >= 3
    for path in found:
        assert (ROOT / path).exists(), path


def test_flux_builds(kustomize: Build) -> None:
    assert {each["kind"] for each in kustomize("flux")} == {"GitRepository", "HelmRelease", "Kustomization"}
