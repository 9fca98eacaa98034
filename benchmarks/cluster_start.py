"""Start of Dask clusters on Kubernetes: success rate, seconds of each step; the stock class beside it.

    python -m benchmarks.cluster_start --namespace tidepool --clusters 40 --at-a-time 5
    python -m benchmarks.cluster_start --namespace tidepool --turns 20
    python -m benchmarks.cluster_start --namespace tidepool --runs-namespace tidepool-runs --runs 20

Needs KUBECONFIG and a chart installed as tests/cluster does (TEST_KEEP_NAMESPACE=1 leaves one).

`--clusters`: each driver is a Job from the work pool's template;
one cluster = one Prefect flow that maps three tasks. Times are from asking for the cluster (the call of `map`) to the
result of the first mapped Prefect task. Stock is prefect_dask.DaskTaskRunner with dask_kubernetes' KubeCluster, given
pods that start: with its own spec and this Dask no cluster starts. It needs more rights, which it gets meanwhile.

`--turns`: the same, every other cluster without TLS.

`--runs`: flow runs of a deployment through the work pool, one after another, from "run" to the end of the first mapped
task; by the server's clock and the Job's creationTimestamp, which has whole seconds. In turns with as many whose driver
asks for the cluster early (the job variable `early_cluster`), and with `--beside IMAGE` as many of another image.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import statistics
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

from drive import drive
from installed import Platform
from kube import Namespace, command

if TYPE_CHECKING:
    from collections.abc import Sequence

# What a driver runs: CLUSTERS flows one after another, a line of JSON each.
DRIVER = '''
import asyncio, json, os, time
from prefect import flow, task
from prefect.logging import disable_run_logger

names = []

@task
def double(x):
    return 2 * x

async def gone():
    """Wait until this driver's clusters are deleted: one at a time means that none is deleted while one starts."""
    from tidepool.compute.clusters.kubernetes.api import KubernetesApi
    from tidepool.settings import settings
    api = KubernetesApi(settings().kubernetes.namespace)
    await api.connect(30)
    for name in names:
        while await api.pods(name):
            await asyncio.sleep(0.2)
    names.clear()

def steps():
    from tidepool.compute.clusters.kubernetes import cluster
    running = [each for each in cluster._clusters if each.status.name == "running"]
    names.extend(each.name for each in running)
    return [dict(each.steps) for each in running]

def stock(size):
    """Return KubeCluster as it is, with pods that start."""
    import asyncio
    from dask_kubernetes.operator import KubeCluster
    from tidepool.compute.clusters.kubernetes import manifest
    from tidepool.compute.clusters.kubernetes.driver import Run, driver_of
    from tidepool.compute.clusters.kubernetes.api import KubernetesApi
    from tidepool.settings import settings
    async def driver():
        s = settings().kubernetes
        api = KubernetesApi(s.namespace)
        await api.connect(30)
        return driver_of(await api.pod(s.pod_name), s)
    name = f"stock-{os.urandom(3).hex()}"
    names.append(name)
    spec = manifest.manifest(name, run=Run(), driver=asyncio.run(driver()), size=size,
        settings=settings().kubernetes, dask_settings={}, worker_variables={}, versions="")
    scheduler = spec["spec"]["scheduler"]["spec"]["containers"][0]
    scheduler["args"] = ["dask", "scheduler", "--host=0.0.0.0"]
    scheduler["env"] = [e for e in scheduler["env"] if not e["name"].startswith("DASK_")]
    scheduler["readinessProbe"]["periodSeconds"] = 1
    spec["spec"]["scheduler"]["service"].pop("publishNotReadyAddresses")
    worker = spec["spec"]["worker"]["spec"]["containers"][0]
    worker["args"] = ["dask", "worker", "--name=$(DASK_WORKER_NAME)", "--nthreads=1", "--worker-port=8788",
        "--dashboard", "--dashboard-address=:8789"]
    namespace = settings().kubernetes.namespace
    return KubeCluster(custom_cluster_spec=spec, namespace=namespace, resource_timeout=60, quiet=True)

def runner(kind):
    from tidepool.settings import settings
    size = settings().size("small")
    if kind == "stock":
        from prefect_dask import DaskTaskRunner
        return DaskTaskRunner(cluster_class=stock, cluster_kwargs={"size": size})
    from tidepool.compute.runner.task_runner import TidepoolTaskRunner
    ours = "tidepool.compute.clusters.kubernetes.cluster.KubernetesCluster"
    return TidepoolTaskRunner(cluster_class=ours, cluster_kwargs={"size": size})

for n in range(int(os.environ["CLUSTERS"])):
    tls = os.environ["KIND"] != "turns" or n % 2 == 1
    if os.environ["KIND"] == "turns":
        from tidepool.settings import set_variables
        set_variables({"TIDEPOOL_KUBERNETES_TLS": str(tls)})
    @flow(task_runner=runner(os.environ["KIND"]), name="cluster-start")
    def one():
        asked = time.monotonic()
        futures = double.map([1, 2, 3])
        futures[0].result()
        first = time.monotonic() - asked
        assert [future.result() for future in futures] == [2, 4, 6]
        return first, time.monotonic(), [{}] if os.environ["KIND"] == "stock" else steps()
    try:
        first, ended, [took] = one()
        close = time.monotonic() - ended
        print("RESULT " + json.dumps({"tls": tls, "first": first, "close": close, "steps": took}), flush=True)
        asyncio.run(gone())
    except Exception as error:
        print("RESULT " + json.dumps({"tls": tls, "failed": repr(error)[:300]}), flush=True)
'''
# Its task is inside the flow: it travels by value to the workers, which do not have the file.
PROGRAM = """
from prefect import flow, task
from tidepool.compute import dask_runner

@flow(task_runner=dask_runner("small", start_early=True), log_prints=True)
def first_mapped_task():
    print("first line")

    @task
    def double(x):
        return 2 * x

    return double.map([1, 2, 3]).result()
"""
STOCK_RIGHTS = """
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: benchmark-stock}
rules:
  - {apiGroups: [cluster.dask.org], resources: ["*"], verbs: [create, delete, get, list, patch, watch]}
  - {apiGroups: [""], resources: [pods, services, endpoints], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: benchmark-stock}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: benchmark-stock}
subjects: [{kind: ServiceAccount, name: tidepool-flow-run}]
"""


def measure(platform: Platform, kind: str, clusters: int, at_a_time: int) -> list[dict[str, object]]:
    """Run so many drivers at a time; return each cluster's figures."""
    each = {"KIND": kind, "CLUSTERS": str(clusters // at_a_time), "PREFECT_LOGGING_LEVEL": "ERROR"}
    drivers = [drive(platform, DRIVER, **each) for _ in range(at_a_time)]
    lines = [line for driver in drivers for line in driver.wait(120 + 90 * clusters / at_a_time)[1].splitlines()]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]


def through_the_pool(
    platform: Platform, runs: int, kinds: dict[str, dict[str, str]]
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds between the steps of so many flow runs of each kind, one after another, by its title.

    Args:
        platform: What executes them.
        runs: Number of runs of each kind.
        kinds: Job variables of each kind.
    """
    found: dict[str, dict[str, list[float]]] = {title: {} for title in kinds}
    for number, variables in enumerate(kinds.values()):
        _deployment(platform, f"first-mapped-task-{number}", variables)
    for _ in range(runs):
        for number, steps in enumerate(found.values()):
            _steps(platform, f"first-mapped-task-{number}/first-mapped-task-{number}", steps)
    return found


def _deployment(platform: Platform, name: str, variables: dict[str, str]) -> None:
    program = base64.b64encode(PROGRAM.encode()).decode()
    command_line = (
        f"sh -c 'cd /tmp && echo {program} | base64 -d >bench.py && exec python -m tidepool.operate.flow_run'"
    )
    platform.post(
        "deployments/",
        {
            "name": name,
            "flow_id": platform.post("flows/", {"name": name})["id"],
            "entrypoint": "bench.py:first_mapped_task",
            "path": ".",
            "pull_steps": [],
            "work_pool_name": "kubernetes",
            "job_variables": {**variables, "command": command_line},
        },
    )


def _steps(platform: Platform, deployment: str, found: dict[str, list[float]]) -> None:
    """Add the steps of one flow run."""
    run = platform.wait(platform.start(deployment))
    if run["state_type"] != "COMPLETED":
        found.setdefault("failed", []).append(0.0)
        return
    wanted = {"flow_runs": {"id": {"any_": [run["id"]]}}, "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    # The server records task runs a moment after the flow run.
    tasks = platform.until(
        lambda: (ended := platform.post("task_runs/filter", wanted)) and len(ended) == 3 and ended,
        "three task runs are recorded",
        60,
    )
    [job] = platform.runs.get("jobs", f"prefect.io/flow-run-id={run['id']}")
    asked, submitted, began, first = (
        datetime.fromisoformat(moment)
        for moment in (
            run["created"],
            job["metadata"]["creationTimestamp"],
            run["start_time"],
            min(each["end_time"] for each in tasks),
        )
    )
    for step, seconds in (
        ("run created to Job created", submitted - asked),
        ("Job created to the flow's first line", began - submitted),
        ("first line to first mapped task done", first - began),
        ("run created to first mapped task done", first - asked),
    ):
        found.setdefault(step, []).append(seconds.total_seconds())


def deployed(platform: Platform, runs: int, beside: Sequence[str]) -> None:
    """Measure flow runs through the work pool, those of other images beside them, and print the figures."""
    where = "--output=jsonpath={.spec.template.spec.containers[0].image}"
    image = platform.namespace.kubectl("get", "deployment", "tidepool-worker", where).strip()
    kinds = {
        "the cluster asked for by the flow": {"image": image},
        "the cluster asked for early": {"image": image, "early_cluster": "small"},
        **{each: {"image": each} for each in beside},
    }
    with platform.namespace.forwarded("service/tidepool-server", 4200) as port:
        reached = dataclasses.replace(platform, api=f"http://127.0.0.1:{port}/api")
        for title, found in through_the_pool(reached, runs, kinds).items():
            print(f"\nthrough the work pool, {title}: {runs - len(found.pop('failed', []))} of {runs} runs Completed")
            for step, seconds in found.items():
                print(
                    f"  {step:<40} median {statistics.median(seconds):5.2f} s   95th {percentile(seconds, 0.95):5.2f} s"
                )


def percentile(values: list[float], part: float) -> float:
    """Return the value that this part of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, round(part * (len(values) - 1)))]


def table(title: str, asked: int, results: list[dict[str, object]]) -> None:
    """Print one measurement."""
    first = [float(str(each["first"])) for each in results if "first" in each]
    print(f"\n{title}: {len(first)} of {asked} clusters ran their tasks")
    for reason in sorted({str(each["failed"])[:160] for each in results if "failed" in each}):
        print(f"  failed: {reason}")
    if not first:
        return
    print(f"  first mapped task  median {statistics.median(first):5.2f} s   95th {percentile(first, 0.95):5.2f} s")
    rows: dict[str, list[float]] = {}
    for each in results:
        steps = each.get("steps")
        for name, seconds in (steps if isinstance(steps, dict) else {}).items():
            rows.setdefault(name, []).append(seconds)
    for name, seconds in rows.items():
        print(f"    {name:<24} {statistics.median(seconds):5.2f} s        {percentile(seconds, 0.95):5.2f} s")
    close = [float(str(each["close"])) for each in results if "close" in each]
    print(f"  from the last result to the end of the run, median {statistics.median(close):.2f} s", flush=True)


def main() -> None:
    """Run the command."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--namespace", default="tidepool")
    arguments.add_argument("--runs-namespace", default="", help="of the flow runs; the same without it")
    arguments.add_argument("--clusters", type=int, default=0)
    arguments.add_argument("--turns", type=int, default=0, help="clusters with and without TLS, in turns")
    arguments.add_argument("--stock", type=int, default=0, help="stock clusters beside them")
    arguments.add_argument("--runs", type=int, default=0, help="flow runs through the work pool")
    arguments.add_argument("--beside", action="append", default=[], metavar="IMAGE", help="with --runs, in turns")
    arguments.add_argument("--at-a-time", type=int, default=1)
    chosen = arguments.parse_args()
    if not (chosen.clusters or chosen.turns or chosen.runs or chosen.stock):
        arguments.error("say what to measure: --clusters, --turns, --stock or --runs")
    namespace = Namespace(chosen.runs_namespace or chosen.namespace)
    platform = Platform(Namespace(chosen.namespace), namespace, "", "")
    print(f"{command('nproc').strip()} cores, load {Path('/proc/loadavg').read_text().split()[0]}")
    if chosen.runs:
        deployed(platform, chosen.runs, chosen.beside)
    if chosen.clusters:
        asked = chosen.clusters // chosen.at_a_time * chosen.at_a_time
        results = measure(platform, "ours", asked, chosen.at_a_time)
        table(f"tidepool, {chosen.at_a_time} at a time", asked, results)
    if chosen.turns:
        results = measure(platform, "turns", chosen.turns, 1)
        for tls, title in ((False, "without TLS"), (True, "with TLS")):
            table(title, chosen.turns // 2, [each for each in results if each["tls"] is tls])
    if chosen.stock:
        namespace.apply(STOCK_RIGHTS)
        try:
            results = measure(platform, "stock", chosen.stock, chosen.at_a_time)
        finally:
            namespace.kubectl("delete", "role,rolebinding", "benchmark-stock")
        table(f"stock, {chosen.at_a_time} at a time", chosen.stock, results)
    namespace.until(lambda: not namespace.dask(), "nothing is left", 60)
    print("nothing left after 60 s")


if __name__ == "__main__":
    main()
