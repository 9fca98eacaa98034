"""The same mapped items on prefect-dask's runner with dask-kubernetes' cluster: what the suite's stock rows run.

With its own pods this cluster does not start: the commands `dask-scheduler` and `dask-worker` are not in this Dask.
"""

from __future__ import annotations

import os
from uuid import uuid4

from chaos_flows import mapped
from dask_kubernetes.operator import KubeCluster, make_cluster_spec
from prefect import flow
from prefect.runtime import flow_run
from prefect_dask import DaskTaskRunner

# What a worker needs for the items: the store, and where its task runs are recorded.
PASSED_ON = ("AWS_", "TIDEPOOL_", "PREFECT_API_")


def cluster() -> KubeCluster:
    """Return a cluster of two workers with pods that start."""
    name = f"stock-{str(flow_run.id)[:8]}-{uuid4().hex[:4]}"
    env = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    memory = {"memory": "614Mi", "cpu": "20m"}
    resources = {"requests": memory, "limits": {"memory": memory["memory"]}}
    spec = make_cluster_spec(name, image=os.environ["CHAOS_IMAGE"], n_workers=2, env=env, resources=resources)
    scheduler = spec["spec"]["scheduler"]["spec"]["containers"][0]
    scheduler["args"] = ["python", "-m", "distributed.cli.dask_scheduler", "--host=0.0.0.0"]
    worker = spec["spec"]["worker"]["spec"]["containers"][0]
    worker["args"] = ["python", "-m", "distributed.cli.dask_worker", "--name=$(DASK_WORKER_NAME)"]
    # With one thread Dask takes the half of the memory that it may use, on a node of two cores: its workers pause.
    worker["args"] += ["--nthreads=1", f"--memory-limit={memory['memory']}"]
    worker.pop("ports")
    namespace = os.environ["CHAOS_NAMESPACE"]
    return KubeCluster(custom_cluster_spec=spec, namespace=namespace, resource_timeout=60, quiet=True)


@flow(name="chaos-stock-items", task_runner=DaskTaskRunner(cluster_class=cluster))
def items(count: int = 30, seconds: float = 1.0, fault: str = "") -> int:
    """Map items on a Dask cluster of this run's own."""
    return mapped(count, seconds, fault)
