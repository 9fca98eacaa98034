"""kubectl for the tests: polling with a deadline, and everything that a person would look at when it fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DASK_KINDS = "daskclusters,daskworkergroups,daskautoscalers"


def command(*arguments: str, text: str | None = None, timeout: float = 120) -> str:
    """Run a program; return its output, or raise an error with it."""
    done = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Namespace:
    """One namespace of the cluster that KUBECONFIG names; a report of it tells of others as well."""

    def __init__(self, name: str, *others: Namespace) -> None:
        self.name = name
        self.others = others

    def kubectl(self, *arguments: str, text: str | None = None, timeout: float = 120) -> str:
        """Run kubectl in this namespace."""
        return command("kubectl", "--namespace", self.name, *arguments, text=text, timeout=timeout)

    def apply(self, manifest: dict[str, Any] | str) -> None:
        """Create or change objects."""
        self.kubectl("apply", "--filename=-", text=manifest if isinstance(manifest, str) else json.dumps(manifest))

    def get(self, kinds: str, selector: str = "") -> list[dict[str, Any]]:
        """Return the objects of some kinds."""
        chosen = [f"--selector={selector}"] if selector else []
        return list(json.loads(self.kubectl("get", kinds, "--output=json", *chosen))["items"])

    def names(self, kinds: str, selector: str = "") -> set[str]:
        """Return their names, as kind/name."""
        return {f"{each['kind']}/{each['metadata']['name']}" for each in self.get(kinds, selector)}

    def dask(self) -> set[str]:
        """Return all existing objects that a Dask cluster consists of."""
        of_a_cluster = "dask.org/cluster-name"
        return self.names(DASK_KINDS) | self.names("pods,deployments,replicasets,services", of_a_cluster)

    def until(self, condition: Callable[[], Any], what: str, seconds: float) -> Any:
        """Wait for a true value; at the deadline fail with a report."""
        end = time.monotonic() + seconds
        while True:
            if value := condition():
                return value
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {seconds:g} s\n{self.report()}")
            time.sleep(0.5)

    @contextmanager
    def forwarded(self, target: str, port: int, health: str = "/api/health") -> Iterator[int]:
        """Forward a local port to one of a web server in the cluster, again when the connection breaks."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            local = probe.getsockname()[1]
        # A suite that was killed must not leave a loop that starts kubectl forever.
        alive = f"kill -0 {os.getpid()} 2>/dev/null"
        loop = (
            f"while {alive}; do kubectl --namespace {self.name} port-forward {target} {local}:{port}; sleep 0.2; done"
        )
        forward = subprocess.Popen(
            ["bash", "-c", loop], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        ended = threading.Event()
        watch = threading.Thread(target=_renew, args=(forward.pid, local, health, ended), daemon=True)
        watch.start()
        try:
            self.until(lambda: _healthy(local, health), f"{target} answers", 120)
            yield local
        finally:
            ended.set()
            watch.join()
            os.killpg(forward.pid, 15)
            forward.wait()

    def report(self) -> str:
        """Return objects, events, descriptions and logs, for the report of a failed test."""
        parts = [
            self._try("get", f"jobs,pods,{DASK_KINDS}", "--output=wide"),
            self._try("get", "events", "--sort-by=.lastTimestamp"),
            self._try("describe", "pods", "--selector=dask.org/cluster-name"),
        ]
        for pod in self.get("pods"):
            name = pod["metadata"]["name"]
            parts.append(f"--- log of {name}\n{self._try('logs', name, '--all-containers', '--tail=60')}")
        return "\n".join([f"=== namespace {self.name}", *parts, *(each.report() for each in self.others)])

    def _try(self, *arguments: str) -> str:
        try:
            return self.kubectl(*arguments)
        except RuntimeError as error:
            return str(error)


def _renew(loop: int, port: int, path: str, ended: threading.Event) -> None:
    """End a port-forward that refuses connections, so that the loop begins another: none outlives its kubelet."""
    while not ended.wait(5):
        try:
            httpx.get(f"http://127.0.0.1:{port}{path}", timeout=60)
        except httpx.TimeoutException:  # the server is busy, and other requests are on their way
            continue
        except httpx.TransportError:
            subprocess.run(("pkill", "--parent", str(loop), "kubectl"), check=False)


def _healthy(port: int, path: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).is_success
    except httpx.TransportError:
        return False
