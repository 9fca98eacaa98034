"""Fifty Deployments of one pod, as dask-kubernetes makes them for workers, beside one Deployment of fifty pods.

    python -m benchmarks.control_plane --binaries DIR --deployments 50

Without an operator: this creates the Deployments itself, on the fake node.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from benchmarks.fake_node import IMAGE, KEY, FakeNode, Kubernetes

_GIVE_UP_SECONDS = 300.0
_POD = {
    "nodeSelector": {KEY: "yes"}, "tolerations": [{"key": KEY, "operator": "Exists"}],
    "containers": [{"name": "worker", "image": IMAGE}], "terminationGracePeriodSeconds": 10,
}  # fmt: skip


def _deployment(name: str, replicas: int) -> dict[str, Any]:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": _POD}
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    return {"metadata": {"name": name, "labels": labels}, "spec": spec}


async def measure(number: int, replicas: int) -> str:
    """Create so many Deployments, wait until all pods run, delete them, and wait until all are gone."""
    kubernetes, began = await Kubernetes.connect(), time.monotonic()
    path = "apps/v1/namespaces/default/deployments"
    async with asyncio.timeout(_GIVE_UP_SECONDS), FakeNode(kubernetes, "127.0.0.1") as node:

        async def until(pods: int) -> float:
            while sum(each["status"]["phase"] == "Running" for each in node.pods.values()) != pods:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # the precision of the times
            return time.monotonic() - began

        names = [f"shape-{replicas}-{each}" for each in range(number)]
        await asyncio.gather(*(kubernetes.ask("POST", path, _deployment(each, replicas)) for each in names))
        running = await until(number * replicas)
        began = time.monotonic()
        options = {"propagationPolicy": "Background"}
        await asyncio.gather(*(kubernetes.ask("DELETE", f"{path}/{each}", options) for each in names))
        gone = await until(0)
    return f"{number} Deployments of {replicas} pods: all run after {running:.1f} s; gone after {gone:.1f} s"


if __name__ == "__main__":
    print(asyncio.run(measure(int(sys.argv[1]), int(sys.argv[2]))), flush=True)
