"""Runs inside a driver's pod, with all that the code of a flow has: tries what it must not get, and prints the answers.

test_attacks.py sets the variables ATTACK_*: the DaskCluster of another run, the namespaces of the platform and of
another team, addresses.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
OWN = (ACCOUNT / "namespace").read_text()
PLATFORM, OTHERS, VICTIM = (os.environ[name] for name in ("ATTACK_PLATFORM", "ATTACK_OTHERS", "ATTACK_VICTIM"))
TARGETS: dict[str, tuple[str, int]] = json.loads(os.environ["ATTACK_TARGETS"])
JOB = {"name": os.environ["TIDEPOOL_KUBERNETES_JOB_NAME"], "uid": os.environ["TIDEPOOL_KUBERNETES_JOB_UID"]}

kubernetes = httpx.Client(
    base_url="https://kubernetes.default.svc",
    headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"},
    verify=str(ACCOUNT / "ca.crt"),
    timeout=20,
)
prefect = httpx.Client(
    base_url=os.environ["PREFECT_API_URL"], auth=tuple(os.environ["PREFECT_API_AUTH_STRING"].split(":", 1)), timeout=20
)
ATTEMPTS: dict[str, Callable[[], httpx.Response | str]] = {}


def attempt(text: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register an attempt. It returns the answer, or text that begins with `refused` or `reached`."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        ATTEMPTS[text] = function
        return function

    return register


# --- the Kubernetes API -----------------------------------------------------------------------------------------------

DASK = "/apis/kubernetes.dask.org/v1/namespaces"
CORE = "/api/v1/namespaces"


def send(body: dict[str, Any], namespace: str = OWN, **query: str) -> httpx.Response:
    return kubernetes.post(f"{DASK}/{namespace}/{body['kind'].lower()}s", json=body, params=query)


def own_uid() -> str:
    pod = kubernetes.get(f"{CORE}/{OWN}/pods/{os.environ['TIDEPOOL_KUBERNETES_POD_NAME']}").raise_for_status()
    return str(pod.json()["metadata"]["uid"])


def honest() -> dict[str, Any]:
    """A DaskCluster as this run may have one: that of the other run with another name, driver and owner."""
    name = f"attack-{os.urandom(3).hex()}-{own_uid()[:8]}"
    found = kubernetes.get(f"{DASK}/{OWN}/daskclusters/{VICTIM}").raise_for_status().text
    body: dict[str, Any] = json.loads(found.replace(VICTIM, name))
    kept = {key: value for key, value in body["metadata"]["annotations"].items() if key.startswith("tidepool.dev/")}
    body["metadata"] = {
        "name": name,
        "labels": body["metadata"]["labels"],
        "annotations": kept | {"tidepool.dev/driver": os.environ["TIDEPOOL_KUBERNETES_POD_NAME"]},
        "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "controller": True, **JOB}],
    }
    return {key: body[key] for key in ("apiVersion", "kind", "metadata", "spec")}


def dask(kind: str, spec: dict[str, Any]) -> httpx.Response:
    return send({**honest(), "kind": kind, "spec": spec})


def with_pods(change: Callable[[dict[str, Any]], Any], part: str = "worker") -> Callable[[], httpx.Response]:
    """An honest DaskCluster but for one change of a pod's spec."""

    def attack() -> httpx.Response:
        body = honest()
        change(body["spec"][part]["spec"])
        return send(body)

    return attack


def container(pod: dict[str, Any]) -> dict[str, Any]:
    return dict.__getitem__(pod, "containers")[0]  # type: ignore[no-any-return]


def secret_variable(name: str, key: str) -> Callable[[dict[str, Any]], None]:
    source = {"secretKeyRef": {"name": name, "key": key}}
    return lambda pod: container(pod).setdefault("env", []).append({"name": "LOOT", "valueFrom": source})


def mounted(**source: Any) -> Callable[[dict[str, Any]], None]:
    def change(pod: dict[str, Any]) -> None:
        pod.setdefault("volumes", []).append({"name": "loot", **source})
        container(pod).setdefault("volumeMounts", []).append({"name": "loot", "mountPath": "/loot"})

    return change


PODS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a scheduler with the database's Secret as a variable": (
        secret_variable("tidepool-database", "connection-url"), "scheduler",
    ),
    "a worker with the database's Secret as a variable": (
        secret_variable("tidepool-database", "connection-url"), "worker",
    ),
    "a scheduler with the operator's account": (
        lambda pod: pod.update(serviceAccountName="tidepool-operator", automountServiceAccountToken=True), "scheduler",
    ),
    "a worker with the drivers' account": (
        lambda pod: pod.update(serviceAccountName="tidepool-flow-run", automountServiceAccountToken=True), "worker",
    ),
    "an account by its old name": (lambda pod: pod.update(serviceAccount="tidepool-operator"), "worker"),
    "a token by a projected volume": (
        mounted(projected={"sources": [{"serviceAccountToken": {"path": "token"}}]}), "worker",
    ),
    "the TLS Secret of another run": (mounted(secret={"secretName": f"{VICTIM}-dask-tls"}), "worker"),
    "all keys of a foreign Secret": (
        lambda pod: container(pod).setdefault("envFrom", []).append({"secretRef": {"name": "tidepool-auth"}}), "worker",
    ),
    "a foreign ConfigMap": (mounted(configMap={"name": "kube-root-ca.crt"}), "worker"),
    "a folder of the node": (mounted(hostPath={"path": "/"}), "worker"),
    "the node's network": (lambda pod: pod.update(hostNetwork=True), "worker"),
    "the node's processes": (lambda pod: pod.update(hostPID=True), "worker"),
    "another image": (lambda pod: container(pod).update(image="docker.io/library/busybox:1"), "worker"),
    "a privileged container": (
        lambda pod: container(pod).update(securityContext={"privileged": True}), "worker",
    ),
    "root": (lambda pod: container(pod)["securityContext"].update(runAsUser=0, runAsNonRoot=False), "worker"),
    "an init container": (
        lambda pod: pod.update(initContainers=[{**container(pod), "name": "first"}]), "worker",
    ),
    "a node by its name": (lambda pod: pod.update(nodeName="node"), "worker"),
    "a grace period of an hour": (lambda pod: pod.update(terminationGracePeriodSeconds=3600), "worker"),
    "a megabyte as its command": (lambda pod: container(pod).update(args=["a" * 1_000_000]), "worker"),
    "a megabyte of variables": (
        lambda pod: container(pod).update(env=[{"name": f"A{n}", "value": "a" * 8192} for n in range(128)]), "worker",
    ),
    "a system priority": (lambda pod: pod.update(priorityClassName="system-node-critical"), "worker"),
}  # fmt: skip
for name, (change, part) in PODS.items():
    ATTEMPTS[f"DaskCluster: {name}"] = with_pods(change, part)


def with_cluster(change: Callable[[dict[str, Any]], Any], namespace: str = OWN) -> Callable[[], httpx.Response]:
    """An honest DaskCluster but for one change of its spec."""

    def attack() -> httpx.Response:
        body = honest()
        change(body["spec"])
        return send(body, namespace)

    return attack


def with_metadata(**changes: Any) -> Callable[[], httpx.Response]:
    """An honest DaskCluster but for one change of its metadata."""

    def attack() -> httpx.Response:
        body = honest()
        body["metadata"] |= changes
        return send(body)

    return attack


ATTEMPTS |= {
    "DaskCluster: pods with the labels of the platform's worker": with_cluster(
        lambda spec: spec["worker"].update(metadata={"labels": {"app.kubernetes.io/component": "worker"}})
    ),
    "DaskCluster: a Service for the internet": with_cluster(
        lambda spec: spec["scheduler"]["service"].update(type="LoadBalancer")
    ),
    "DaskCluster: more workers than the caps": with_cluster(lambda spec: spec["worker"].update(replicas=5000)),
    "DaskCluster: in the platform's namespace": with_cluster(lambda _: None, PLATFORM),
    "DaskCluster: in another team's namespace": with_cluster(lambda _: None, OTHERS),
    "DaskWorkerGroup: workers of this run in another run's cluster": lambda: dask(
        "DaskWorkerGroup", {"cluster": VICTIM, "worker": honest()["spec"]["worker"]}
    ),
    "DaskCluster: a finalizer that nothing takes away": with_metadata(finalizers=["batch.kubernetes.io/job-tracking"]),
    "DaskCluster: another run's Job that waits for it": with_metadata(
        ownerReferences=[{"apiVersion": "batch/v1", "kind": "Job", "blockOwnerDeletion": True, **JOB}]
    ),
    "DaskCluster: a name that another run may take": with_metadata(name="attack-0d9e1c1e-1-abcd-00000000"),
    "DaskCluster: the same, with the label of a shared one": with_metadata(
        name="attack-0d9e1c1e-1-abcd-00000000",
        labels={
            "app.kubernetes.io/managed-by": "tidepool",
            "app.kubernetes.io/part-of": "tidepool",
            "tidepool.dev/shared-cluster": "warm",
        },
    ),
    "DaskJob": lambda: dask(
        "DaskJob", {"cluster": {"spec": honest()["spec"]}, "job": {"spec": honest()["spec"]["worker"]["spec"]}}
    ),
}


@attempt("DaskWorkerGroup: the name that another run's cluster is about to use")
def coming_group() -> httpx.Response:
    """With this run's own labels and annotations, and nothing else that could be refused."""
    body, coming = honest(), "coming-0d9e1c1e-1-abcd-00000000"
    owner = {"apiVersion": body["apiVersion"], "kind": "DaskCluster", "name": coming, "uid": own_uid()}
    worker = json.loads(json.dumps(body["spec"]["worker"]).replace(body["metadata"]["name"], coming))
    metadata = body["metadata"] | {"name": f"{coming}-default", "ownerReferences": [owner]}
    return send(
        {
            "apiVersion": body["apiVersion"],
            "kind": "DaskWorkerGroup",
            "metadata": metadata,
            "spec": {"cluster": coming, "worker": worker},
        }
    )


def refusal_of(kind: str, name: str) -> str:
    """Return how the operator refuses what admission has let through, within half a minute."""
    about = {"fieldSelector": f"involvedObject.kind={kind},involvedObject.name={name},reason=Refused"}
    for _ in range(60):
        if found := kubernetes.get(f"{CORE}/{OWN}/events", params=about).json()["items"]:
            return f"refused: {found[0]['message']}"
        time.sleep(0.5)
    return "reached: no refusal"


@attempt("DaskAutoscaler: scale another run's cluster to nothing")
def scale_foreign() -> Any:
    uid = kubernetes.get(f"{DASK}/{OWN}/daskclusters/{VICTIM}").json()["metadata"]["uid"]
    owner = {"apiVersion": "kubernetes.dask.org/v1", "kind": "DaskCluster", "name": VICTIM, "uid": uid}
    metadata = honest()["metadata"] | {"name": VICTIM, "ownerReferences": [owner]}
    body = {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskAutoscaler",
        "metadata": metadata,
        "spec": {"cluster": VICTIM, "minimum": 0, "maximum": 1},
    }
    answer = send(body)
    return refusal_of("DaskAutoscaler", VICTIM) if answer.is_success else answer


@attempt("another run's DaskCluster: delete it")
def delete_foreign() -> Any:
    return kubernetes.delete(f"{DASK}/{OWN}/daskclusters/{VICTIM}")


@attempt("another run's DaskCluster: change it")
def change_foreign() -> Any:
    return kubernetes.patch(
        f"{DASK}/{OWN}/daskclusters/{VICTIM}", json={"spec": {"idleTimeout": 1}},
        headers={"Content-Type": "application/merge-patch+json"},
    )  # fmt: skip


@attempt("Job with the worker's account")
def worker_job() -> Any:
    pod = {
        "serviceAccountName": "tidepool-worker",
        "restartPolicy": "Never",
        "containers": [{"name": "a", "image": "a"}],
    }
    body = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "attack"},
        "spec": {"template": {"spec": pod}},
    }
    return kubernetes.post(f"/apis/batch/v1/namespaces/{OWN}/jobs", json=body)


@attempt("a pod of its own")
def own_pod() -> Any:
    body = {"metadata": {"name": "attack"}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    return kubernetes.post(f"{CORE}/{OWN}/pods", json=body)


def secret(kind: str, annotations: dict[str, str]) -> httpx.Response:
    body = {"metadata": {"name": "attack", "annotations": annotations}, "type": kind}
    return kubernetes.post(f"{CORE}/{OWN}/secrets", json=body)


def squat() -> httpx.Response:
    own = {"apiVersion": "kubernetes.dask.org/v1", "kind": "DaskCluster"}
    names = ("shared-warm-00000000", VICTIM)
    owners = [{**own, "name": name, "uid": f"00000000-0000-4000-8000-00000000000{at}"} for at, name in enumerate(names)]
    metadata = {"name": f"{names[0]}-dask-tls", "labels": honest()["metadata"]["labels"], "ownerReferences": owners}
    keys = {"tls.crt": "", "tls.key": ""}
    body = {"metadata": metadata, "type": "kubernetes.io/tls", "stringData": keys}
    return kubernetes.post(f"{CORE}/{OWN}/secrets", json=body)


ATTEMPTS |= {
    "Secrets: list them": lambda: kubernetes.get(f"{CORE}/{OWN}/secrets"),
    "Secrets: read the credentials by name": lambda: kubernetes.get(f"{CORE}/{OWN}/secrets/tidepool-credentials"),
    "Secrets: list the platform's": lambda: kubernetes.get(f"{CORE}/{PLATFORM}/secrets"),
    "Secrets: read another run's TLS key": lambda: kubernetes.get(f"{CORE}/{OWN}/secrets/{VICTIM}-dask-tls"),
    "Secrets: one that Kubernetes fills with an account's token": lambda: secret(
        "kubernetes.io/service-account-token", {"kubernetes.io/service-account.name": "tidepool-flow-run"}
    ),
    "Secrets: one without an owner": lambda: secret("kubernetes.io/tls", {}),
    "Secrets: one of two clusters, so that a coming one meets it": squat,
    "a token of another account": lambda: kubernetes.post(
        f"{CORE}/{PLATFORM}/serviceaccounts/tidepool-operator/token", json={"spec": {}}
    ),
    "a token of its own account": lambda: kubernetes.post(
        f"{CORE}/{OWN}/serviceaccounts/tidepool-flow-run/token", json={"spec": {}}
    ),
    "the rules of flow runs: change them": lambda: kubernetes.patch(
        f"{CORE}/{OWN}/configmaps/tidepool-flow-run-rules",
        json={"data": {}}, headers={"Content-Type": "application/merge-patch+json"},
    ),
    "exec into another run's scheduler": lambda: kubernetes.post(
        f"{CORE}/{OWN}/pods/{scheduler_pod()}/exec", params={"command": "id", "stdout": "true"}
    ),
    "port-forward to another run's scheduler": lambda: kubernetes.post(
        f"{CORE}/{OWN}/pods/{scheduler_pod()}/portforward"
    ),
    "an ephemeral container in another run's scheduler": lambda: kubernetes.patch(
        f"{CORE}/{OWN}/pods/{scheduler_pod()}/ephemeralcontainers",
        json={"spec": {"ephemeralContainers": [{"name": "a", "image": "a"}]}},
        headers={"Content-Type": "application/merge-patch+json"},
    ),
    "Role: give itself more": lambda: kubernetes.post(
        f"/apis/rbac.authorization.k8s.io/v1/namespaces/{OWN}/roles", json={"metadata": {"name": "attack"}, "rules": []}
    ),
    "impersonate the operator": lambda: kubernetes.get(
        f"{CORE}/{PLATFORM}/pods",
        headers={"Impersonate-User": f"system:serviceaccount:{PLATFORM}:tidepool-operator"},
    ),
}  # fmt: skip


def scheduler_pod() -> str:
    selector = {"labelSelector": f"dask.org/cluster-name={VICTIM},dask.org/component=scheduler"}
    return str(kubernetes.get(f"{CORE}/{OWN}/pods", params=selector).json()["items"][0]["metadata"]["name"])


# --- the Prefect API, by the drivers' token ---------------------------------------------------------------------------

DEPLOYMENT = os.environ["ATTACK_DEPLOYMENT"]
POOL = os.environ["ATTACK_POOL"]
BLOCK = os.environ["ATTACK_BLOCK"]
RUN = f"/deployments/{DEPLOYMENT}/create_flow_run"
LOOT = {"credentials_secret": "tidepool-database", "service_account_name": "tidepool-operator"}


def raw(path: str, body: str) -> httpx.Response:
    return prefect.post(path, content=body, headers={"Content-Type": "application/json"})


ATTEMPTS |= {
    "Prefect: a run with job variables": lambda: prefect.post(RUN, json={"job_variables": LOOT}),
    "Prefect: the same, the key written twice": lambda: raw(
        RUN, f'{{"job_variables": {{}}, "job_variables": {json.dumps(LOOT)}}}'
    ),
    "Prefect: the same, a letter of the key escaped": lambda: raw(
        RUN, f'{{"job\\u005fvariables": {json.dumps(LOOT)}}}'
    ),
    "Prefect: the same, behind a megabyte": lambda: raw(
        RUN, f'{{"name": "{"a" * 1_000_000}", "job_variables": {json.dumps(LOOT)}}}'
    ),
    "Prefect: the same, in UTF-16": lambda: prefect.post(
        RUN, content=json.dumps({"job_variables": LOOT}).encode("utf-16"), headers={"Content-Type": "application/json"}
    ),
    "Prefect: a run without a deployment in a work pool": lambda: prefect.post(
        "/flow_runs/", json={"flow_id": os.environ["ATTACK_FLOW"], "work_pool_name": POOL, "job_variables": LOOT}
    ),
    "Prefect: change a run's job variables": lambda: prefect.patch(
        f"/flow_runs/{os.environ['ATTACK_RUN']}", json={"job_variables": LOOT}
    ),
    "Prefect: a run whose Job is another run's, to have it deleted": lambda: prefect.patch(
        f"/flow_runs/{os.environ['ATTACK_RUN']}", json={"infrastructure_pid": f"{OTHERS}:driver"}
    ),
    "Prefect: a parameter that the server replaces by a variable": lambda: prefect.post(
        RUN, json={"parameters": {"a": {"__prefect_kind": "workspace_variable", "variable_name": "attack"}}}
    ),
    "Prefect: the same, in a list, a letter of the key escaped": lambda: raw(
        RUN, '{"parameters": {"a": [{"\\u005f_prefect_kind": "jinja", "template": "{{ 1 }}"}]}}'
    ),
    "Prefect: a NUL, which PostgreSQL does not store": lambda: raw(RUN, '{"name": "a\\u0000"}'),
    "Prefect: log lines of six megabytes": lambda: raw("/logs/", f'[{{"message": "{"a" * 6_000_000}"}}]'),
    "Prefect: log lines without a length": lambda: prefect.post(
        "/logs/", content=iter([b"[", b"]"]), headers={"Content-Type": "application/json"}
    ),
    "Prefect: what another flow has published, by its key": lambda: prefect.post(
        "/artifacts/latest/filter", json={"artifacts": {"key": {"any_": ["ticket-model-evaluation-history"]}}}
    ),
    "Prefect: change the base job template": lambda: prefect.patch(
        f"/work_pools/{POOL}", json={"base_job_template": {"variables": {}, "job_configuration": {}}}
    ),
    "Prefect: the same by //": lambda: prefect.patch(f"//work_pools/{POOL}", json={"base_job_template": {}}),
    "Prefect: the same by %2e": lambda: prefect.patch(f"/flow_runs/%2e%2e/work_pools/{POOL}", json={"is_paused": True}),
    "Prefect: a work pool of its own": lambda: prefect.post(
        "/work_pools/", json={"name": "attack", "type": "kubernetes"}
    ),
    "Prefect: a deployment of its own": lambda: prefect.post(
        "/deployments/", json={"name": "attack", "flow_id": os.environ["ATTACK_FLOW"], "work_pool_name": POOL}
    ),
    "Prefect: change a deployment": lambda: prefect.patch(f"/deployments/{DEPLOYMENT}", json={"job_variables": LOOT}),
    "Prefect: delete a deployment": lambda: prefect.delete(f"/deployments/{DEPLOYMENT}"),
    "Prefect: an automation": lambda: prefect.post("/automations/", json={"name": "attack"}),
    "Prefect: read a block of another owner": lambda: prefect.get(
        f"/block_types/slug/secret/block_documents/name/{BLOCK}", params={"include_secrets": "true"}
    ),
    "Prefect: list all blocks": lambda: prefect.post("/block_documents/filter", json={"include_secrets": True}),
    "Prefect: write a variable of another owner": lambda: prefect.post(
        "/variables/", json={"name": "attack", "value": "1"}
    ),
    "Prefect: read the server's settings": lambda: prefect.get("/admin/settings"),
    "Prefect: clear the database": lambda: prefect.post("/admin/database/clear", json={"confirm": False}),
    "Prefect: the runs' password wrong": lambda: httpx.get(
        f"{os.environ['PREFECT_API_URL']}/flow_runs/{os.environ['ATTACK_RUN']}", auth=("flow-run", "wrong"), timeout=20
    ),
}


# --- the network ------------------------------------------------------------------------------------------------------


def connect(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError as error:
        return f"refused: {error}"
    return "reached"


for name, (host, port) in TARGETS.items():
    ATTEMPTS[f"network: {name}"] = lambda host=host, port=port: connect(host, port)


def foreign_scheduler(*, own_key: bool) -> str:
    """Run code in another run's scheduler, with no certificate or this run's own."""
    import distributed

    from tidepool.compute.clusters.kubernetes.cluster import KubernetesCluster
    from tidepool.settings import settings

    address = f"tls://{VICTIM}-scheduler.{OWN}:8786"
    security = distributed.Security.temporary()
    cluster = KubernetesCluster(settings().size("small")) if own_key else None
    try:
        if cluster is not None:
            with cluster:
                security = cluster.security
                return _run_on(address, security)
        return _run_on(address, security)
    finally:
        if cluster is not None:
            cluster.close()


def _run_on(address: str, security: Any) -> str:
    import distributed

    try:
        with distributed.Client(address, security=security, timeout=10, set_as_default=False) as client:
            return f"reached: {client.run_on_scheduler(os.getpid)}"
    except (OSError, TimeoutError) as error:
        return f"refused: {type(error).__name__}: {error}"


ATTEMPTS |= {
    "another run's scheduler without a certificate of its cluster": lambda: foreign_scheduler(own_key=False),
    "another run's scheduler with this run's own certificate": lambda: foreign_scheduler(own_key=True),
    "another run's scheduler without TLS": lambda: _run_on(f"tcp://{VICTIM}-scheduler.{OWN}:8786", None),
}


def sentence(answer: httpx.Response | str) -> str:
    """Return an answer as one line that begins with `refused` or `reached`."""
    if isinstance(answer, str):
        return answer
    try:
        reason = answer.json().get("message") or answer.json().get("detail") or answer.text
    except ValueError:
        reason = answer.text
    return f"{'refused' if answer.is_error else 'reached'}: {answer.status_code} {str(reason)[:300]}"


if __name__ == "__main__":
    # Otherwise the refusals below show nothing.
    send(honest(), dryRun="All").raise_for_status()
    answers = {}
    for text, function in ATTEMPTS.items():
        try:
            answers[text] = sentence(function())
        except httpx.TransportError as error:
            answers[text] = f"refused: {type(error).__name__}: {error}"
    secrets = base64.b64encode(json.dumps(answers).encode()).decode()  # in one line, whatever the answers hold
    sys.stdout.write(f"{json.dumps({'answers': secrets})}\n")
