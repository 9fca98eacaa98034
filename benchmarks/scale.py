"""Growth: what flow runs with many Dask workers each ask of server, database, operator and API server.

    python -m benchmarks.scale --namespace tidepool --runs-namespace tidepool-runs --runs 40 --every 20
    python -m benchmarks.scale --namespace tidepool --runs-namespace tidepool-runs --idle 180

Needs KUBECONFIG, a chart installed as tests/cluster does (TEST_KEEP_NAMESPACE=1 leaves one), and to be on the node, as
root: it reads the CPU time of the processes. Nothing else should use the machine.

Everything is real but the machines: a flow run is created for a deployment, the Prefect worker makes its Job, and the
Dask operator the Deployments of a scheduler and `--workers` workers. Their pods are bound to a fake node
(fake_node.py), where they are Running at once and execute nothing. In place of the driver this program sends what a
driver sends: states and log lines through the proxy of flow runs, and DaskCluster, Secret and DaskWorkerGroup by
tidepool's own manifest, with the account of flow runs and the name and uid of the driver's pod. `--hold` seconds after
all workers run, it deletes the cluster and the Job ends. Task runs are not part of it:
benchmarks/results/task_runner.md has what they cost.

While it runs, flow runs may choose the fake node (ConfigMap of the rules), and the work pool has no limit.
`--every 0`: one run at a time, the next when nothing of the last is left. `--idle` measures the platform without runs;
every other measurement is what it takes above that. `--label` keeps a measurement of another installation apart.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import json
import sys
import time
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

from installed import AUTH
from kube import Namespace

from benchmarks.fake_node import KEY, FakeNode, Kubernetes
from benchmarks.fake_runs import LABEL_RUN, NAME, TOLERATION, ByHand, ByPrefect, ask
from benchmarks.parts import Parts
from benchmarks.scale_tables import STEPS, record
from tidepool.compute.clusters.kubernetes import certificate, manifest
from tidepool.compute.clusters.kubernetes.driver import Run, driver_of
from tidepool.settings import SizeSettings, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

POLL_SECONDS = 0.5
GIVE_UP_SECONDS = 400.0
LABEL_CLUSTER = "dask.org/cluster-name"
DASK = "kubernetes.dask.org/v1"
RULES = "tidepool-flow-run-rules"
OURS = "app.kubernetes.io/part-of=tidepool"
WHERE_DASK_OBJECTS_ARE = {
    DASK: ("daskclusters", "daskworkergroups"), "apps/v1": ("deployments", "replicasets"), "v1": ("pods", "services"),
}  # fmt: skip


@dataclasses.dataclass
class Times:
    """When something happened to one flow run, by the clock of this machine."""

    asked: float = 0.0
    began: float = 0.0
    created: float = 0.0
    scheduler: float = 0.0
    pods: float = 0.0
    running: float = 0.0
    deleted: float = 0.0
    gone: float = 0.0

    def steps(self) -> dict[str, float]:
        """Return the seconds of each step."""
        since = (self.asked, self.created, self.created, self.created, self.deleted)
        until = (self.began, self.scheduler, self.pods, self.running, self.gone)
        return {step: end - begin for step, begin, end in zip(STEPS, since, until, strict=True)}


class Drivers:
    """Flow runs and their fake drivers.

    Args:
        chosen: The arguments of the command.
        kubernetes: The Kubernetes API.
        node: The fake node.
        runs: How runs are started and reported.
    """

    def __init__(self, chosen: argparse.Namespace, kubernetes: Kubernetes, node: FakeNode, runs: ByPrefect) -> None:
        self._chosen, self._kubernetes, self._node, self._runs = chosen, kubernetes, node, runs
        self._phases: dict[str, dict[str, tuple[str, str]]] = {}  # cluster -> pod -> component, phase
        self._drivers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.finished: list[Times] = []
        node.changed = self._changed

    async def all(self) -> list[str]:
        """Run all; return the problems of those that did not end as they should."""
        tasks: list[asyncio.Task[None]] = []
        namespaces = self._chosen.runs_namespace.split(",")
        began = time.monotonic()
        for number in range(self._chosen.runs):
            if self._chosen.every:
                await asyncio.sleep(max(0.0, began + number * self._chosen.every - time.monotonic()))
            elif tasks:
                await asyncio.wait(tasks)
            tasks.append(asyncio.create_task(self._run(namespaces[number % len(namespaces)])))
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        return [repr(each)[:300] for each in ended if each is not None]

    def _changed(self, pod: dict[str, Any]) -> None:
        labels, phase = pod["metadata"]["labels"], pod["status"]["phase"]
        if cluster := labels.get(LABEL_CLUSTER):
            pods = self._phases.setdefault(cluster, {})
            pods[pod["metadata"]["name"]] = labels["dask.org/component"], phase
        elif phase == "Running" and not (driver := self._driver(labels[LABEL_RUN])).done():
            driver.set_result(pod)

    def _driver(self, run_id: str) -> asyncio.Future[dict[str, Any]]:
        return self._drivers.setdefault(run_id, asyncio.get_running_loop().create_future())

    async def _run(self, namespace: str) -> None:
        times = Times(asked=time.monotonic())
        run_id = await self._runs.start(namespace)
        async with asyncio.timeout(GIVE_UP_SECONDS):
            pod = await self._driver(run_id)
            times.began = time.monotonic()
            await self._runs.begin(run_id)
            cluster = await self._create(run_id, pod, times)
            pods = self._phases.setdefault(cluster, {})
            workers = self._chosen.workers
            times.scheduler = await _when(lambda: "scheduler" in {part for part, _ in pods.values()})
            times.pods = await _when(lambda: sum(part == "worker" for part, _ in pods.values()) >= workers)
            times.running = await _when(lambda: sum(phase == "Running" for _, phase in pods.values()) == workers + 1)
            await self._runs.log(run_id, f"{workers} workers run")
            await asyncio.sleep(self._chosen.hold)
            times.deleted = time.monotonic()
            path = f"{DASK}/namespaces/{namespace}/daskclusters/{cluster}"
            await self._kubernetes.ask(
                "DELETE", path, {"propagationPolicy": "Background"}, headers=self._by_a_run(pod),
                absent=(HTTPStatus.NOT_FOUND,),
            )  # fmt: skip
            await self._runs.state(run_id, "COMPLETED")
            await self._runs.log(run_id, "done")
            self._node.end(pod)
            times.gone = await _when(lambda: {phase for _, phase in pods.values()} == {"gone"})
            while await self._left(namespace, cluster):  # noqa: ASYNC110 - another process deletes it
                await asyncio.sleep(POLL_SECONDS)
            times.gone = time.monotonic()
        self.finished.append(times)

    async def _create(self, run_id: str, pod: dict[str, Any], times: Times) -> str:
        """Create the objects of a Dask cluster as a driver does; return its name."""
        meta = pod["metadata"]
        options = settings().kubernetes.model_copy(
            update={"namespace": meta["namespace"], "pod_name": meta["name"], "scheduler_cpu": 0.02}
        )
        size = SizeSettings(workers=self._chosen.workers, cpu=0.02, memory_gib=0.6)
        driver = driver_of(pod, options)
        run = Run(run_id, NAME)
        body = manifest.manifest(
            manifest.name_for(run, "0000", driver.uid),
            run=run,
            driver=driver,
            size=size,
            settings=options,
            dask_settings=manifest.scheduler_settings(3, 60),
        )
        times.created = time.monotonic()
        cluster = await self._post(body, pod)
        for part in manifest.parts(cluster, size, options, certificate.own()):
            await self._post(part, pod)
        return str(cluster["metadata"]["name"])

    async def _post(self, body: dict[str, Any], pod: dict[str, Any]) -> dict[str, Any]:
        path = f"{body['apiVersion']}/namespaces/{pod['metadata']['namespace']}/{body['kind'].lower()}s"
        return await self._kubernetes.ask("POST", path, body, headers=self._by_a_run(pod)) or {}

    def _by_a_run(self, pod: dict[str, Any]) -> dict[str, str]:
        """Return the headers of a request by the flow runs' account, with the token of a pod."""
        extra = "Impersonate-Extra-Authentication.kubernetes.io%2Fpod-"
        account = f"system:serviceaccount:{pod['metadata']['namespace']}:{pod['spec']['serviceAccountName']}"
        return {
            "Impersonate-User": account,
            f"{extra}Name": pod["metadata"]["name"],
            f"{extra}Uid": pod["metadata"]["uid"],
        }

    async def _left(self, namespace: str, cluster: str) -> bool:
        for version, kinds in WHERE_DASK_OBJECTS_ARE.items():
            for kind in kinds:
                path = f"{version}/namespaces/{namespace}/{kind}"
                if kind == "daskclusters":
                    found = await self._kubernetes.ask("GET", f"{path}/{cluster}", absent=(HTTPStatus.NOT_FOUND,))
                else:
                    found = await self._kubernetes.ask("GET", path, labelSelector=f"{LABEL_CLUSTER}={cluster}")
                    found = found and found["items"]
                if found:
                    return True
        return False


async def _when(condition: Callable[[], bool]) -> float:
    """Wait for a condition; return the time."""
    while not condition():  # noqa: ASYNC110 - many runs wait, each for something else
        await asyncio.sleep(0.05)  # the precision of the times
    return time.monotonic()


async def scheduler_answers(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the operator's question as a busy Dask scheduler does: not idle."""
    body = b'{"idle_since": null}'
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    writer.close()


async def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure; return the figures."""
    given = {int(pid): name for name, _, pid in (each.partition("=") for each in chosen.part)}
    parts, end = Parts(Namespace(chosen.namespace), given), asyncio.Event()
    if chosen.idle:
        asyncio.get_running_loop().call_later(chosen.idle, end.set)
        return {"usage": dataclasses.asdict(await parts.measure(end))}
    kubernetes = await Kubernetes.connect()
    nodes = (await kubernetes.ask("GET", "v1/nodes") or {})["items"]
    address = nodes[0]["status"]["addresses"][0]["address"] if nodes else "127.0.0.1"
    async with (
        await asyncio.start_server(scheduler_answers, address, 8787),
        by_hand(kubernetes) if chosen.no_prefect else by_prefect(chosen) as runs,
        FakeNode(kubernetes, address) as node,
    ):
        drivers = Drivers(chosen, kubernetes, node, runs)
        measuring = asyncio.create_task(parts.measure(end))
        await asyncio.sleep(2)
        problems = await drivers.all()
        end.set()
        usage = await measuring
        for each in map(Namespace, chosen.runs_namespace.split(",")):
            each.kubectl("delete", "daskclusters", f"--selector={OURS}", "--wait=false")
            each.kubectl("delete", "jobs", f"--selector=prefect.io/flow-name={NAME}", "--wait=false")
        await asyncio.wait_for(_when(lambda: not node.pods), 120)
    steps = [each.steps() for each in sorted(drivers.finished, key=lambda each: each.asked)]
    return {"usage": dataclasses.asdict(usage), "steps": steps, "problems": problems}


@asynccontextmanager
async def by_hand(kubernetes: Kubernetes) -> AsyncIterator[ByPrefect]:
    """Prepare nothing."""
    yield ByHand(kubernetes)


@asynccontextmanager
async def by_prefect(chosen: argparse.Namespace) -> AsyncIterator[ByPrefect]:
    """Create the deployment, and let its runs choose the fake node; afterwards all is as before."""
    platform, runs = Namespace(chosen.namespace), Namespace(chosen.runs_namespace)
    secret = json.loads(runs.kubectl("get", "secret", "tidepool-flow-run-api", "--output=json"))
    user, _, word = base64.b64decode(secret["data"]["auth-string"]).decode().partition(":")
    had = json.loads(runs.kubectl("get", "configmap", RULES, "--output=json"))["data"]

    def rules(data: dict[str, str]) -> None:
        runs.kubectl("patch", "configmap", RULES, "--type=merge", f"--patch={json.dumps({'data': data})}")

    async with (
        _client(platform, "tidepool-server", AUTH) as server,
        _client(platform, "tidepool-flow-run-api", (user, word)) as proxy,
    ):
        limit = (await ask(server, "work_pools/kubernetes"))["concurrency_limit"]
        flow = (await ask(server, "flows/", {"name": NAME}))["id"]
        variables = {"node_selector": {KEY: "yes"}, "tolerations": [TOLERATION], "finished_job_ttl": 60}
        body = {"name": NAME, "flow_id": flow, "entrypoint": "none.py:none", "work_pool_name": "kubernetes"}
        try:
            rules({"nodeSelectors": KEY, "tolerations": KEY})
            await server.patch("work_pools/kubernetes", json={"concurrency_limit": None})
            prefect = ByPrefect(server, proxy)
            prefect.deployment = (await ask(server, "deployments/", {**body, "job_variables": variables}))["id"]
            yield prefect
        finally:
            rules({name: had[name] for name in ("nodeSelectors", "tolerations")})
            await server.patch("work_pools/kubernetes", json={"concurrency_limit": limit})
            await server.delete(f"flows/{flow}")


def _client(platform: Namespace, service: str, user: tuple[str, str]) -> httpx.AsyncClient:
    [found] = [each for each in platform.get("services") if each["metadata"]["name"] == service]
    url = f"http://{found['spec']['clusterIP']}:{found['spec']['ports'][0]['port']}/api/"
    return httpx.AsyncClient(base_url=url, auth=user, timeout=120, limits=httpx.Limits(max_connections=50))


def main() -> None:
    """Run the command."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--namespace", default="tidepool")
    arguments.add_argument("--runs-namespace", default="tidepool-runs", help="with --no-prefect several, with commas")
    arguments.add_argument("--runs", type=int, default=10)
    arguments.add_argument("--workers", type=int, default=50, help="of each run's Dask cluster")
    arguments.add_argument("--every", type=float, default=0.0, help="seconds between two runs; 0: one at a time")
    arguments.add_argument("--hold", type=float, default=5.0, help="seconds that a complete cluster is kept")
    arguments.add_argument("--idle", type=float, default=0.0, help="measure the platform without runs for so long")
    arguments.add_argument("--no-prefect", action="store_true", help="Jobs by hand; benchmarks.control_plane uses it")
    arguments.add_argument("--part", action="append", default=[], metavar="NAME=PID", help="all that is measured")
    arguments.add_argument("--label", default="", help="added to the name of the measurement")
    chosen = arguments.parse_args()
    figures = asyncio.run(measure(chosen))
    print(record(chosen, figures))
    for problem in figures.get("problems", []):
        print(problem)


if __name__ == "__main__":
    main()
