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
import statistics
import sys
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

from installed import AUTH
from kube import Namespace

from benchmarks.fake_node import KEY, FakeNode, Kubernetes
from benchmarks.parts import Parts, Usage, above
from benchmarks.task_runner import RESULTS, code
from tidepool.compute.clusters.kubernetes import certificate, manifest
from tidepool.compute.clusters.kubernetes.driver import Run, driver_of
from tidepool.settings import SizeSettings, settings

if TYPE_CHECKING:
    from collections.abc import Callable

POLL_SECONDS = 0.5
GIVE_UP_SECONDS = 400.0
NAME = "scale"
LABEL_RUN, LABEL_CLUSTER = "prefect.io/flow-run-id", "dask.org/cluster-name"
DASK = "kubernetes.dask.org/v1"
RULES = "tidepool-flow-run-rules"
WHERE_DASK_OBJECTS_ARE = {
    DASK: ("daskclusters", "daskworkergroups"), "apps/v1": ("deployments", "replicasets"), "v1": ("pods", "services"),
}  # fmt: skip
STEPS = ("driver's pod", "scheduler's pod", "workers' pods", "all run", "gone")
IDLE = "idle"


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
        server: The Prefect API, with all rights.
        proxy: The Prefect API as flow runs have it.
    """

    def __init__(
        self,
        chosen: argparse.Namespace,
        kubernetes: Kubernetes,
        node: FakeNode,
        server: httpx.AsyncClient,
        proxy: httpx.AsyncClient,
    ) -> None:
        self._chosen, self._kubernetes, self._node = chosen, kubernetes, node
        self._server, self._proxy = server, proxy
        self._phases: dict[str, dict[str, tuple[str, str]]] = {}  # cluster -> pod -> component, phase
        self._drivers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.finished: list[Times] = []
        node.changed = self._changed

    async def all(self, deployment: str) -> list[str]:
        """Run all; return the problems of those that did not end as they should."""
        tasks: list[asyncio.Task[None]] = []
        began = time.monotonic()
        for number in range(self._chosen.runs):
            if self._chosen.every:
                await asyncio.sleep(max(0.0, began + number * self._chosen.every - time.monotonic()))
            elif tasks:
                await asyncio.wait(tasks)
            tasks.append(asyncio.create_task(self._run(deployment)))
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

    async def _run(self, deployment: str) -> None:
        times = Times(asked=time.monotonic())
        state = {"type": "SCHEDULED", "name": "Scheduled"}
        run = await self._prefect(self._server, f"deployments/{deployment}/create_flow_run", {"state": state})
        async with asyncio.timeout(GIVE_UP_SECONDS):
            pod = await self._driver(run["id"])
            times.began = time.monotonic()
            await self._prefect(self._proxy, f"flow_runs/{run['id']}")
            await self._state(run["id"], "RUNNING")
            await self._log(run["id"], "a Dask cluster is asked for")
            cluster = await self._create(run["id"], pod, times)
            pods = self._phases.setdefault(cluster, {})
            workers = self._chosen.workers
            times.scheduler = await _when(lambda: "scheduler" in {part for part, _ in pods.values()})
            times.pods = await _when(lambda: sum(part == "worker" for part, _ in pods.values()) >= workers)
            times.running = await _when(lambda: sum(phase == "Running" for _, phase in pods.values()) == workers + 1)
            await self._log(run["id"], f"{workers} workers run")
            await asyncio.sleep(self._chosen.hold)
            times.deleted = time.monotonic()
            path = f"{DASK}/namespaces/{self._chosen.runs_namespace}/daskclusters/{cluster}"
            await self._kubernetes.ask(
                "DELETE", path, {"propagationPolicy": "Background"}, headers=self._by_a_run(pod),
                absent=(HTTPStatus.NOT_FOUND,),
            )  # fmt: skip
            await self._state(run["id"], "COMPLETED")
            await self._log(run["id"], "done")
            self._node.end(pod)
            times.gone = await _when(lambda: {phase for _, phase in pods.values()} == {"gone"})
            while await self._left(cluster):  # noqa: ASYNC110 - another process deletes it
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
        path = f"{body['apiVersion']}/namespaces/{self._chosen.runs_namespace}/{body['kind'].lower()}s"
        return await self._kubernetes.ask("POST", path, body, headers=self._by_a_run(pod)) or {}

    def _by_a_run(self, pod: dict[str, Any]) -> dict[str, str]:
        """Return the headers of a request by the flow runs' account, with the token of a pod."""
        extra = "Impersonate-Extra-Authentication.kubernetes.io%2Fpod-"
        account = f"system:serviceaccount:{self._chosen.runs_namespace}:{pod['spec']['serviceAccountName']}"
        return {
            "Impersonate-User": account,
            f"{extra}Name": pod["metadata"]["name"],
            f"{extra}Uid": pod["metadata"]["uid"],
        }

    async def _left(self, cluster: str) -> bool:
        for version, kinds in WHERE_DASK_OBJECTS_ARE.items():
            for kind in kinds:
                path = f"{version}/namespaces/{self._chosen.runs_namespace}/{kind}"
                if kind == "daskclusters":
                    found = await self._kubernetes.ask("GET", f"{path}/{cluster}", absent=(HTTPStatus.NOT_FOUND,))
                else:
                    found = await self._kubernetes.ask("GET", path, labelSelector=f"{LABEL_CLUSTER}={cluster}")
                    found = found and found["items"]
                if found:
                    return True
        return False

    async def _state(self, run_id: str, state: str) -> None:
        body = {"state": {"type": state, "name": state.capitalize()}}
        answer = await self._prefect(self._proxy, f"flow_runs/{run_id}/set_state", body)
        if answer["status"] != "ACCEPT":
            raise RuntimeError(f"{state}: {answer['status']} {answer['details']}")

    async def _log(self, run_id: str, message: str) -> None:
        line = {"name": "prefect.flow_runs", "level": 20, "message": message, "flow_run_id": run_id}
        line["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        await self._prefect(self._proxy, "logs/", [line])

    async def _prefect(self, client: httpx.AsyncClient, path: str, body: Any = None) -> Any:
        answer = await client.request("GET" if body is None else "POST", path, json=body)
        return answer.raise_for_status().json() if answer.content else None


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
    platform, runs = Namespace(chosen.namespace), Namespace(chosen.runs_namespace)
    parts, end, kubernetes = Parts(platform), asyncio.Event(), await Kubernetes.connect()
    if chosen.idle:
        asyncio.get_running_loop().call_later(chosen.idle, end.set)
        return {"usage": dataclasses.asdict(await parts.measure(end))}

    def client(service: str, user: tuple[str, str]) -> httpx.AsyncClient:
        [found] = [each for each in platform.get("services") if each["metadata"]["name"] == service]
        url = f"http://{found['spec']['clusterIP']}:{found['spec']['ports'][0]['port']}/api/"
        return httpx.AsyncClient(base_url=url, auth=user, timeout=120, limits=httpx.Limits(max_connections=50))

    secret = json.loads(runs.kubectl("get", "secret", "tidepool-flow-run-api", "--output=json"))
    user, _, word = base64.b64decode(secret["data"]["auth-string"]).decode().partition(":")
    address = json.loads(platform.kubectl("get", "nodes", "--output=json"))["items"][0]["status"]["addresses"][0]
    rules = {"nodeSelectors": KEY, "tolerations": KEY}
    had = json.loads(runs.kubectl("get", "configmap", RULES, "--output=json"))["data"]
    answering = await asyncio.start_server(scheduler_answers, address["address"], 8787)
    async with (
        answering,
        client("tidepool-server", AUTH) as server,
        client("tidepool-flow-run-api", (user, word)) as proxy,
    ):
        pool = (await server.get("work_pools/kubernetes")).raise_for_status().json()
        flow = (await server.post("flows/", json={"name": NAME})).raise_for_status().json()["id"]
        toleration = {"key": KEY, "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
        variables = {"node_selector": {KEY: "yes"}, "tolerations": [toleration], "finished_job_ttl": 60}
        body = {"name": NAME, "flow_id": flow, "entrypoint": "none.py:none", "work_pool_name": "kubernetes"}
        try:
            runs.kubectl("patch", "configmap", RULES, "--type=merge", f"--patch={json.dumps({'data': rules})}")
            await server.patch("work_pools/kubernetes", json={"concurrency_limit": None})
            answer = await server.post("deployments/", json={**body, "job_variables": variables})
            async with FakeNode(kubernetes, chosen.runs_namespace, address["address"]) as node:
                drivers = Drivers(chosen, kubernetes, node, server, proxy)
                measuring = asyncio.create_task(parts.measure(end))
                await asyncio.sleep(2)
                problems = await drivers.all(answer.raise_for_status().json()["id"])
                end.set()
                usage = await measuring
                runs.kubectl("delete", "daskclusters", f"--selector=tidepool.dev/deployment={NAME}", "--wait=false")
                runs.kubectl("delete", "jobs", f"--selector=prefect.io/flow-name={NAME}", "--wait=false")
                await asyncio.wait_for(_when(lambda: not node.pods), 120)
        finally:
            back = {"data": {name: had[name] for name in rules}}
            runs.kubectl("patch", "configmap", RULES, "--type=merge", f"--patch={json.dumps(back)}")
            limit = {"concurrency_limit": pool["concurrency_limit"]}
            await server.patch("work_pools/kubernetes", json=limit)
            await server.delete(f"flows/{flow}")
    steps = [each.steps() for each in sorted(drivers.finished, key=lambda each: each.asked)]
    return {"usage": dataclasses.asdict(usage), "steps": steps, "problems": problems}


def title(chosen: argparse.Namespace) -> str:
    """Return what a measurement is called."""
    rate = f"one every {chosen.every:g} s" if chosen.every else "one at a time"
    what = f"{chosen.runs} runs of {chosen.workers} workers, {rate}, held {chosen.hold:g} s"
    return f"{IDLE if chosen.idle else what}{f', {chosen.label}' if chosen.label else ''}"


def tables(records: dict[str, Any]) -> list[str]:
    """Return Markdown tables of all measurements."""
    idle = {each["label"]: Usage(**each["usage"]) for each in records.values() if each["title"].startswith(IDLE)}
    loads = {name: each for name, each in records.items() if each.get("steps")}
    used = {name: Usage(**each["usage"]) for name, each in loads.items()}
    lines = [
        f"| | runs, ended as they should | {' | '.join(STEPS)} | all run: first, last third | cores busy |",
        f"|---|---|{'---|' * len(STEPS)}---|---|",
    ]
    for number, (name, each) in enumerate(loads.items(), 1):
        steps = each["steps"]
        cells = [f"{_median(steps, step):.1f} ({_high(steps, step):.1f})" for step in STEPS]
        third = max(1, len(steps) // 3)
        growth = f"{_median(steps[:third], 'all run'):.1f}, {_median(steps[-third:], 'all run'):.1f}"
        ended = f"{len(steps)} of {each['asked']}"
        lines.append(f"| {number}: {name} | {ended} | {' | '.join(cells)} | {growth} | {used[name].busy:.0%} |")
    columns = "".join(f" {number} |" for number in range(1, len(loads) + 1))
    over = {
        name: (idle.get(each["label"]) or next(iter(idle.values()), Usage()), len(each["steps"]))
        for name, each in loads.items()
    }

    def rows(head: str, cell: Callable[[str, str], str], of: Callable[[Usage], dict[str, float]]) -> None:
        lines.extend(["", f"| {head} | {IDLE} |{columns}", f"|---|---|{'---|' * len(loads)}"])
        for row in sorted({key for each in used.values() for key in of(each)} - {""}):
            idles = {of(each).get(row, 0.0) / (each.seconds if of(each) in (each.cpu, each.counts) else 1.0)
                     for each in idle.values()}  # fmt: skip
            first = f"{next(iter(idles), 0.0):.2f}" if idles else "-"
            cells = "".join(f" {cell(row, name)} |" for name in loads)
            lines.append(f"| {row} | {first} |{cells}")

    def per_run(of: Callable[[Usage], dict[str, float]]) -> Callable[[str, str], str]:
        def cell(row: str, name: str) -> str:
            calm, runs = over[name]
            ratio = used[name].seconds / calm.seconds if calm.seconds else 0.0
            return f"{above(of(used[name]), of(calm), ratio, runs).get(row, 0.0):.2f}"

        return cell

    rows("CPU seconds per run above idle (idle: cores)", per_run(lambda each: each.cpu), lambda each: each.cpu)
    rows(
        "the most of a core within 5 s",
        lambda row, name: f"{used[name].share.get(row, 0):.2f}",
        lambda each: each.share,
    )
    rows("peak memory, MiB", lambda row, name: f"{used[name].memory.get(row, 0):.0f}", lambda each: each.memory)
    rows("requests per run above idle (idle: per second)", per_run(lambda each: each.counts), lambda each: each.counts)
    return lines


def _median(steps: list[dict[str, float]], step: str) -> float:
    return statistics.median(each[step] for each in steps)


def _high(steps: list[dict[str, float]], step: str) -> float:
    return sorted(each[step] for each in steps)[round(0.95 * (len(steps) - 1))]


def record(chosen: argparse.Namespace, figures: dict[str, Any]) -> str:
    """Add a measurement to scale.json, make scale.md of all, and return that."""
    data = RESULTS / "scale.json"
    records = json.loads(data.read_text()) if data.exists() else {}
    name = title(chosen)
    records[name] = {**figures, "title": name, "label": chosen.label, "asked": chosen.runs, "code": code()}
    data.write_text(json.dumps(records, indent=1) + "\n")
    head = [
        "# Growth",
        "",
        (
            "`python -m benchmarks.scale` makes these tables, each row or column by one call, on a Kubernetes cluster "
            "of one node (2 cores) with a fake second one. Seconds: median (95th percentile). The most of a core: "
            "1.00 is all that a single thread can have."
        ),
        "",
    ]
    text = "\n".join([*head, *tables(records)]) + "\n"
    (RESULTS / "scale.md").write_text(text)
    return text


def main() -> None:
    """Run the command."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--namespace", default="tidepool")
    arguments.add_argument("--runs-namespace", default="tidepool-runs")
    arguments.add_argument("--runs", type=int, default=10)
    arguments.add_argument("--workers", type=int, default=50, help="of each run's Dask cluster")
    arguments.add_argument("--every", type=float, default=0.0, help="seconds between two runs; 0: one at a time")
    arguments.add_argument("--hold", type=float, default=5.0, help="seconds that a complete cluster is kept")
    arguments.add_argument("--idle", type=float, default=0.0, help="measure the platform without runs for so long")
    arguments.add_argument("--label", default="", help="added to the name of the measurement")
    chosen = arguments.parse_args()
    figures = asyncio.run(measure(chosen))
    print(record(chosen, figures))
    for problem in figures.get("problems", []):
        print(problem)


if __name__ == "__main__":
    main()
