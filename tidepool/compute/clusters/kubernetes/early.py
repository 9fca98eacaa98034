"""A Dask cluster that is asked for before Prefect is imported: its pods start while the driver does.

The driver's first process forks a child that asks for it (`ask`). The process of the flow, which is forked later, takes
it over when its flow asks for just this cluster (`Early.take`), and deletes it when it has not (`Early.discard`). If
anything goes wrong here the flow asks for a cluster as without it, and that says what is wrong.

Standard library, `cryptography` and this package: what takes longer to import than it saves has no place here.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import ssl
import sys
import threading
import traceback
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import TypeAdapter

from tidepool.compute.clusters.kubernetes import certificate, driver, manifest, names
from tidepool.errors import UsageError
from tidepool.settings import environment, settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tidepool.settings import Settings

# Where Kubernetes puts the token of a pod's ServiceAccount and the certificate of its API.
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# One request, and all of them: then the flow asks for its cluster itself.
_REQUEST_SECONDS = 5.0
_SECONDS = 15
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Asked:
    """A cluster that has been asked for.

    Attributes:
        name: Its name.
        driver: What its pods inherit.
        identity: Its key and certificate; None without TLS.
        body: The DaskCluster that was created.
    """

    name: str
    driver: driver.Driver
    identity: certificate.Identity | None
    body: dict[str, Any]


class Early:
    """The cluster of this driver that another process asks for.

    Args:
        answer: File descriptor of a pipe, to which that process writes what it did.
    """

    def __init__(self, answer: int) -> None:
        self._answer = answer
        self._lock = threading.Lock()
        self._lines: list[str] | None = None
        self._settled = False

    def wait(self) -> None:
        """Wait until the process that asks for it has ended, at most 15 s."""
        with self._lock:
            self._read()

    def take(self) -> Asked | None:
        """Return the cluster, which from now on is the caller's to delete; None: taken already, or not complete."""
        with self._lock:
            if self._settled or len(lines := self._read()) < 2:  # noqa: PLR2004 - its name, and all of it
                return None
            self._settled = True
        return TypeAdapter(Asked).validate_json(lines[1])

    def discard(self) -> str:
        """Delete the cluster if it was not taken; return its name, or an empty text if there was none to delete.

        Raises:
            OSError: the Kubernetes API does not answer.
            HTTPException: it does not answer as it should, or refuses.
        """
        with self._lock:
            if self._settled or not (lines := self._read()):
                return ""
            name = lines[0].strip()
            existed = _Api(settings().kubernetes.namespace).delete(name)
            self._settled = True
        return name if existed else ""

    def _read(self) -> list[str]:
        if self._lines is None:
            with open(self._answer, encoding="utf-8") as answer:  # noqa: PTH123 - a file descriptor
                self._lines = [line for line in answer if line.endswith("\n")]
        return self._lines


_asked: Early | None = None


def asked() -> Early | None:
    """Return the cluster that this process, or the one that it was forked from, has had asked for."""
    return _asked


def ask() -> Early | None:
    """Have the cluster asked for that the settings name, by a child of this process, which must have one thread.

    Returns:
        The cluster; None: the settings name none, or are not accepted, which the flow's process reports; or the system
        has no room for another process.
    """
    global _asked  # noqa: PLW0603 - it is handed on by a fork
    try:
        chosen = settings()
    except UsageError:
        return None
    run_id = environment().get("PREFECT__FLOW_RUN_ID", "")
    kubernetes = chosen.kubernetes
    if chosen.compute.provider != "kubernetes" or kubernetes.early_cluster == "none" or not kubernetes.pod_name:
        return None
    answer, writer = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(answer)
        os.close(writer)
        return None
    if pid == 0:
        # Whatever happens here must not continue with what the driver does.
        try:
            signal.alarm(_SECONDS)
            os.close(answer)
            with open(writer, "w", encoding="utf-8") as lines:  # noqa: PTH123 - a file descriptor
                _ask(lines, run_id, chosen)
        except (OSError, HTTPException, UsageError) as error:
            # Not the run's problem: its flow asks itself, and if it meets the same, its words are in the run's log.
            sys.stderr.write(f"no Dask cluster was asked for early: {error}\n")
        except BaseException:  # noqa: BLE001 - as above
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    _asked = Early(answer)
    return _asked


def _ask(lines: TextIO, run_id: str, chosen: Settings) -> None:
    kubernetes, size = chosen.kubernetes, chosen.size(chosen.kubernetes.early_cluster)
    manifest.check_caps([size], kubernetes)
    # First: the kubelet tries to mount a Secret that it misses again only half a second later.
    identity = certificate.own() if kubernetes.tls else None
    api = _Api(kubernetes.namespace)
    pod = _this_pod(api, kubernetes.pod_name)
    made = driver.driver_of(pod, kubernetes)
    run = driver.Run(run_id, pod["metadata"].get("labels", {}).get("prefect.io/flow-name", "run"), attempt=0)
    body = manifest.manifest(
        manifest.name_for(run, secrets.token_hex(2), made.uid),
        run=run,
        driver=made,
        size=size,
        settings=kubernetes,
        # Zero, as for each runner of a flow.
        dask_settings=manifest.scheduler_settings(0, chosen.compute.no_worker_seconds),
    )
    name: str = body["metadata"]["name"]
    # Before it is created: the answer may be lost.
    _write(lines, name)
    cluster = api.create(body)
    for part in manifest.parts(cluster, size, kubernetes, identity):
        api.create(part)
    _write(lines, TypeAdapter(Asked).dump_json(Asked(name, made, identity, body)).decode())


def _write(lines: TextIO, line: str) -> None:
    lines.write(line + "\n")
    lines.flush()


def _this_pod(api: _Api, name: str) -> dict[str, Any]:
    # The kubelet reports the digest of an image that the pod's spec names by a tag a moment after the start.
    give_up = monotonic() + driver.DIGEST_SECONDS
    while True:
        pod = api.get("v1", f"pods/{name}")
        if "@" in driver.running_image(pod) or monotonic() > give_up:
            return pod
        sleep(_POLL_SECONDS)


class _Api:
    """The Kubernetes API as a pod reaches it, in one namespace. kr8s takes half a second of CPU time to import."""

    def __init__(self, namespace: str) -> None:
        host, port = (environment()[f"KUBERNETES_SERVICE_{each}"] for each in ("HOST", "PORT"))
        context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
        self._connection = HTTPSConnection(host, int(port), timeout=_REQUEST_SECONDS, context=context)
        self._token = (ACCOUNT / "token").read_text().strip()
        self._namespace = namespace

    def get(self, version: str, path: str) -> dict[str, Any]:
        return self._request("GET", version, path)[1]

    def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._request("POST", body["apiVersion"], f"{body['kind'].lower()}s", body)[1]

    def delete(self, cluster: str) -> bool:
        """Delete a DaskCluster and what it owns; return False if there is none."""
        status, _ = self._request("DELETE", names.GROUP, f"daskclusters/{cluster}?propagationPolicy=Background")
        return status != HTTPStatus.NOT_FOUND

    def _request(
        self, method: str, version: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        root = "/apis/" if "/" in version else "/api/"
        url = f"{root}{version}/namespaces/{self._namespace}/{path}"
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        self._connection.request(method, url, json.dumps(body) if body else None, headers)
        response = self._connection.getresponse()
        text = response.read()
        absent = method == "DELETE" and response.status == HTTPStatus.NOT_FOUND
        if response.status >= HTTPStatus.BAD_REQUEST and not absent:
            raise HTTPException(f"{method} {path}: {response.status} {response.reason}")
        return response.status, json.loads(text)
