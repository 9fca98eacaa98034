"""The rules for flow runs: as policies in k8s/cluster, and their parameters in the chart."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tidepool.operate.object_rules import AMOUNTS, LISTS, NUMBERS, RULES
from tidepool.settings import KubernetesSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Manifest, Render

    from tests.helm.layouts import Layout


ROOT = Path(__file__).resolve().parents[2]


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_admission", ROOT / "k8s" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(manifests: list[Manifest], namespace: str = "") -> dict[str, str]:
    [found] = [
        each
        for each in manifests
        if each["kind"] == "ConfigMap"
        and each["metadata"]["name"] == "tidepool-flow-run-rules"
        and namespace in {"", each["metadata"]["namespace"]}
    ]
    return dict(found["data"])


def test_the_policies_are_generated_from_the_rules() -> None:
    made = generator()
    assert made.TARGET.read_text() == made.output(), "run `make admission-policies`"


def test_every_policy_is_bound_and_denies_without_its_parameters(kustomize: Callable[[str], list[Manifest]]) -> None:
    found = kustomize("cluster")
    policies = {each["metadata"]["name"]: each["spec"] for each in found if each["kind"].endswith("AdmissionPolicy")}
    bindings = {each["metadata"]["name"]: each["spec"] for each in found if each["kind"].endswith("PolicyBinding")}
    assert policies.keys() == bindings.keys()
    assert policies.keys() == {f"tidepool-{kind.lower()}" for kind in (*RULES, "DaskCluster-of-a-run")}
    for name, spec in policies.items():
        assert spec["failurePolicy"] == "Fail", name
        assert spec["matchConstraints"]["namespaceSelector"] == {"matchLabels": {"tidepool.dev/flow-runs": "true"}}
        assert bindings[name]["policyName"] == name
        assert bindings[name]["validationActions"] == ["Deny"]
        without = "Allow" if name == "tidepool-secret" else "Deny"
        assert bindings[name].get("paramRef", {}).get("parameterNotFoundAction", without) == without
        assert ("paramKind" in spec) == ("paramRef" in bindings[name]), name


def test_the_chart_has_every_parameter(render: Render, layout: Layout) -> None:
    manifests = render("production", **layout.values)
    for namespace in layout.teams.values():
        assert parameters(manifests, namespace).keys() == {*LISTS, *AMOUNTS, *NUMBERS}


def test_the_policies_find_the_charts_config_map(render: Render) -> None:
    labels = generator().PARAMETERS["matchLabels"].items()
    found = [each for each in render() if labels <= each["metadata"].get("labels", {}).items()]
    assert [(each["kind"], each["metadata"]["name"]) for each in found] == [("ConfigMap", "tidepool-flow-run-rules")]


def test_the_parameters_follow_the_values(render: Render) -> None:
    found = parameters(render("production"))
    assert found["repositories"] == "ghcr.io/example/tidepool"
    assert found["images"] == "", "a digest is given, so no tag is allowed"
    assert found["secrets"] == "tidepool-credentials,tidepool-flow-run-api", "not the password of the platform"
    assert found["configMaps"] == found["serviceAccounts"] == "tidepool-flow-run"
    assert found["priorityClasses"] == "tidepool-driver,tidepool-worker"
    assert found["nodeSelectors"] == "node-pool"
    assert found["tolerations"] == "spot"


def test_caps_are_those_of_the_settings(render: Render) -> None:
    settings = KubernetesSettings()
    found = parameters(render())
    assert found["maxWorkers"] == str(settings.max_workers)
    assert found["maxCpu"] == f"{settings.max_cpu:g}"
    assert found["maxMemory"] == f"{settings.max_memory_gib:g}Gi"
    values = {"flowRuns__env__TIDEPOOL_KUBERNETES_MAX_WORKERS": '"7"'}
    assert parameters(render(**values))["maxWorkers"].strip('"') == "7"


@pytest.mark.parametrize(
    ("repository", "names"),
    [
        ("tidepool", "tidepool,docker.io/library/tidepool"),
        ("example/tidepool", "example/tidepool,docker.io/example/tidepool"),
        ("localhost:5000/tidepool", "localhost:5000/tidepool"),
        ("registry.example.com/a/tidepool", "registry.example.com/a/tidepool"),
    ],
)
def test_an_image_may_have_the_name_that_the_node_reports(render: Render, repository: str, names: str) -> None:
    assert parameters(render(image__repository=repository))["repositories"] == names
