"""Rights of the accounts and allowed connections, under default-deny and the restricted Pod Security Standard."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from drive import drive
from kube import Namespace

if TYPE_CHECKING:
    from installed import Platform

# A policy drops packets: what is refused takes the whole three seconds. The node knows a new pod's address some seconds
# after the pod has begun, so what must be reached gets a minute; what must not is tried after that, under all policies.
PROBE = """
import json, socket, time
def reaches(host, port):
    try:
        socket.create_connection((host, port), timeout=3).close()
        return True
    except OSError:
        return False
deadline = time.monotonic() + 60
while not all(reaches(*TARGETS[name]) for name in NEEDED) and time.monotonic() < deadline:
    time.sleep(1)
print(json.dumps({name: reaches(*target) for name, target in TARGETS.items()}))
"""
NEEDED = ("flow run API", "kubernetes", "store")
ACCOUNTS = ("worker", "flow-run", "operator")
FORBIDDEN = (
    ("get", "secrets"),
    ("list", "secrets"),
    ("watch", "secrets"),
    ("patch", "secrets"),
    ("delete", "secrets"),
    ("create", "pods"),
    ("create", "roles"),
    ("create", "pods/exec"),
    ("impersonate", "serviceaccounts"),
)


@pytest.fixture(scope="module")
def probe(installation: Platform) -> str:
    """The script, with addresses instead of names: a pod that may not ask the DNS would be refused for that."""

    def address(service: str) -> str:
        found = installation.namespace.kubectl("get", "service", service, "--output=jsonpath={.spec.clusterIP}")
        assert found, service
        return found

    services = {
        "flow run API": ("tidepool-flow-run-api", 4201),
        "server": ("tidepool-server", 4200),
        "postgres": ("postgres", 5432),
        "redis": ("redis", 6379),
    }
    targets = {name: (address(service), port) for name, (service, port) in services.items()}
    targets |= {name: (address(name), 7070) for name in ("store", "store-media")}
    api = installation.runs.kubectl("--namespace=default", "get", "service", "kubernetes", "--output=json")
    targets["kubernetes"] = (json.loads(api)["spec"]["clusterIP"], 443)
    return f"TARGETS = {targets!r}\n{PROBE}"


def stranger(namespace: Namespace, image: str, script: str) -> dict[str, bool]:
    """A pod without our labels passes the restricted standard: only the policies stop it."""
    name = "stranger"
    container = {
        "name": "probe",
        "image": image,
        "command": ["python", "-c", script],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }
    namespace.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
    try:
        phase = "--output=jsonpath={.status.phase}"
        namespace.until(lambda: namespace.kubectl("get", "pod", name, phase) == "Succeeded", "the probe has ended", 120)
        return dict(json.loads(namespace.kubectl("logs", name)))
    finally:
        namespace.kubectl("delete", "pod", name, "--wait=false")


def test_a_stranger_reaches_nothing(installation: Platform, probe: str) -> None:
    """Beside the platform; beside the runs it is not even admitted."""
    with pytest.raises(RuntimeError, match="ValidatingAdmissionPolicy 'tidepool-pod'"):
        stranger(installation.runs, installation.image, "")
    reached = stranger(installation.namespace, installation.image, f"NEEDED = ()\n{probe}")
    sys.__stderr__.write(f"a pod without our labels reaches {reached}\n")
    assert reached == dict.fromkeys(reached, False)


def test_a_driver_reaches_what_it_needs_and_no_more(installation: Platform, probe: str) -> None:
    reached = drive(installation, f"{NEEDED = !r}\n{probe}").result()
    sys.__stderr__.write(f"a driver reaches {reached}\n")
    assert reached == {name: name in NEEDED for name in reached}
    assert {"postgres", "redis", "server", "store-media"} < reached.keys()


def test_a_driver_of_the_second_team_reaches_its_own_store(media: Platform, probe: str) -> None:
    needed = ("flow run API", "kubernetes", "store-media")
    reached = drive(media, f"NEEDED = {needed!r}\n{probe}").result()
    assert reached == {name: name in needed for name in reached}
    assert "store" in reached


@pytest.mark.parametrize("account", ACCOUNTS)
def test_an_account_may_not_rise(installation: Platform, account: str) -> None:
    runs, platform = installation.runs, installation.namespace
    home = runs if account == "flow-run" else platform
    who = f"--as=system:serviceaccount:{home.name}:tidepool-{account}"
    for namespace in (runs, platform):
        sys.__stderr__.write(f"{account} in {namespace.name}\n{namespace.kubectl('auth', 'can-i', '--list', who)}\n")
        for verb, what in FORBIDDEN:
            assert not allowed(namespace, verb, what, who), (namespace.name, verb, what)
        assert not allowed(namespace, "*", "*", who)
    may = ("create", "jobs.batch") if account == "worker" else ("get", "pods")
    assert allowed(runs, *may, who), "otherwise the answers above show nothing"
    for namespace in (platform, Namespace("kube-system"), *(platform.others[1:] if account == "flow-run" else ())):
        assert not allowed(namespace, "list", "pods", who), namespace.name
        assert not allowed(namespace, "create", "jobs.batch", who), namespace.name
        assert not allowed(namespace, "create", "daskclusters.kubernetes.dask.org", who), namespace.name


def allowed(namespace: Namespace, verb: str, what: str, *options: str) -> bool:
    """Return the answer of `kubectl auth can-i`, whose exit code is 1 for no."""
    try:
        return namespace.kubectl("auth", "can-i", verb, what, *options).strip() == "yes"
    except RuntimeError:
        return False


def test_a_driver_makes_the_calls_of_a_flow_run_and_no_others(installation: Platform) -> None:
    """The proxy does not take the platform's password for a token."""
    script = """
import base64, json, os, urllib.error, urllib.request
def ask(method, path, secret, body=None):
    basic = base64.b64encode(secret.encode()).decode()
    headers = {"Authorization": f"Basic {basic}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(os.environ["PREFECT_API_URL"] + path, data, headers, method=method)
    try:
        return urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code
token = os.environ["PREFECT_API_AUTH_STRING"]
print(json.dumps({"answers": [
    ask("GET", "/admin/version", token),
    ask("POST", "/work_pools/", token, {"name": "mine", "type": "kubernetes"}),
    ask("PATCH", "/work_pools/kubernetes", token, {"base_job_template": {}}),
    ask("POST", "/flow_runs/filter", token, {}),
    ask("GET", "/admin/version", "admin:test-only"),
]}))
"""
    assert drive(installation, script).result() == {"answers": [200, 403, 403, 403, 401]}
