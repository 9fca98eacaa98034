"""A Dask cluster that a driver asks for before it imports Prefect: by a child of the driver, of a real HTTPS server."""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.conftest import KubernetesServer
from tidepool.compute.clusters.kubernetes import driver, early, manifest
from tidepool.settings import environment, settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RUN = "0d9e1c1e-86a4-4a0f-9d47-6a8a5d1a0b11"
POD = {
    "metadata": {
        "name": "heron-x",
        "uid": "5f0c7a9e-1b2c",
        "labels": {"prefect.io/flow-name": "weekly-forecast", "prefect.io/deployment-name": "weekly"},
        "ownerReferences": [{"kind": "Job", "name": "heron", "uid": "uid-j"}],
    },
    "spec": {
        "containers": [{"name": "d", "image": "r/tidepool@sha256:" + "a" * 64, "env": [{"name": "A", "value": "b"}]}]
    },
}
# What a driver does with it, and prints of it.
SCRIPT = """
import json, sys
from pathlib import Path
from tidepool.compute.clusters.kubernetes import early
from tidepool.operate import engine
early.ACCOUNT = Path(sys.argv[1])
asked = early.ask()
print(json.dumps(asked is not None))
if asked:
    for step in sys.argv[2:]:
        if step == "take":
            found = asked.take()
            print(json.dumps(found and [found.name, found.body, found.identity.certificate]))
        else:
            engine.discard(asked)
"""
VARIABLES = {
    "PREFECT__FLOW_RUN_ID": RUN,
    "TIDEPOOL_COMPUTE_PROVIDER": "kubernetes",
    "TIDEPOOL_KUBERNETES_NAMESPACE": "ns",
    "TIDEPOOL_KUBERNETES_POD_NAME": "heron-x",
    "TIDEPOOL_KUBERNETES_EARLY_CLUSTER": "medium",
}


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """The folder of a pod's ServiceAccount."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "api")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1).public_key(key.public_key())
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC)).not_valid_after(datetime(9999, 1, 1, tzinfo=UTC))
        .add_extension(address, critical=False).sign(key, None)
    )  # fmt: skip
    (tmp_path / "ca.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "token").write_text("t\n")
    return tmp_path


@pytest.fixture
def api(account: Path) -> Iterator[KubernetesServer]:
    """The Kubernetes API as pods reach it: it has the driver's pod, and creates what it is asked to."""

    def answer(request: str) -> tuple[int, Any]:
        method, _, body = (request + "  ").split(" ", 2)
        if method == "GET":
            return 200, POD
        created = json.loads(body) if body.strip() else {}
        created.setdefault("metadata", {})["uid"] = "uid-c"
        return 201, created

    with KubernetesServer() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(account / "ca.crt", account / "key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.answers = answer
        with server.answering():
            yield server


def drive(api: KubernetesServer, account: Path, *steps: str, **variables: str) -> tuple[list[Any], str]:
    """Ask for a cluster as a driver does, and then make the steps; return what was printed, and the pod's log."""
    where = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.server_port)}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(account), *steps],
        env=environment() | where | VARIABLES | variables, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return [json.loads(each) for each in ended.stdout.splitlines()], ended.stderr


def made(api: KubernetesServer) -> list[dict[str, Any]]:
    return [json.loads(each.split(" ", 2)[2]) for each in api.requests if each.startswith("POST")]


def test_the_cluster_is_the_one_that_the_flow_would_ask_for(api: KubernetesServer, account: Path) -> None:
    (_, found, again), _ = drive(api, account, "take", "take", "discard")
    assert [each.split(" ")[:2] for each in api.requests] == [
        ["GET", "/api/v1/namespaces/ns/pods/heron-x"],
        ["POST", "/apis/kubernetes.dask.org/v1/namespaces/ns/daskclusters"],
        ["POST", "/api/v1/namespaces/ns/secrets"],
        ["POST", "/apis/kubernetes.dask.org/v1/namespaces/ns/daskworkergroups"],
    ], "and nothing is deleted that was taken"
    name, taken, of_the_client = found
    assert name.startswith("weekly-")
    assert name.endswith("-5f0c7a9e"), "admission takes no other name"
    kubernetes = settings().kubernetes.model_copy(update={"namespace": "ns", "pod_name": "heron-x"})
    body = manifest.manifest(
        name,
        run=driver.Run(RUN, "weekly-forecast", 1),
        driver=driver.driver_of(POD, kubernetes),
        size=settings().size("medium"),
        settings=kubernetes,
        dask_settings=manifest.scheduler_settings(0, settings().compute.no_worker_seconds),
    )
    cluster, secret, _ = made(api)
    assert taken == cluster == body
    assert secret["stringData"]["tls.crt"] == of_the_client
    assert again is None, "it is one cluster"


def test_what_no_flow_has_taken_is_deleted(api: KubernetesServer, account: Path) -> None:
    _, log = drive(api, account, "discard", "discard", "take")
    name = made(api)[0]["metadata"]["name"]
    deleted = f"DELETE /apis/kubernetes.dask.org/v1/namespaces/ns/daskclusters/{name}?propagationPolicy=Background"
    assert [each for each in api.requests if each.startswith("DELETE")] == [deleted]
    assert log == f"Dask cluster {name} deleted: it was asked for early, and not used\n"


def test_a_refused_cluster_is_left_to_the_flow(api: KubernetesServer, account: Path) -> None:
    api.answers = [(200, POD), (403, {"message": "exceeded quota"}), (404, {})]
    (_, found), log = drive(api, account, "take", "discard")
    assert found is None
    assert "no Dask cluster was asked for early: POST daskclusters: 403 Forbidden\n" in log
    assert api.requests[-1].startswith("DELETE"), "its answer may have been lost"
    assert "deleted" not in log


def test_a_driver_without_room_for_another_process_asks_for_none(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def full() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    request.addfinalizer(settings.cache_clear)
    monkeypatch.setattr(os, "fork", full)
    opened = psutil.Process().num_fds()
    assert early.ask() is None
    assert psutil.Process().num_fds() == opened


def test_half_a_cluster_is_deleted(api: KubernetesServer, account: Path) -> None:
    api.answers = [(200, POD), (201, {**POD, "kind": "x"}), (409, {"message": "exists"}), (200, {})]
    found, _ = drive(api, account, "take", "discard")
    assert found == [True, None]
    assert api.requests[-1].startswith("DELETE")


def test_a_cluster_that_cannot_be_deleted_is_told(api: KubernetesServer, account: Path) -> None:
    api.answers = [(200, POD), (503, {}), (503, {})]
    _, log = drive(api, account, "discard")
    assert "was not deleted (DELETE daskclusters/weekly-" in log
    assert log.endswith(": 503 Service Unavailable); Kubernetes does, with the Job\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TIDEPOOL_KUBERNETES_EARLY_CLUSTER", "none"),
        ("TIDEPOOL_KUBERNETES_EARLY_CLUSTER", "huge"),
        ("TIDEPOOL_KUBERNETES_POD_NAME", ""),
        ("TIDEPOOL_COMPUTE_PROVIDER", "local"),
    ],
)
def test_nothing_is_asked_for_without_an_order(api: KubernetesServer, account: Path, name: str, value: str) -> None:
    assert drive(api, account, **{name: value}) == ([False], "")
    assert api.requests == []


def test_more_than_a_run_may_have_is_not_asked_for(api: KubernetesServer, account: Path) -> None:
    found, log = drive(api, account, "take", TIDEPOOL_KUBERNETES_MAX_WORKERS="1")
    assert found == [True, None]
    assert "above TIDEPOOL_KUBERNETES_MAX_WORKERS=1; nothing was created" in log
    assert api.requests == []


def test_a_driver_without_an_order_imports_neither_cryptography_nor_dask() -> None:
    script = (
        "import sys, tidepool.operate.flow_run; print(sorted({'cryptography', 'dask', 'kr8s'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
