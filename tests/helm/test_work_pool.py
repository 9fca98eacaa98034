"""The base job template, and the Job that Prefect's own worker creates from it."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import yaml

if TYPE_CHECKING:
    from conftest import Manifest, Render

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = json.loads((ROOT / "k8s" / "work-pool" / "base-job-template.json").read_text())
IMAGE = "registry/tidepool@sha256:" + "1" * 64


def job(template: dict[str, Any] = TEMPLATE, **variables: Any) -> Manifest:
    """Return the Job that the worker would create for a flow run."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    values = {"image": IMAGE, **variables}
    jsonschema.validate(values, template["variables"])
    # Nothing in the template refers to the server, so the client is never used.
    unreachable = PrefectClient("http://127.0.0.1:1/api")
    make = KubernetesWorkerJobConfiguration.from_template_and_values(template, values, client=unreachable)
    configuration = asyncio.run(make)
    configuration.prepare_for_flow_run(FlowRun(id=uuid.UUID(int=1), flow_id=uuid.UUID(int=2), name="blue-heron"))
    manifest: Manifest = configuration.job_manifest
    return manifest


def container(manifest: Manifest) -> Manifest:
    found: Manifest = manifest["spec"]["template"]["spec"]["containers"][0]
    return found


def env(manifest: Manifest) -> dict[str, Any]:
    entries = container(manifest)["env"]
    assert len({each["name"] for each in entries}) == len(entries), "a variable is set twice"
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in entries}


def test_the_driver_is_restricted() -> None:
    spec = job()["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["enableServiceLinks"] is False
    assert container(job())["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_driver_knows_the_name_of_its_job() -> None:
    variables = env(job())
    job_uid = variables["TIDEPOOL_KUBERNETES_JOB_UID"]["fieldRef"]["fieldPath"]
    assert job_uid == "metadata.labels['batch.kubernetes.io/controller-uid']"
    job_name = variables["TIDEPOOL_KUBERNETES_JOB_NAME"]["fieldRef"]["fieldPath"]
    assert job_name == "metadata.labels['batch.kubernetes.io/job-name']"
    assert variables["TIDEPOOL_KUBERNETES_POD_NAME"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert variables["TIDEPOOL_KUBERNETES_NAMESPACE"]["fieldRef"]["fieldPath"] == "metadata.namespace"


def test_its_variables_are_settings() -> None:
    from tidepool.settings import reject_unknown

    reject_unknown(env(job()))


def test_no_second_execution_unless_the_deployment_asks() -> None:
    assert env(job())["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "relinquish"
    asked = env(job(on_termination="reschedule"))
    assert asked["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    # Kubernetes never starts a second pod either. With any other limit Prefect changes the behaviour by itself.
    assert job()["spec"]["backoffLimit"] == 0
    assert job()["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_a_deployments_variables_add_to_the_pools() -> None:
    variables = env(job(env={"TIDEPOOL_SMALL_WORKERS": "1", "PREFECT_CLIENT_MAX_RETRIES": "3"}))
    assert variables["TIDEPOOL_SMALL_WORKERS"] == "1"
    assert variables["PREFECT_CLIENT_MAX_RETRIES"] == "3"
    assert variables["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


def test_variables_reach_the_job() -> None:
    manifest = job(
        cpu_request="2", memory_limit="4Gi", priority_class="high", node_selector={"pool": "a"},
        tolerations=[{"key": "b", "operator": "Exists"}], deadline_seconds=900, finished_job_ttl=60,
        termination_grace_period_seconds=90, image_pull_secrets=[{"name": "registry"}], tmp_size_limit="5Gi",
    )  # fmt: skip
    spec = manifest["spec"]["template"]["spec"]
    assert container(manifest)["resources"]["requests"]["cpu"] == "2"
    assert container(manifest)["resources"]["limits"]["memory"] == "4Gi"
    assert spec["priorityClassName"] == "high"
    assert spec["nodeSelector"] == {"pool": "a"}
    assert spec["tolerations"] == [{"key": "b", "operator": "Exists"}]
    assert spec["terminationGracePeriodSeconds"] == 90
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["volumes"] == [{"name": "tmp", "emptyDir": {"sizeLimit": "5Gi"}}]
    assert manifest["spec"]["activeDeadlineSeconds"] == 900
    assert manifest["spec"]["ttlSecondsAfterFinished"] == 60


@pytest.mark.parametrize("wrong", [{"image": None}, {"on_termination": "again"}, {"deadline_seconds": 1}])
def test_invalid_job_variables_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        job(**wrong)


def test_every_variable_is_used_and_every_placeholder_is_a_variable() -> None:
    from prefect.utilities.templating import find_placeholders

    used = {each.name for each in find_placeholders(TEMPLATE["job_configuration"])}
    # `env` is merged into job_configuration.env by Prefect itself.
    assert used | {"env"} == set(TEMPLATE["variables"]["properties"])


def test_job_variables_of_prefect_yaml_are_variables_of_the_pool() -> None:
    from tidepool.deploy.config.environments import load

    schema = {**TEMPLATE["variables"], "required": [], "additionalProperties": False}
    for environment in ("production", "staging"):
        for deployment in load(ROOT, environment, image=IMAGE)["deployments"]:
            jsonschema.validate(deployment["work_pool"]["job_variables"], schema)


def installed(manifests: list[Manifest]) -> dict[str, Any]:
    found = next(
        each for each in manifests if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "tidepool-work-pool"
    )
    template: dict[str, Any] = json.loads(found["data"]["base-job-template.json"])
    return template


def test_the_chart_changes_defaults_only(render: Render) -> None:
    template = installed(render("production"))
    changed = {
        name: variable["default"]
        for name, variable in template["variables"]["properties"].items()
        if variable != TEMPLATE["variables"]["properties"][name]
    }
    values = yaml.safe_load((ROOT / "helm" / "tidepool" / "ci" / "production-values.yaml").read_text())
    assert changed == {
        "image": f"{values['image']['repository']}@{values['image']['digest']}",
        "namespace": "flows",
        "priority_class": "tidepool-driver",
        "memory_limit": "2Gi",
        "node_selector": {"node-pool": "on-demand"},
    }
    assert template["job_configuration"] == TEMPLATE["job_configuration"]


def test_the_installed_template_makes_a_job(render: Render) -> None:
    spec = job(installed(render("production")))["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == "tidepool-flow-run"
    assert spec["priorityClassName"] == "tidepool-driver"
    names = [next(iter(each.values()))["name"] for each in container(job(installed(render("production"))))["envFrom"]]
    assert names == ["tidepool-flow-run", "tidepool-credentials"]
