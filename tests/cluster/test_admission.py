"""The admission policies of k8s/cluster on a real API server, beside the operator's function: they agree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest
from kube import Namespace, command

from tests.flow_run_objects import CLUSTER, DRIVER_POD, DRIVER_UID, LEGITIMATE, PARAMETERS, TOP, attempts
from tidepool.compute.clusters.kubernetes import names
from tidepool.operate.object_rules import COPIES, RULES, violations

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTEMPTS = attempts()
PLURALS = {
    "DaskCluster": "apis/kubernetes.dask.org/v1/{}/daskclusters",
    "DaskWorkerGroup": "apis/kubernetes.dask.org/v1/{}/daskworkergroups",
    "DaskAutoscaler": "apis/kubernetes.dask.org/v1/{}/daskautoscalers",
    "DaskJob": "apis/kubernetes.dask.org/v1/{}/daskjobs",
    "Deployment": "apis/apps/v1/{}/deployments",
    "Job": "apis/batch/v1/{}/jobs",
    "Pod": "api/v1/{}/pods",
    "Secret": "api/v1/{}/secrets",
    "Service": "api/v1/{}/services",
}
# Here the API server completes what an attempt leaves out, or looks at another of its faults first: other words.
COMPLETED = {
    "DaskCluster: no idle timeout",
    "Service: a load balancer",
    "Secret: a megabyte of a key",  # which is in `data` by then
    *(f"{place}: {title}" for place in ("Pod, spec", "Driver, spec") for title in ("no request", "a GPU")),
    *(
        f"{place}: no security context"
        for place in ("Job, spec.template.spec", "Deployment, spec.template.spec", "Pod, spec", "Driver, spec")
    ),
}
POLICY = re.compile(r"ValidatingAdmissionPolicy '(\S+)' with binding '\S+' denied request: (.*)", re.DOTALL)


class Server:
    """The API server, for dry runs in one namespace."""

    def __init__(self, url: str, namespace: str) -> None:
        self.namespace = namespace
        self.http = httpx.Client(base_url=url, timeout=30)

    def create(self, manifest: dict[str, Any], **headers: str) -> tuple[str, Any]:
        """Try to create an object; return the policy that refused it, or nothing, and the answer."""
        return self._ask("POST", self._path(manifest["kind"]), headers, json=manifest)

    def delete(self, kind: str, name: str, **headers: str) -> tuple[str, Any]:
        """Try to delete an object."""
        return self._ask("DELETE", f"{self._path(kind)}/{name}", headers)

    def by_a_run(self, pod: str = DRIVER_POD, uid: str = DRIVER_UID) -> dict[str, str]:
        """Return the headers of a request by the flow runs' account, with the token of a pod."""
        account = f"system:serviceaccount:{self.namespace}:tidepool-flow-run"
        extra = "Impersonate-Extra-Authentication.kubernetes.io%2Fpod-"
        bound = {f"{extra}Name": pod, f"{extra}Uid": uid} if pod else {}
        return {"Impersonate-User": account, **bound}

    def _path(self, kind: str) -> str:
        return "/" + PLURALS[kind].format(f"namespaces/{self.namespace}")

    def _ask(self, method: str, path: str, headers: dict[str, str], **options: Any) -> tuple[str, Any]:
        answer = self.http.request(method, path, params={"dryRun": "All"}, headers=headers, **options)
        found = POLICY.search(answer.json().get("message", "")) if answer.is_error else None
        return (found[1] if found else ""), answer


@contextmanager
def proxied() -> Iterator[str]:
    """`kubectl proxy`: a connection is there at once, a process of kubectl for each attempt takes minutes."""
    proxy = subprocess.Popen(["kubectl", "proxy", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert proxy.stdout
        yield f"http://{proxy.stdout.readline().rsplit(' ', 1)[1].strip()}"
    finally:
        proxy.terminate()
        proxy.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A namespace of flow runs with the rules; Pod Security is off, so that it is the policies that refuse."""
    command("kubectl", "apply", "--server-side", "--kustomize", str(TOP / "k8s/cluster"))
    namespace = Namespace(f"tidepool-rules-{uuid4().hex[:6]}")
    command("kubectl", "create", "namespace", namespace.name)
    try:
        namespace.kubectl("create", "serviceaccount", "tidepool-flow-run")
        labels = {"app.kubernetes.io/name": "tidepool", "app.kubernetes.io/component": "flow-run-rules"}
        metadata = {"name": "tidepool-flow-run-rules", "labels": labels}
        namespace.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": PARAMETERS})
        kinds = (f"dask{kind}s.kubernetes.dask.org" for kind in ("cluster", "workergroup", "autoscaler"))
        resources = ",".join(("secrets", *kinds))
        namespace.kubectl("create", "role", "run", "--verb=create,delete", f"--resource={resources}")
        namespace.kubectl(
            "create", "rolebinding", "run", "--role=run", f"--serviceaccount={namespace.name}:tidepool-flow-run"
        )
        command("kubectl", "label", "namespace", namespace.name, "tidepool.dev/flow-runs=true")
        with proxied() as url:
            server = Server(url, namespace.name)
            # The API server learns policies and namespaces a moment later.
            namespace.until(lambda: server.create(_daskjob())[0], "the policies hold", 60)
            namespace.until(
                lambda: server.create(LEGITIMATE["Job"])[1].is_success, "the policies have their parameters", 60
            )
            yield server
    finally:
        command("kubectl", "delete", "namespace", namespace.name, "--wait=false")


def _daskjob() -> dict[str, Any]:
    spec = {
        "cluster": {"spec": LEGITIMATE["DaskCluster"]["spec"]},
        "job": {"spec": {"containers": [{"name": "a", "image": "b"}]}},
    }
    return {"apiVersion": names.GROUP, "kind": "DaskJob", "metadata": {"name": "j"}, "spec": spec}


def headers(server: Server, kind: str) -> dict[str, str]:
    """Return who asks: Secrets are the business of runs alone."""
    return server.by_a_run() if kind == "Secret" else {}


def test_the_api_server_finds_no_fault_with_the_policies(server: Server) -> None:
    assert server
    policies = json.loads(command("kubectl", "get", "validatingadmissionpolicies", "--output=json"))["items"]
    ours = [each for each in policies if each["metadata"]["name"].startswith("tidepool-")]
    assert len(ours) == len(RULES) + 1
    for each in ours:
        assert not each.get("status", {}).get("typeChecking", {}).get("expressionWarnings"), each["metadata"]["name"]


@pytest.mark.parametrize("title", LEGITIMATE)
def test_what_a_run_consists_of_is_admitted(server: Server, title: str) -> None:
    manifest = LEGITIMATE[title]
    _, answer = server.create(manifest, **headers(server, manifest["kind"]))
    assert answer.is_success, answer.text


@pytest.mark.parametrize("title", ATTEMPTS)
def test_an_attempt_is_refused_by_the_policy_in_the_operators_words(server: Server, title: str) -> None:
    kind, manifest = ATTEMPTS[title]
    policy, answer = server.create(manifest, **headers(server, manifest["kind"]))
    if policy:
        assert policy == f"tidepool-{kind.lower()}"
        said = POLICY.search(answer.json()["message"])
        assert said
        assert title in COMPLETED or said[2].removesuffix(" ") in {
            _as_policy(each) for each in violations(manifest, PARAMETERS)
        }
    elif answer.is_success:
        # The API server left the field out, overwrote or completed it: what it would store is as it may be.
        assert violations(answer.json(), PARAMETERS) == [], answer.text
    else:
        assert answer.json()["reason"] in {"Invalid", "Forbidden", "BadRequest"}, answer.text


OWNED: dict[str, tuple[dict[str, Any], str]] = {
    "its own": ({}, DRIVER_POD),
    "another driver's": ({"annotations": {names.ANNOTATION_DRIVER: "other"}}, DRIVER_POD),
    "no one's": ({"annotations": {}}, DRIVER_POD),
    "its own, with a token that is bound to no pod": ({}, ""),
    "of no Job": ({"ownerReferences": []}, DRIVER_POD),
}


@pytest.mark.parametrize("title", OWNED)
def test_a_run_creates_only_clusters_of_its_own(server: Server, title: str) -> None:
    change, pod = OWNED[title]
    cluster = LEGITIMATE["DaskCluster"]
    changed = cluster | {"metadata": cluster["metadata"] | change}
    policy, answer = server.create(changed, **server.by_a_run(pod))
    assert policy == ("" if title == "its own" else "tidepool-daskcluster-of-a-run"), answer.text
    assert answer.is_success == (title == "its own"), answer.text
    # Administrators are not bound to it.
    assert server.create(changed)[1].is_success


SHARED = "shared-warm-01234567"


@pytest.mark.parametrize("kind", ["DaskCluster", "DaskWorkerGroup", "DaskAutoscaler", "Secret"])
def test_a_run_takes_no_name_that_another_runs_cluster_may_have(server: Server, kind: str) -> None:
    """Names end with the uid of the pod, which Kubernetes chooses; those of shared clusters begin like one."""
    mine = LEGITIMATE[kind]
    assert server.create(mine, **server.by_a_run())[1].is_success
    for uid in ("6f0c7a9e-1b2c-4d3e-8f4a-5b6c7d8e9f0a", "5", ""):
        policy, answer = server.create(mine, **server.by_a_run(uid=uid))
        assert policy == "tidepool-daskcluster-of-a-run", answer.text
    # The label of a shared cluster does not help, and a shared one may have its name.
    labelled = json.loads(json.dumps(mine))
    labelled["metadata"]["labels"][names.LABEL_SHARED] = "warm"
    policy, answer = server.create(labelled, **server.by_a_run())
    assert policy == "tidepool-daskcluster-of-a-run", answer.text
    shared = json.loads(json.dumps(labelled).replace(CLUSTER, SHARED))
    assert server.create(shared, **server.by_a_run())[1].is_success


@pytest.mark.parametrize("kind", ["DaskCluster", "DaskWorkerGroup", "DaskAutoscaler"])
def test_a_run_writes_no_record_of_kopf_and_no_finalizer(server: Server, kind: str) -> None:
    """With a record that kopf cannot read, an autoscaler kept its finalizer, and its place in the quota."""
    for part, value in (
        ("annotations", {"kopf.zalando.org/daskautoscaler_create": "{not json"}),
        *(("annotations", {copy: "{}"}) for copy in COPIES),
        ("finalizers", ["kopf.zalando.org/KopfFinalizerMarker"]),
    ):
        made = json.loads(json.dumps(LEGITIMATE[kind]))
        if isinstance(value, dict):
            made["metadata"][part].update(value)
        else:
            made["metadata"][part] = value
        policy, answer = server.create(made, **server.by_a_run())
        assert policy == "tidepool-daskcluster-of-a-run", answer.text
        assert server.create(made)[1].is_success


@pytest.mark.parametrize("kind", ["DaskWorkerGroup", "DaskAutoscaler"])
def test_a_run_creates_only_parts_of_its_own_or_of_a_shared_cluster(server: Server, kind: str) -> None:
    """With those of another run, the operator would scale its cluster. It compares them with the cluster."""
    mine = LEGITIMATE[kind]
    metadata = mine["metadata"]
    assert server.create(mine, **server.by_a_run())[1].is_success
    foreign = mine | {"metadata": metadata | {"annotations": {names.ANNOTATION_DRIVER: "other"}}}
    policy, answer = server.create(foreign, **server.by_a_run())
    assert policy == "tidepool-daskcluster-of-a-run", answer.text
    foreign["metadata"]["labels"] = metadata["labels"] | {names.LABEL_SHARED: "warm"}
    shared = json.loads(json.dumps(foreign).replace(CLUSTER, SHARED))
    assert server.create(shared, **server.by_a_run())[1].is_success


def test_a_run_deletes_only_clusters_of_its_own(server: Server) -> None:
    namespace = Namespace(server.namespace)
    cluster = LEGITIMATE["DaskCluster"]
    # Its Job does not exist: Kubernetes would delete it.
    metadata = {key: value for key, value in cluster["metadata"].items() if key != "ownerReferences"}
    namespace.apply(cluster | {"metadata": metadata})
    policy, answer = server.delete("DaskCluster", CLUSTER, **server.by_a_run("other-driver"))
    assert policy == "tidepool-daskcluster-of-a-run", answer.text
    policy, answer = server.delete("DaskCluster", CLUSTER, **server.by_a_run())
    assert answer.is_success, answer.text


def test_secrets_of_others_are_not_the_runs_business(server: Server) -> None:
    """An administrator puts the flows' credentials there."""
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tidepool-credentials"}}
    assert server.create(secret)[1].is_success
    assert server.create(secret, **server.by_a_run())[0] == "tidepool-secret"


def test_a_dask_job_is_refused_altogether(server: Server) -> None:
    assert server.create(_daskjob())[0] == "tidepool-daskjob"


def test_without_the_rules_nothing_is_admitted(server: Server) -> None:
    namespace = Namespace(server.namespace)
    [rules] = [each for each in namespace.get("configmaps") if each["metadata"]["name"].endswith("-rules")]
    namespace.kubectl("delete", "configmap", rules["metadata"]["name"])
    try:
        namespace.until(lambda: not server.create(LEGITIMATE["Job"])[1].is_success, "a Job is refused", 30)
    finally:
        namespace.apply(
            {key: rules[key] for key in ("apiVersion", "kind", "data")}
            | {"metadata": {key: rules["metadata"][key] for key in ("name", "labels")}}
        )
        namespace.until(lambda: server.create(LEGITIMATE["Job"])[1].is_success, "a Job is admitted again", 30)


def _as_policy(sentence: str) -> str:
    """Return a sentence of the operator's as a policy has it: without numbers of items, and without the value."""
    sentence = re.sub(r"must not have .*?: it may have only", "may have only", sentence)
    return re.sub(r"\[\d+\]", "[]", re.sub(r", not (\"|true|false|null|-?\d).*$", "", sentence))


@contextmanager
def operator(namespace: str) -> Iterator[None]:
    """The Dask operator as the chart starts it, on this machine, with the rights of KUBECONFIG."""
    kopf = [sys.executable, "-m", "kopf", "run", "--module=tidepool.operate.dask_operator", "--standalone"]
    environment = {**os.environ, "TIDEPOOL_OPERATOR_NAMESPACES": namespace}
    process = subprocess.Popen([*kopf, f"--namespace={namespace}"], env=environment, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def test_the_operator_makes_nothing_of_what_it_refuses() -> None:
    """In a namespace without the policies, so that it is the operator that refuses."""
    namespace = Namespace(f"tidepool-rules-{uuid4().hex[:6]}")
    command("kubectl", "create", "namespace", namespace.name)
    # An owner or a driver that does not exist would take the objects away.
    cluster = LEGITIMATE["DaskCluster"]
    metadata = {key: value for key, value in cluster["metadata"].items() if key != "ownerReferences"}
    annotations = {key: value for key, value in metadata["annotations"].items() if key != names.ANNOTATION_DRIVER}
    metadata["annotations"] = annotations
    good = cluster | {"metadata": metadata | {"name": "good"}}
    good["spec"] = json.loads(json.dumps(good["spec"]).replace(CLUSTER, "good"))
    bad = json.loads(json.dumps(good).replace('"good', '"bad'))
    bad["spec"]["worker"]["spec"]["serviceAccountName"] = "default"
    try:
        rules = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "tidepool-flow-run-rules"}}
        namespace.apply(rules | {"data": PARAMETERS})
        with operator(namespace.name):
            for each in (bad, good, _daskjob() | {"metadata": {"name": "job"}}):
                namespace.apply(each)
            namespace.until(
                lambda: len(namespace.get("deployments", "dask.org/cluster-name=good")) == 3, "a good one is made", 60
            )
            namespace.until(lambda: {"bad", "job"} <= refusals(namespace).keys(), "the bad ones are refused", 30)
            events = refusals(namespace)
            assert events["bad"].startswith("spec.worker.spec must not have serviceAccountName: it may have only ")
            assert events["job"] == "a DaskJob is not allowed"
            phases = {each["metadata"]["name"]: each["status"]["phase"] for each in namespace.get("daskclusters")}
            assert phases["bad"] == "Refused"
            # A driver asks for more workers of its own making, for the good cluster.
            [group] = namespace.get("daskworkergroups")
            namespace.kubectl("delete", "daskworkergroup", "good-default", "--cascade=orphan")
            metadata = {key: group["metadata"][key] for key in ("name", "labels", "ownerReferences")}
            group["spec"]["worker"]["spec"]["containers"][0]["args"] = ["sh", "-c", "cat /run/tidepool/tls/tls.key"]
            namespace.apply({key: group[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": metadata})
            namespace.until(lambda: "good-default" in refusals(namespace), "foreign workers are refused", 30)
            assert not namespace.names("deployments,services,pods", "dask.org/cluster-name=bad")
            assert not namespace.names("pods", "dask.org/component=job-runner")
            for name in ("good", "bad"):
                namespace.kubectl("delete", "daskcluster", name, "--timeout=60s")
    finally:
        command("kubectl", "delete", "namespace", namespace.name, "--wait=false")


def refusals(namespace: Namespace) -> dict[str, str]:
    """Return the message of each refused object's event."""
    events = json.loads(namespace.kubectl("get", "events", "--field-selector=type=Warning,reason=Refused", "-ojson"))
    return {each["involvedObject"]["name"]: each["message"] for each in events["items"]}
