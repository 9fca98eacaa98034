"""What a user adds to a component's pods arrives there, and only there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helm.generate import POD
from tests.helm.conftest import ChartError, Manifest, checked, need, template

COMPONENTS = ("server", "services", "worker", "operator", "exporter")
SECRET = {"name": "PROXY_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "proxy", "key": "password"}}}
ADDED: dict[str, Any] = {
    "nodeSelector": {"pool": "platform"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "priorityClassName": "urgent",
    "annotations": {"mesh": "off"},
    "labels": {"team": "data"},
    "env": [SECRET],
    "volumes": [{"name": "certificates", "configMap": {"name": "bundle"}}],
    "volumeMounts": [{"name": "certificates", "mountPath": "/etc/bundle"}],
    "securityContext": {"runAsUser": 20000},
}


def deployments(component: str, pod: dict[str, Any]) -> dict[str, Manifest]:
    """Return the pod templates of all components, by component, with additions to the pods of one."""
    need("helm", "kubeconform")
    general = {"nodeSelector": {"os": "linux"}, "tolerations": [{"key": "all", "operator": "Exists"}]}
    more = [f"--set-json={key}={json.dumps(value)}" for key, value in {**general, f"{component}.pod": pod}.items()]
    objects = checked(template(("production",), (("services__replicas", "1"),), *more))
    found = [each["spec"]["template"] for each in objects if each["kind"] == "Deployment"]
    return {each["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in found}


@pytest.mark.parametrize("component", COMPONENTS)
def test_what_is_added_to_a_component_is_in_its_pods_only(component: str) -> None:
    assert ADDED.keys() == POD.keys(), "every key is tried"
    before, after = deployments(component, {}), deployments(component, ADDED)
    assert before.keys() == after.keys() >= set(COMPONENTS)
    assert {name for name in after if after[name] != before[name]} == {component}

    old, new = before[component], after[component]
    assert new["metadata"]["labels"] == old["metadata"]["labels"] | {"team": "data"}
    assert new["metadata"]["annotations"] == old["metadata"].get("annotations", {}) | {"mesh": "off"}
    spec = new["spec"]
    assert spec["nodeSelector"] == {"os": "linux", "pool": "platform"}
    assert [each["key"] for each in spec["tolerations"]] == ["all", "dedicated"]
    for key in ("affinity", "topologySpreadConstraints", "priorityClassName"):
        assert spec[key] == ADDED[key]
    assert spec["volumes"] == [old["spec"]["volumes"][0], *ADDED["volumes"], *old["spec"]["volumes"][1:]]
    assert spec["securityContext"] == old["spec"]["securityContext"] | {"runAsUser": 20000}
    container, others = spec["containers"][0], spec["containers"][1:]
    assert container["env"] == [*old["spec"]["containers"][0]["env"], SECRET]
    assert ADDED["volumeMounts"][0] in container["volumeMounts"]
    assert others == old["spec"]["containers"][1:]


@pytest.mark.parametrize(
    ("pod", "sentence"),
    [
        ({"nodeSelectors": {}}, "additional properties 'nodeSelectors' not allowed"),
        ({"labels": {"app.kubernetes.io/name": "x"}}, "invalid propertyName 'app.kubernetes.io/name'"),
        ({"volumes": [{"name": "tmp", "emptyDir": {}}]}, "/server/pod/volumes/0/name"),
        ({"volumeMounts": [{"name": "x", "mountPath": "/tmp"}]}, "/server/pod/volumeMounts/0/mountPath"),
        ({"env": [{"value": "x"}]}, "missing property 'name'"),
    ],
)
def test_what_would_replace_a_part_of_the_chart_is_refused(pod: dict[str, Any], sentence: str) -> None:
    need("helm")
    with pytest.raises(ChartError) as caught:
        deployments("server", pod)
    assert sentence in str(caught.value)
