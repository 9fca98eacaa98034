"""The Kubernetes objects of a Dask cluster, what they inherit from the driver, and the caps of a run."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import dask.config
import pytest
from dask.config import collect_env
from dask_kubernetes.operator.controller.controller import build_worker_deployment_spec
from distributed.security import Security
from distributed.versions import get_versions
from hypothesis import given
from hypothesis import strategies as st
from tornado.web import RequestHandler

from tidepool.compute.clusters.kubernetes import certificate, manifest
from tidepool.compute.clusters.kubernetes import driver as drivers
from tidepool.compute.clusters.kubernetes.driver import Driver, Run
from tidepool.errors import UsageError
from tidepool.settings import KubernetesSettings, SizeSettings

IMAGE = "registry.example.com/tidepool@sha256:" + "a" * 64
RUN = Run(id="0d9e1c1e-86a4-4a0f-9d47-6a8a5d1a0b11", flow="weekly-forecast", attempt=2)
KEY = "0123456789abcdef" * 2
SIZE = SizeSettings(workers=3, threads=2, cpu=0.5, memory_gib=1.5)


def rendered(*, driver: Driver | None = None, run: Run = RUN, shared: str = "", **settings: object) -> dict[str, Any]:
    return manifest.manifest(
        "weekly-forecast-0d9e1c1e-2-abcd",
        run=run,
        driver=driver or Driver(IMAGE),
        size=SIZE,
        settings=KubernetesSettings.model_validate(settings),
        dask_settings={"allowed-failures": "0"},
        shared=shared,
        versions="python 3.11.7",
    )


def pod_specs(of: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"scheduler": of["spec"]["scheduler"]["spec"], "worker": of["spec"]["worker"]["spec"]}


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container["env"]}


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_holds_flow_run_and_attempt() -> None:
    assert manifest.name_for(RUN, "abcd") == "weekly-forecast-0d9e1c1e-2-abcd"
    # Of the pod's uid, which admission compares.
    assert manifest.name_for(RUN, "abcd", "5f0c7a9e-1b2c") == "weekly-fore-0d9e1c1e-2-abcd-5f0c7a9e"


@given(flow=st.text(min_size=1), attempt=st.integers(1, 9999), inside=st.booleans())
def test_every_name_is_valid_for_the_operator(flow: str, attempt: int, *, inside: bool) -> None:
    name = manifest.name_for(Run(id=RUN.id if inside else "", flow=flow, attempt=attempt), "0f3a", "5f0c7a9e-1b2c")
    assert name.endswith("-5f0c7a9e")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-default-worker-0123456789") <= 63


@given(name=st.text(min_size=1))
def test_every_shared_name_is_valid(name: str) -> None:
    made = manifest.shared_name(name, IMAGE, KEY)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", made)
    assert len(made) <= manifest.NAME_LENGTH


def test_another_image_or_key_is_another_shared_cluster() -> None:
    other = IMAGE.replace("a" * 64, "b" * 64)
    assert manifest.shared_name("warm", IMAGE, KEY) == manifest.shared_name("warm", IMAGE, KEY)
    named = {manifest.shared_name("warm", image, key) for image in (IMAGE, other) for key in (KEY, "another" + KEY, "")}
    assert len(named) == 6


# --- caps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_workers": 5}, "^6 workers requested .* above TIDEPOOL_KUBERNETES_MAX_WORKERS=5; nothing was created"),
        ({"max_cpu": 2}, "^3 CPU cores requested .* above TIDEPOOL_KUBERNETES_MAX_CPU=2;"),
        ({"max_memory_gib": 8.9}, "^9 GiB of memory requested .* above TIDEPOOL_KUBERNETES_MAX_MEMORY_GIB=8.9;"),
        ({"adaptive_minimum": 4}, "ADAPTIVE_MINIMUM is 4, but the cluster may have at most 3 workers"),
    ],
)
def test_the_caps_hold_for_all_clusters_of_a_run_together(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        manifest.check_caps([SIZE, SIZE], KubernetesSettings(**settings))


def test_the_caps_themselves_are_allowed() -> None:
    manifest.check_caps([SIZE, SIZE], KubernetesSettings(max_workers=6, max_cpu=3, max_memory_gib=9))


# --- owner and labels -------------------------------------------------------------------------------------------------


def test_a_cluster_is_owned_by_its_runs_job() -> None:
    driver = Driver(IMAGE, owner=("job-x", "uid-x"), deployment="weekly")
    metadata = rendered(driver=driver)["metadata"]
    assert metadata["labels"]["tidepool.dev/flow-run-id"] == RUN.id
    assert metadata["annotations"]["tidepool.dev/deployment"] == "weekly"
    [owner] = metadata["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", "job-x", "uid-x")
    assert owner["blockOwnerDeletion"] is False, "the driver may not set a finalizer on Jobs"


def test_the_parts_of_a_shared_cluster_have_no_annotations_of_the_operator() -> None:
    """Another run had made it: admission refused the worker group of the run that joined."""
    cluster = rendered(shared="warm")
    own = dict(cluster["metadata"]["annotations"])
    cluster["metadata"] |= {"uid": "uid-c", "annotations": own | {"kopf.zalando.org/daskcluster_create": "{}"}}
    assert manifest.worker_group(cluster)["metadata"]["annotations"] == own


def test_a_shared_cluster_has_neither_owner_nor_run() -> None:
    metadata = rendered(driver=Driver(IMAGE, owner=("job-x", "uid-x")), shared="Warm one")["metadata"]
    assert metadata["labels"]["tidepool.dev/shared-cluster"] == "warm-one"
    assert "ownerReferences" not in metadata
    assert "tidepool.dev/flow-run-id" not in metadata["labels"]


def test_a_cluster_names_its_driver_for_admission() -> None:
    assert rendered(pod_name="blue-heron-x")["metadata"]["annotations"]["tidepool.dev/driver"] == "blue-heron-x"
    assert "tidepool.dev/driver" not in rendered()["metadata"]["annotations"]


def test_an_abandoned_cluster_ends_when_it_has_been_idle() -> None:
    assert rendered()["spec"]["idleTimeout"] > 0, "0 is without end"
    assert rendered(idle_timeout_seconds=77)["spec"]["idleTimeout"] == 77


def test_workers_reach_a_scheduler_that_is_not_ready_yet() -> None:
    service = rendered()["spec"]["scheduler"]["service"]
    assert service["publishNotReadyAddresses"] is True
    assert [(each["name"], each["port"], each["targetPort"]) for each in service["ports"]] == [
        ("tcp-comm", 8786, "tcp-comm"),
        ("http-dashboard", 8787, "http-dashboard"),
    ]


def test_a_cluster_tells_its_deadline() -> None:
    assert rendered(deadline_seconds=900)["metadata"]["annotations"]["tidepool.dev/deadline-seconds"] == "900"


def test_prefects_own_label_is_nowhere() -> None:
    """The operator copies labels to pods, and a pod with Prefect's label is taken for a driver."""
    assert "prefect.io/" not in json.dumps(rendered())


def test_workers_and_autoscaler_are_owned_by_the_cluster_from_the_start() -> None:
    made = rendered(adaptive_minimum=1)
    made["metadata"]["uid"] = "uid-c"
    group = manifest.worker_group(made)
    scaler = manifest.autoscaler(made, SIZE, KubernetesSettings(adaptive_minimum=1))
    assert group["metadata"]["name"] == f"{made['metadata']['name']}-default", "the name that the operator gives"
    assert group["metadata"]["labels"]["dask.org/component"] == "workergroup"
    assert group["spec"] == {"cluster": made["metadata"]["name"], "worker": made["spec"]["worker"]}
    for each in (group, scaler):
        assert each["metadata"]["ownerReferences"][0]["uid"] == "uid-c"
        assert each["metadata"]["labels"].items() >= made["metadata"]["labels"].items(), "the operator deletes ours"
    assert (scaler["spec"]["minimum"], scaler["spec"]["maximum"]) == (1, 3)
    assert made["spec"]["worker"]["replicas"] == 1


# --- the pods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["scheduler", "worker"])
def test_pods_pass_the_restricted_standard_with_a_read_only_root(component: str) -> None:
    spec = pod_specs(rendered())[component]
    [container] = spec["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["volumeMounts"] == [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "tls", "mountPath": "/run/tidepool/tls", "readOnly": True},
    ]
    tmp, tls = spec["volumes"]
    assert tmp["emptyDir"]["sizeLimit"]
    assert tls["secret"] == {"secretName": "weekly-forecast-0d9e1c1e-2-abcd-dask-tls", "defaultMode": 0o440}


@pytest.mark.parametrize("component", ["scheduler", "worker"])
def test_pods_run_as_the_user_and_group_of_the_image(component: str) -> None:
    spec = pod_specs(rendered())[component]
    user = f"USER {spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}"
    assert user in (Path(__file__).parents[2] / "Dockerfile").read_text().splitlines()


def test_workers_have_the_scratch_space_of_the_settings() -> None:
    specs = pod_specs(rendered(scratch_gib=2.5))
    assert specs["worker"]["volumes"][0] == {"name": "tmp", "emptyDir": {"sizeLimit": "2560Mi"}}
    assert specs["scheduler"]["volumes"][0] == {"name": "tmp", "emptyDir": {"sizeLimit": "1024Mi"}}


@pytest.mark.parametrize("component", ["scheduler", "worker"])
def test_dask_pods_only_talk_with_the_clusters_key(component: str) -> None:
    [container] = pod_specs(rendered())[component]["containers"]
    given = collect_env(variables(container))["distributed"]["comm"]
    with dask.config.set({"distributed.comm": dask.config.merge(dask.config.get("distributed.comm"), given)}):
        security = Security()
    assert security.require_encryption is True
    assert security.get_tls_config_for_role(component) == {
        "ca_file": "/run/tidepool/tls/tls.crt",
        "ciphers": None,
        "cert": "/run/tidepool/tls/tls.crt",
        "key": "/run/tidepool/tls/tls.key",
    }
    assert security.get_tls_config_for_role("client")["key"] == "/run/tidepool/tls/tls.key", "of `get_dask_client`"


def test_workers_look_for_their_scheduler_by_tls() -> None:
    """The operator sets an address for TCP where there is none."""
    made = rendered()
    [scheduler] = pod_specs(made)["scheduler"]["containers"]
    assert "--protocol=tls" in scheduler["args"]
    group = manifest.worker_group({**made, "metadata": {**made["metadata"], "uid": "u"}})
    deployment = build_worker_deployment_spec("g", "ns", "c", "u", group["spec"]["worker"]["spec"], {}, {})
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    addresses = [each["value"] for each in container["env"] if each["name"] == "DASK_SCHEDULER_ADDRESS"]
    assert addresses == ["tls://weekly-forecast-0d9e1c1e-2-abcd-scheduler:8786"]


def test_a_worker_gives_each_library_one_thread_as_dasks_nanny_does() -> None:
    nannys = dask.config.get("distributed.nanny.pre-spawn-environ")
    assert {name: str(value) for name, value in nannys.items()} == manifest.WORKER_VARIABLES
    [worker] = pod_specs(rendered())["worker"]["containers"]
    assert manifest.WORKER_VARIABLES.items() <= variables(worker).items()


def test_a_deployments_own_number_of_threads_stays() -> None:
    own = {"name": "OMP_NUM_THREADS", "value": "4"}
    [worker] = pod_specs(rendered(driver=Driver(IMAGE, env=[own])))["worker"]["containers"]
    assert [each for each in worker["env"] if each["name"] == "OMP_NUM_THREADS"] == [own]


def test_without_tls_nothing_is_mounted_and_nothing_required() -> None:
    made = rendered(tls=False)
    assert "tls" not in json.dumps(made).lower()
    assert "tcp://weekly-forecast-0d9e1c1e-2-abcd-scheduler:8786" in json.dumps(made)


def test_the_secret_of_a_cluster_goes_with_it_and_never_changes() -> None:
    made = rendered()
    made["metadata"]["uid"] = "uid-c"
    identity = certificate.own()
    secret = manifest.secret(made, identity)
    assert secret["metadata"]["name"] == "weekly-forecast-0d9e1c1e-2-abcd-dask-tls"
    assert secret["metadata"]["ownerReferences"][0]["uid"] == "uid-c"
    assert (secret["type"], secret["immutable"]) == ("kubernetes.io/tls", True)
    assert secret["stringData"] == {"tls.crt": identity.certificate, "tls.key": identity.key}


def test_only_an_adaptive_clusters_http_server_takes_more_than_questions() -> None:
    """`/api/v1/retire_workers`, and nothing else of the routes that are served, has a method other than GET."""

    def changes(made: dict[str, Any]) -> set[str]:
        [scheduler] = pod_specs(made)["scheduler"]["containers"]
        routes = collect_env(variables(scheduler))["distributed"]["scheduler"]["http"]["routes"]
        handlers = [each for name in routes for each in importlib.import_module(name).routes]
        methods = [method for method in RequestHandler.SUPPORTED_METHODS if method not in {"GET", "HEAD", "OPTIONS"}]
        return {
            path
            for path, handler, _ in handlers
            if any(getattr(handler, each.lower()) is not RequestHandler._unimplemented_method for each in methods)
        }

    assert changes(rendered()) == set()
    assert changes(rendered(adaptive_minimum=1)) == {"/api/v1/retire_workers"}


def test_workers_get_their_size() -> None:
    made = rendered()
    [worker] = pod_specs(made)["worker"]["containers"]
    assert made["spec"]["worker"]["replicas"] == 3
    assert worker["resources"] == {"requests": {"cpu": "500m", "memory": "1536Mi"}, "limits": {"memory": "1536Mi"}}
    assert {"--nthreads=2", "--memory-limit=1536MiB", "--no-nanny"} <= set(worker["args"])
    assert variables(worker)["OMP_NUM_THREADS"] == "1", "else NumPy takes every core of the node"
    assert worker["args"][:3] == ["python", "-m", "distributed.cli.dask_worker"], "`dask` imports what others add to it"


def test_a_worker_does_not_pause_for_memory_that_its_libraries_hold() -> None:
    """It paused at 80 % and never continued: 410 of 512 MiB were imports. The flow waited for a worker that existed."""
    [worker] = pod_specs(rendered())["worker"]["containers"]
    assert collect_env(variables(worker))["distributed"]["worker"]["memory"]["pause"] is False


def test_the_scheduler_gets_the_drivers_dask_settings() -> None:
    [scheduler] = pod_specs(rendered())["scheduler"]["containers"]
    assert variables(scheduler)["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] == "0"
    assert "livenessProbe" not in scheduler, "a scheduler that is killed for being busy takes the run with it"


def test_workers_go_to_spot_nodes_and_the_scheduler_stays_with_the_driver() -> None:
    driver = Driver(
        IMAGE,
        placement={
            "nodeSelector": {"pool": "on-demand"},
            "tolerations": [{"key": "team"}],
            "priorityClassName": "high",
            "affinity": {"nodeAffinity": {}},
            "imagePullSecrets": [{"name": "pull"}],
        },
    )
    specs = pod_specs(
        rendered(
            driver=driver,
            worker_node_selector={"pool": "spot"},
            worker_tolerations=[{"key": "spot", "operator": "Exists"}],
            worker_priority_class="low",
        )
    )
    assert specs["scheduler"]["nodeSelector"] == {"pool": "on-demand"}
    assert specs["scheduler"]["priorityClassName"] == "high"
    assert specs["worker"]["nodeSelector"] == {"pool": "spot"}
    assert specs["worker"]["tolerations"] == [{"key": "team"}, {"key": "spot", "operator": "Exists"}]
    assert specs["worker"]["priorityClassName"] == "low"
    assert "affinity" not in specs["worker"]
    assert specs["worker"]["imagePullSecrets"] == [{"name": "pull"}]


# --- what Dask pods inherit -------------------------------------------------------------------------------------------


def driver_pod(**status: object) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "p",
            "labels": {"prefect.io/deployment-name": "weekly"},
            "ownerReferences": [{"kind": "Job", "name": "job-y", "uid": "uid-y"}],
        },
        "spec": {
            "nodeSelector": {"pool": "on-demand"},
            "tolerations": [{"key": "node.kubernetes.io/not-ready"}, {"key": "team"}],
            "containers": [
                {
                    "name": "prefect-job",
                    "image": "registry.example.com/tidepool:v1",
                    "env": [
                        {"name": "PREFECT_API_URL", "value": "http://server/api"},
                        {"name": "PREFECT_API_AUTH_STRING", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}},
                        {"name": "PREFECT__FLOW_RUN_ID", "value": RUN.id},
                        {"name": "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "value": "crash"},
                        {"name": "TIDEPOOL_KUBERNETES_POD_NAME", "value": "p"},
                        {"name": "TIDEPOOL_STORAGE_ROOT", "value": "s3://bucket"},
                    ],
                    "envFrom": [{"secretRef": {"name": "tidepool-credentials"}}],
                }
            ],
        },
        "status": status,
    }


def test_dask_pods_inherit_the_drivers_variables_but_not_its_identity() -> None:
    driver = drivers.driver_of(driver_pod(), KubernetesSettings(job_name="job-x", job_uid="uid-x"))
    names = [each["name"] for each in driver.env]
    assert names == ["PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "TIDEPOOL_STORAGE_ROOT"]
    assert "value" not in driver.env[1], "a secret stays a reference"
    assert driver.env_from == [{"secretRef": {"name": "tidepool-credentials"}}]
    assert driver.owner == ("job-x", "uid-x")
    assert driver.deployment == "weekly"
    assert driver.placement == {"nodeSelector": {"pool": "on-demand"}, "tolerations": [{"key": "team"}]}


def test_without_the_downward_api_the_owner_is_that_of_the_pod() -> None:
    assert drivers.driver_of(driver_pod(), KubernetesSettings()).owner == ("job-y", "uid-y")


@pytest.mark.parametrize(
    ("image_id", "image"),
    [
        (IMAGE, IMAGE),
        (f"docker-pullable://{IMAGE}", IMAGE),
        ("", "registry.example.com/tidepool:v1"),
        # Loaded into a node, not pulled: no registry has it.
        ("sha256:" + "c" * 64, "registry.example.com/tidepool:v1"),
        ("docker.io/library/import-2026-01-01@sha256:" + "c" * 64, "registry.example.com/tidepool:v1"),
    ],
)
def test_the_image_is_the_digest_that_the_driver_runs(image_id: str, image: str) -> None:
    pod = driver_pod(containerStatuses=[{"name": "prefect-job", "imageID": image_id}])
    assert drivers.running_image(pod) == image


def test_the_run_of_this_process_has_its_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drivers.this_run() == Run(), "outside of a flow run"
    for name, value in (("ID", RUN.id), ("FLOW_NAME", RUN.flow), ("RUN_COUNT", "3")):
        monkeypatch.setenv(f"PREFECT__RUNTIME__FLOW_RUN__{name}", value)
    assert drivers.this_run() == Run(RUN.id, RUN.flow, 3)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT", "0")
    assert drivers.this_run().attempt == 1, "the server has not counted it yet"


def test_a_difference_of_versions_is_named() -> None:
    here = drivers.in_one_line(get_versions(drivers.PACKAGES))
    assert re.match(r"python 3\.\d+\.\d+\S*, cloudpickle \d\S*, dask \d.*, tidepool \d", here)
    assert drivers.difference(here, here) == ""
    assert drivers.difference("python 3.11.7, dask 2026.8.0", "python 3.11.7, dask 2026.1.0") == (
        "dask 2026.8.0 here, dask 2026.1.0 there"
    )
