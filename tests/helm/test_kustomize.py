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
def test_a_namespace_is_restricted_and_bounded(kustomize: Build, overlay: str, namespace: str) -> None:
    found = {each["kind"]: each for each in kustomize(f"overlays/{overlay}")}
    assert found.keys() == {"Namespace", "ResourceQuota", "LimitRange"}
    assert found["Namespace"]["metadata"]["name"] == namespace
    assert found["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert found["ResourceQuota"]["metadata"]["namespace"] == found["LimitRange"]["metadata"]["namespace"] == namespace
    hard = found["ResourceQuota"]["spec"]["hard"]
    assert hard.keys() >= {"requests.cpu", "requests.memory", "limits.memory", "pods", "count/jobs.batch"}
    # A quota on CPU limits would refuse every pod of ours: they have requests only.
    assert "limits.cpu" not in hard
    assert hard["services.loadbalancers"] == "0"


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
