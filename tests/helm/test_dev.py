"""Development on a small cluster: overlay, store, values and environment fit each other, and a small node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.helm.conftest import pod_spec
from tidepool.deploy.config import environments
from tidepool.operate.rules import quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from conftest import Manifest, Render

ROOT = Path(__file__).resolve().parents[2]
VALUES = yaml.safe_load((ROOT / "helm/tidepool/ci/dev-values.yaml").read_text())
# What kind's own pods ask for on its one node: DNS, etcd, API server, controller manager, scheduler, network.
KIND_CORES, KIND_MEMORY = 0.95, 290 * 2**20


@pytest.fixture
def store(kustomize: Callable[[str], list[Manifest]]) -> dict[str, Manifest]:
    """The S3 server's objects by kind."""
    return {each["kind"]: each for each in kustomize("overlays/dev/store")}


def names(manifests: Iterable[Manifest]) -> list[str]:
    return sorted(each["metadata"]["name"] for each in manifests if each["kind"] == "Namespace")


def test_the_store_is_between_the_namespaces_of_overlay_and_values(
    kustomize: Callable[[str], list[Manifest]], store: dict[str, Manifest]
) -> None:
    platform, runs = names(kustomize("overlays/dev"))
    assert {each["metadata"]["namespace"] for each in store.values()} == {platform}
    assert VALUES["flowRuns"]["namespace"] == runs
    [rule] = VALUES["networkPolicy"]["storage"]
    [peer] = rule["to"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": platform}
    pod = store["Deployment"]["spec"]["template"]
    assert peer["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    ports = [each["containerPort"] for each in pod["spec"]["containers"][0]["ports"]]
    assert [each["port"] for each in rule["ports"]] == ports == [store["Service"]["spec"]["ports"][0]["port"]]
    [ingress] = store["NetworkPolicy"]["spec"]["ingress"]
    assert {each["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for each in ingress["from"]} == {
        runs
    }
    assert [each["port"] for each in ingress["ports"]] == ports


def test_the_guide_has_the_values() -> None:
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    [block] = [each.split("```", 1)[0] for each in guide.split("```yaml\n")[1:]]
    shown = yaml.safe_load(block)
    assert shown["networkPolicy"] == VALUES["networkPolicy"]
    assert shown["flowRuns"]["namespace"] == VALUES["flowRuns"]["namespace"]
    assert shown["flowRuns"]["env"].items() <= VALUES["flowRuns"]["env"].items()


def test_pod_security_lets_the_store_in(store: dict[str, Manifest]) -> None:
    pod = store["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        # One image, whose name a person or `make kind-demo` replaces.
        assert container["image"] == "localhost:5000/tidepool-store:1"


def test_the_registered_environment_is_paused_and_needs_no_data_from_elsewhere(render: Render) -> None:
    job = next(each for each in render("dev") if each["metadata"]["name"] == "tidepool-registration")
    [container] = pod_spec(job)["containers"]  # type: ignore[index]
    registered = {each["name"]: each.get("value") for each in container["env"]}["ENVIRONMENT"]
    assert registered == "dev"
    deployments = environments.load(ROOT, registered)["deployments"]
    assert all(each["paused"] for each in deployments)
    assert {each["parameters"].get("environment") for each in deployments if each["name"] == "drift-report"} == {"dev"}
    assert [each["name"] for each in deployments if "://" in str(each["parameters"])] == []
    # Their defaults are public data.
    for name in ("most-generous-riders", "taxi-tip-amounts", "image-etl"):
        given = next(each for each in deployments if each["name"] == name)["parameters"]
        sample = Path(given.get("source") or given["data_url"])
        assert (ROOT / "samples" / sample.name).is_file()


def test_platform_and_two_runs_fit_a_node_of_two_cores_and_six_gib(render: Render, store: dict[str, Manifest]) -> None:
    pods = [
        spec
        for each in (*render("dev"), store["Deployment"])
        if each["kind"] == "Deployment"
        if (spec := pod_spec(each))
    ]
    requests = [each["resources"]["requests"] for spec in pods for each in spec["containers"]]
    cores = sum(quantity(each["cpu"]) or 0 for each in requests)
    memory = sum(quantity(each["memory"]) or 0 for each in requests)
    env, defaults = VALUES["flowRuns"]["env"], VALUES["workPool"]["defaults"]
    runs = VALUES["workPool"]["concurrencyLimit"]
    assert runs == 2
    cores += runs * (
        (quantity(defaults["cpu_request"]) or 0)
        + float(env["TIDEPOOL_KUBERNETES_SCHEDULER_CPU"])
        + 2 * float(env["TIDEPOOL_SMALL_CPU"])
    )
    gib = float(env["TIDEPOOL_KUBERNETES_SCHEDULER_MEMORY_GIB"]) + 2 * float(env["TIDEPOOL_SMALL_MEMORY_GIB"])
    memory += runs * ((quantity(defaults["memory_request"]) or 0) + gib * 2**30)
    assert cores + KIND_CORES <= 2
    assert memory + KIND_MEMORY <= 6 * 2**30
