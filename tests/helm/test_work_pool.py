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

from tests.helm.layouts import LAYOUTS, RELEASE
from tidepool.deploy.reconcile.work_pool import comparable, with_installed
from tidepool.operate.sweep.records import POLICY_VARIABLES, Policy, policy

if TYPE_CHECKING:
    from conftest import Manifest, Render

    from tests.helm.layouts import Layout

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = json.loads((ROOT / "k8s" / "work-pool" / "base-job-template.json").read_text())
IMAGE = "registry/tidepool@sha256:" + "1" * 64
# Job variables of version 0.1.0 that the chart sets now.
INSTALLED = ("namespace", "service_account_name", "credentials_secret", "settings_config_map", "image_pull_secrets",
             "image_pull_policy", "priority_class")  # fmt: skip


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
        cpu_request="2", memory_limit="4Gi", node_selector={"pool": "a"},
        tolerations=[{"key": "b", "operator": "Exists"}], deadline_seconds=900, finished_job_ttl=60,
        termination_grace_period_seconds=90, tmp_size_limit="5Gi",
    )  # fmt: skip
    spec = manifest["spec"]["template"]["spec"]
    assert container(manifest)["resources"]["requests"]["cpu"] == "2"
    assert container(manifest)["resources"]["limits"]["memory"] == "4Gi"
    assert spec["nodeSelector"] == {"pool": "a"}
    assert spec["tolerations"] == [{"key": "b", "operator": "Exists"}]
    assert spec["terminationGracePeriodSeconds"] == 90
    assert spec["volumes"] == [{"name": "tmp", "emptyDir": {"sizeLimit": "5Gi"}}]
    assert manifest["spec"]["activeDeadlineSeconds"] == 900
    assert manifest["spec"]["ttlSecondsAfterFinished"] == 60


def refused(template: dict[str, Any], **variables: Any) -> bool:
    """Return whether the Prefect server refuses job variables."""
    from prefect.utilities.schema_tools.validation import validate

    return bool(validate({"image": IMAGE, **variables}, template["variables"], allow_none_with_default=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": None},
        {"image": "registry/tidepool:latest"},
        {"on_termination": "again"},
        {"deadline_seconds": 1},
        {"deadline_seconds": 10_000_000},
        {"cpu_request": "1000"},
        {"cpu_limit": "100000m"},
        {"memory_limit": "1Ti"},
        {"tmp_size_limit": "1000Gi"},
        {"finished_job_ttl": 10_000_000},
        {"start_timeout_seconds": 29},
        {"start_timeout_seconds": "10m"},
        {"max_runtime_seconds": 59},
        {"on_crash": "retry"},
        {"on_crash": "retry 11"},
        {"on_crash": 3},
        {"after_outage": "newest"},
        # Read by nothing since Prefect's worker does not wait for its Jobs.
        {"pod_watch_timeout_seconds": 600},
        {"stream_output": True},
        {"labels": {"dask.org/component": "scheduler"}},
        {"labels": {"app.kubernetes.io/component": "server"}},
        {"labels": {"job-name": "another"}},
        {"tolerations": [{"operator": "Exists"}]},
        {"tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]},
        # What the chart sets is not a variable, in any spelling that Prefect knows.
        *({name: "x"} for name in INSTALLED),
        {"labels.dask.org/component": "scheduler"},
        {"image.x": "y"},
    ],
    ids=str,
)
def test_invalid_job_variables_are_refused(wrong: dict[str, Any]) -> None:
    assert refused(TEMPLATE, **wrong)


@pytest.mark.parametrize(
    "right",
    [
        {"cpu_request": "0.5", "cpu_limit": "20m", "memory_request": "256Mi", "memory_limit": "16Gi"},
        {"cpu_limit": None, "name": None, "labels": {"team": "media", "example.com/tier": "1"}},
        {"tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]},
        {"on_crash": "retry 10", "after_outage": "latest", "max_runtime_seconds": 60, "start_timeout_seconds": 30},
        {"on_crash": "none", "after_outage": "none", "max_runtime_seconds": None},
    ],
    ids=str,
)
def test_what_a_run_may_choose(right: dict[str, Any]) -> None:
    assert not refused(TEMPLATE, **right)
    job(**right)


def test_every_variable_is_used_and_every_placeholder_is_a_variable() -> None:
    from prefect.utilities.templating import find_placeholders

    used = {each.name for each in find_placeholders(TEMPLATE["job_configuration"])}
    # `env` is merged into job_configuration.env by Prefect itself.
    # The operator reads a run's policy from the server.
    assert used | {"env"} | set(POLICY_VARIABLES) == set(TEMPLATE["variables"]["properties"])
    assert not used & set(POLICY_VARIABLES)


def test_the_pools_defaults_are_the_policy_of_a_run_without_one() -> None:
    properties = TEMPLATE["variables"]["properties"]
    assert policy({name: properties[name]["default"] for name in POLICY_VARIABLES}) == policy() == Policy()


def test_each_value_that_the_pool_accepts_is_a_policy() -> None:
    properties = TEMPLATE["variables"]["properties"]
    retries = [policy({"on_crash": each}).crash_retries for each in properties["on_crash"]["enum"]]
    assert retries == list(range(11))
    outages = properties["after_outage"]["enum"]
    assert [policy({"after_outage": each}).after_outage for each in outages] == outages


def test_job_variables_of_prefect_yaml_are_variables_of_the_pool() -> None:
    from tidepool.deploy.config.environments import load

    schema = {**TEMPLATE["variables"], "required": []}
    for environment in ("production", "staging"):
        for deployment in load(ROOT, environment, image=IMAGE)["deployments"]:
            jsonschema.validate(deployment["work_pool"]["job_variables"], schema)


def installed(manifests: list[Manifest], suffix: str = "") -> dict[str, Any]:
    """Return the template that the chart writes to a team's work pool."""
    name = f"tidepool-work-pool{suffix}"
    [found] = [each for each in manifests if each["kind"] == "ConfigMap" and each["metadata"]["name"] == name]
    template: dict[str, Any] = json.loads(found["data"]["base-job-template.json"])
    return template


def default_image(template: dict[str, Any]) -> str:
    return str(template["variables"]["properties"]["image"]["default"])


def test_the_chart_changes_what_belongs_to_an_installation_only(render: Render, layout: Layout) -> None:
    """`tidepool apply` keeps exactly these parts when it writes the file of this repository."""
    manifests = render("production", **layout.values)
    for suffix in layout.teams:
        template = installed(manifests, suffix)
        assert template != TEMPLATE
        assert comparable(template) == comparable(TEMPLATE)
        assert with_installed(TEMPLATE, template) == template


def test_the_chart_sets_the_defaults_of_its_values(render: Render) -> None:
    template = installed(render("production"))
    changed = {
        name: variable["default"]
        for name, variable in template["variables"]["properties"].items()
        if variable.get("default") != TEMPLATE["variables"]["properties"][name].get("default")
    }
    values = yaml.safe_load((ROOT / "helm" / "tidepool" / "ci" / "production-values.yaml").read_text())
    assert changed == {
        "image": f"{values['image']['repository']}@{values['image']['digest']}",
        "memory_limit": "2Gi",
        "node_selector": {"node-pool": "on-demand"},
    }


def test_the_installed_template_makes_a_job(render: Render, layout: Layout) -> None:
    manifests = render("production", **{"image__pullSecrets[0]__name": "registry"}, **layout.values)
    for suffix, namespace in layout.teams.items():
        template = installed(manifests, suffix)
        made = job(template, image=default_image(template))
        spec = made["spec"]["template"]["spec"]
        assert made["metadata"]["namespace"] == template["job_configuration"]["namespace"] == namespace
        assert spec["serviceAccountName"] == "tidepool-flow-run"
        assert spec["priorityClassName"] == "tidepool-driver"
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
        names = [next(iter(each.values()))["name"] for each in container(made)["envFrom"]]
        assert names == ["tidepool-flow-run", "tidepool-credentials"]


def test_an_image_is_from_the_teams_repository(render: Render) -> None:
    own = {"teams__media__flowRuns__imageRepository": "ghcr.io/example/media"}
    manifests = render("production", **LAYOUTS["two teams"].values, **own)
    digest = "@sha256:" + "1" * 64
    ours, theirs = f"ghcr.io/example/tidepool{digest}", f"ghcr.io/example/media{digest}"
    assert (refused(installed(manifests), image=ours), refused(installed(manifests), image=theirs)) == (False, True)
    media = installed(manifests, "-media")
    assert (refused(media, image=ours), refused(media, image=theirs)) == (True, False)
    assert "default" not in media["variables"]["properties"]["image"], "each deployment names the team's image"


def test_without_a_digest_an_image_may_have_a_tag(render: Render) -> None:
    """A trial: the chart's default image, by tag, must be accepted."""
    template = installed(render("minimal", image__digest="", registration__enabled="false"))
    image = default_image(template)
    assert image == "tidepool:0.1.0"
    assert not refused(template, image=image)
    assert refused(template, image=f"another/{image}")


def test_a_team_inherits_and_changes(render: Render) -> None:
    own = {
        "teams__media__workPool__defaults__memory_limit": "3Gi",
        "teams__media__workPool__concurrencyLimit": "3",
        "teams__media__flowRuns__credentialsSecret": "media-credentials",
        "teams__media__flowRuns__env__TIDEPOOL_STORAGE_ROOT": "s3://media",
    }
    manifests = render("production", **LAYOUTS["two teams"].values, **own)
    template = installed(manifests, "-media")
    assert template["variables"]["properties"]["memory_limit"]["default"] == "3Gi"
    assert template["variables"]["properties"]["node_selector"]["default"] == {"node-pool": "on-demand"}
    assert (
        container(job(template, image=default_image(template)))["envFrom"][1]["secretRef"]["name"]
        == "media-credentials"
    )
    env = {
        each["metadata"]["namespace"]: each["data"]
        for each in manifests
        if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "tidepool-flow-run"
    }
    assert env["media-runs"] == {**env["runs"], "TIDEPOOL_STORAGE_ROOT": "s3://media"}
    limits = {
        each["metadata"]["name"]: next(
            variable["value"]
            for variable in each["spec"]["template"]["spec"]["containers"][0]["env"]
            if variable["name"] == "LIMIT"
        )
        for each in manifests
        if each["kind"] == "Job" and "work-pool" in each["metadata"]["name"]
    }
    assert limits == {"tidepool-work-pool": "40", "tidepool-work-pool-media": "3"}


def test_workers_and_operator_serve_the_namespaces_of_their_runs(render: Render) -> None:
    values = LAYOUTS["two teams"].values | {"flowRuns__formerNamespaces": "{flows}"}
    served = {}
    for each in render("production", **values):
        if each["kind"] == "Deployment":
            one = each["spec"]["template"]["spec"]["containers"][0]
            served[each["metadata"]["name"]] = ({v["name"]: v.get("value") for v in one["env"]}, one["args"])
    for name, pool in (("tidepool-worker", "kubernetes"), ("tidepool-worker-media", "media")):
        environment, arguments = served[name]
        assert f"--pool={pool}" in arguments
        # The operator says how drivers end: once, and with the reason.
        assert environment["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED"] == "false"
        assert environment["PREFECT_WORKER_ENABLE_CANCELLATION"] == "true"
    environment, arguments = served["tidepool-operator"]
    watched = [each.removeprefix("--namespace=") for each in arguments if each.startswith("--namespace=")]
    assert environment["TIDEPOOL_OPERATOR_NAMESPACES"].split() == watched == ["runs", "media-runs", "flows"]
    assert environment["TIDEPOOL_OPERATOR_WORK_POOLS"].split() == ["kubernetes", "media"]


def test_the_operator_asks_the_server_itself_with_the_platforms_password(render: Render) -> None:
    """Not the proxy of the flow runs: that one lets through what a flow run may do."""
    [operator] = (
        each
        for each in render("production")
        if (each["kind"], each["metadata"]["name"]) == ("Deployment", "tidepool-operator")
    )
    environment = {each["name"]: each for each in operator["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["PREFECT_API_URL"]["value"] == f"http://tidepool-server.{RELEASE}.svc:4200/api"
    assert environment["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"]["name"] == "tidepool-auth"
