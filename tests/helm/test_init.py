"""The repository that `tidepool init` writes: its values fit the package's chart, and its overlays fit its values."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.helm.conftest import DIGEST, checked, need, pod_spec, run
from tidepool.author import chart, init

if TYPE_CHECKING:
    from conftest import Manifest

NAMESPACES = {"dev": "shop-dev", "staging": "shop-staging", "production": "shop"}
OURS = Path(__file__).resolve().parents[2] / "helm" / "tidepool" / "ci"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    for name, text in init.texts(init.Answers("shop", "daily-means", "data", "tidepool==0.1.0")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    chart.write(folder / "build" / "platform")
    return folder


def values(shop: Path, environment: str) -> Manifest:
    found: Manifest = yaml.safe_load((shop / "helm" / f"{environment}-values.yaml").read_text())
    return found


@cache
def rendered(shop: Path, environment: str) -> list[Manifest]:
    """The chart's objects, with what `make install-chart` gives."""
    need("helm", "kubeconform")
    given = [f"--values={shop}/helm/{environment}-values.yaml", "--set=image.repository=localhost:5000/shop"]
    command = ["template", "tidepool", f"{shop}/build/platform/chart", f"--namespace={NAMESPACES[environment]}"]
    return checked(run("helm", *command, "--kube-version=1.34", f"--set=image.digest={DIGEST}", *given))


def test_its_namespaces_have_its_name_and_not_ours(shop: Path) -> None:
    texts = {path: path.read_text() for path in (shop / "k8s").rglob("*.yaml")}
    label = 'tidepool.dev/flow-runs: "true"'  # for the policies of the cluster, which all repositories share
    assert [path for path, text in texts.items() if "tidepool" in text.replace(label, "")] == []
    assert [path for path, text in texts.items() if label in text] == [shop / "k8s/base/flow-runs/namespace.yaml"]
    assert {path.parent.name for path in texts} == {*NAMESPACES, "flow-runs", "platform"}  # without ours for the store


@pytest.mark.parametrize("environment", NAMESPACES)
def test_helm_finds_nothing_in_its_values(shop: Path, environment: str) -> None:
    need("helm")
    given = [f"--values={shop}/helm/{environment}-values.yaml", f"--set=image.digest={DIGEST}"]
    assert "0 chart(s) failed" in run("helm", "lint", "--strict", f"{shop}/build/platform/chart", *given)


@pytest.mark.parametrize(("environment", "namespace"), NAMESPACES.items())
def test_the_overlay_has_the_namespaces_of_the_values(shop: Path, environment: str, namespace: str) -> None:
    need("kubectl", "kubeconform")
    objects = checked(run("kubectl", "kustomize", f"{shop}/k8s/overlays/{environment}"))
    found = {each["metadata"]["name"]: each["metadata"]["labels"] for each in objects if each["kind"] == "Namespace"}
    runs = values(shop, environment)["flowRuns"]["namespace"]
    assert found.keys() == {namespace, runs}
    assert [name for name, labels in found.items() if labels.get("tidepool.dev/flow-runs") == "true"] == [runs]
    assert {labels["environment"] for labels in found.values()} == {environment}
    bounds = {each["kind"]: each["metadata"]["namespace"] for each in objects if each["kind"] != "Namespace"}
    assert bounds == {"ResourceQuota": runs, "LimitRange": runs}
    assert {each["metadata"].get("namespace") for each in rendered(shop, environment)} - {None} == {namespace, runs}


@pytest.mark.parametrize("environment", NAMESPACES)
def test_every_pod_has_its_image_and_its_environment_is_registered(shop: Path, environment: str) -> None:
    specs = {each["metadata"]["name"]: spec for each in rendered(shop, environment) if (spec := pod_spec(each))}
    containers = [each for spec in specs.values() for each in spec["containers"]]
    assert {each["image"] for each in containers} == {f"localhost:5000/shop@{DIGEST}"}
    [registration] = specs["tidepool-registration"]["containers"]
    env = {each["name"]: each.get("value") for each in registration["env"]}
    assert env["ENVIRONMENT"] == environment
    assert environment == "production" or (shop / "environments" / f"{environment}.yaml").is_file()
    [test] = specs["tidepool-test"]["containers"]
    assert "daily-means/daily-means" in test["args"]


def test_the_objects_of_the_cluster_build(shop: Path) -> None:
    need("kubectl", "kubeconform")
    kinds = {each["kind"] for each in checked(run("kubectl", "kustomize", f"{shop}/build/platform/cluster"))}
    assert {"CustomResourceDefinition", "PriorityClass", "ValidatingAdmissionPolicy"} <= kinds


def test_production_is_that_of_the_chart(shop: Path) -> None:
    """The chart's complete example, but for names, the image, and what depends on nodes and monitoring."""
    ours = yaml.safe_load((OURS / "production-values.yaml").read_text().replace("tidepool-runs", "shop-runs"))
    theirs = values(shop, "production")
    assert theirs.pop("test") == {"deployment": "daily-means/daily-means"}
    del ours["image"], ours["networkPolicy"]["monitoring"], ours["workPool"]["defaults"]["node_selector"]
    assert ours["flowRuns"].pop("credentialsSecret") == "tidepool-credentials"  # the chart's default
    theirs["flowRuns"]["env"] = ours["flowRuns"]["env"] = {}
    assert theirs == ours


def test_development_is_that_of_the_chart(shop: Path) -> None:
    """The values for one small node, without the S3 server that only tidepool's own repository builds."""
    ours = yaml.safe_load((OURS / "dev-values.yaml").read_text().replace("tidepool-dev", "shop-dev"))
    theirs = values(shop, "dev")
    del ours["image"], ours["networkPolicy"], ours["flowRuns"]["env"]["TIDEPOOL_STORAGE_ROOT"], theirs["test"]
    assert theirs["flowRuns"]["env"].pop("TIDEPOOL_STORAGE_ROOT") == "file:///tmp/tidepool"
    assert theirs == ours
