"""Flow runs for benchmarks.scale: by a Prefect server, or only their Jobs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from benchmarks.fake_node import IMAGE, KEY, Kubernetes

if TYPE_CHECKING:
    import httpx

NAME = "scale"
LABEL_RUN = "prefect.io/flow-run-id"
TOLERATION = {"key": KEY, "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
POOL = Path(__file__).parents[1] / "k8s" / "work-pool" / "base-job-template.json"


async def ask(client: httpx.AsyncClient, path: str, body: Any = None) -> Any:
    """Send a request to the Prefect API; a POST if it has a body."""
    answer = await client.request("GET" if body is None else "POST", path, json=body)
    return answer.raise_for_status().json() if answer.content else None


class ByPrefect:
    """Flow runs of a deployment, which the Prefect worker executes.

    Args:
        server: The Prefect API, with all rights.
        proxy: The Prefect API as flow runs have it.
    """

    def __init__(self, server: httpx.AsyncClient, proxy: httpx.AsyncClient) -> None:
        self._server, self._proxy = server, proxy
        self.deployment = ""

    async def start(self, namespace: str) -> str:  # noqa: ARG002 - the work pool has one
        """Start a run; return its id."""
        body = {"state": {"type": "SCHEDULED", "name": "Scheduled"}}
        return str((await ask(self._server, f"deployments/{self.deployment}/create_flow_run", body))["id"])

    async def begin(self, run_id: str) -> None:
        """Do what a driver does before its flow."""
        await ask(self._proxy, f"flow_runs/{run_id}")
        await self.state(run_id, "RUNNING")
        await self.log(run_id, "a Dask cluster is asked for")

    async def state(self, run_id: str, state: str) -> None:
        """Report a state."""
        body = {"state": {"type": state, "name": state.capitalize()}}
        answer = await ask(self._proxy, f"flow_runs/{run_id}/set_state", body)
        if answer["status"] != "ACCEPT":
            raise RuntimeError(f"{state}: {answer['status']} {answer['details']}")

    async def log(self, run_id: str, message: str) -> None:
        """Send a line of the log."""
        line = {"name": "prefect.flow_runs", "level": 20, "message": message, "flow_run_id": run_id}
        line["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        await ask(self._proxy, "logs/", [line])


class ByHand(ByPrefect):
    """Jobs as the work pool makes them, and no Prefect.

    Args:
        kubernetes: The Kubernetes API.
    """

    def __init__(self, kubernetes: Kubernetes) -> None:
        self._kubernetes = kubernetes

    async def start(self, namespace: str) -> str:
        """Create a Job; return the id of its run."""
        run_id = str(uuid4())
        labels = {LABEL_RUN: run_id, "prefect.io/flow-name": NAME, "prefect.io/deployment-name": NAME}
        template = json.loads(POOL.read_text())["job_configuration"]["job_manifest"]["spec"]["template"]
        container = template["spec"]["containers"][0] | {"image": IMAGE, "args": ["python", "-m", "tidepool"]}
        container["resources"] = {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "1Gi"}}
        pod = {name: value for name, value in template["spec"].items() if name not in {"parallelism", "completions"}}
        pod |= {
            "containers": [container], "nodeSelector": {KEY: "yes"}, "tolerations": [TOLERATION],
            "terminationGracePeriodSeconds": 60, "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}}],
        }  # fmt: skip
        spec = {
            "backoffLimit": 0, "activeDeadlineSeconds": 3600, "ttlSecondsAfterFinished": 60,
            "template": {"metadata": {"labels": template["metadata"]["labels"] | labels}, "spec": pod},
        }  # fmt: skip
        job = {"metadata": {"generateName": f"{NAME}-", "labels": labels}, "spec": spec}
        await self._kubernetes.ask("POST", f"batch/v1/namespaces/{namespace}/jobs", job)
        return run_id

    async def begin(self, run_id: str) -> None:
        """Do nothing."""

    async def state(self, run_id: str, state: str) -> None:
        """Do nothing."""

    async def log(self, run_id: str, message: str) -> None:
        """Do nothing."""
