"""Rights of the accounts and allowed connections, under default-deny and the restricted Pod Security Standard."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from drive import drive

if TYPE_CHECKING:
    from installed import Platform
    from kube import Namespace

# Tries each address for three seconds: a policy drops packets, so that what is refused takes that long.
PROBE = """
import json, socket
reached = {}
for name, (host, port) in TARGETS.items():
    try:
        socket.create_connection((host, port), timeout=3).close()
        reached[name] = True
    except OSError:
        reached[name] = False
print(json.dumps(reached))
"""
ACCOUNTS = ("worker", "flow-run", "operator")
FORBIDDEN = (
    ("get", "secrets"),
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

    services = {"server": ("tidepool-server", 4200), "postgres": ("postgres", 5432), "redis": ("redis", 6379)}
    targets = {name: (address(service), port) for name, (service, port) in services.items()}
    targets["store"] = (address("s3"), 7070)
    api = installation.namespace.kubectl("--namespace=default", "get", "service", "kubernetes", "--output=json")
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
    reached = stranger(installation.namespace, installation.image, probe)
    sys.__stderr__.write(f"a pod without our labels reaches {reached}\n")
    assert reached == dict.fromkeys(reached, False)


def test_a_driver_reaches_what_it_needs_and_no_more(installation: Platform, probe: str) -> None:
    reached = drive(installation.namespace, probe).result()
    sys.__stderr__.write(f"a driver reaches {reached}\n")
    assert reached == {"server": True, "kubernetes": True, "store": True, "postgres": False, "redis": False}


@pytest.mark.parametrize("account", ACCOUNTS)
def test_an_account_may_not_rise(installation: Platform, account: str) -> None:
    namespace = installation.namespace
    who = f"--as=system:serviceaccount:{namespace.name}:tidepool-{account}"
    sys.__stderr__.write(f"{account}\n{namespace.kubectl('auth', 'can-i', '--list', who)}\n")
    for verb, what in FORBIDDEN:
        assert not allowed(namespace, verb, what, who), (verb, what)
    assert not allowed(namespace, "list", "pods", who, "--namespace=kube-system")
    assert not allowed(namespace, "*", "*", who)


def allowed(namespace: Namespace, verb: str, what: str, *options: str) -> bool:
    """Return the answer of `kubectl auth can-i`, whose exit code is 1 for no."""
    try:
        return namespace.kubectl("auth", "can-i", verb, what, *options).strip() == "yes"
    except RuntimeError:
        return False
