"""A Dask cluster on Kubernetes for one run, or shared by name.

Upstream's `KubeCluster` waits for a status field that the operator may never set (a quarter of its clusters hang),
starts schedulers and workers with commands that Dask no longer has, and joins an existing cluster of the same name.
This is the same `DaskCluster` object and the same operator, with another client: a cluster is there when its scheduler
and its first worker answer.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit
from uuid import UUID

import dask.config
from distributed.core import Status, rpc
from distributed.deploy.cluster import Cluster

from tidepool.compute.clusters.kubernetes import manifest, pod_status, usage
from tidepool.compute.clusters.kubernetes.api import KubernetesApi, Unavailable
from tidepool.compute.clusters.kubernetes.manifest import Driver, Run
from tidepool.compute.clusters.preload.scheduler import USAGE, VERSIONS
from tidepool.compute.clusters.preload.versions import difference, versions
from tidepool.compute.run_log import run_log
from tidepool.errors import ClusterError, TidepoolError
from tidepool.settings import settings

if TYPE_CHECKING:
    from tidepool.settings import SizeSettings

_POLL_SECONDS = 0.05
_LOOK_SECONDS = 1.0
_CONNECT_SECONDS = 0.5
_IDENTITY_SECONDS = 5.0
_DIGEST_SECONDS = 1.0
_EXIT_SECONDS = 3.0
# How often a start that takes long says what it waits for.
_SAY_SECONDS = 15.0
# Bounds of closing: together well within the grace period of a pod that is told to end.
_COLLECT_SECONDS = 5.0
_DELETE_SECONDS = 10.0
_PUBLISH_SECONDS = 5.0
_LOG_LINES = 60
# A worker that pauses at 80 % of its memory goes on when results leave it. What its libraries hold never leaves: it
# would pause for ever, and say nothing. Above the limit Kubernetes ends it, and the run says out of memory.
_WORKER_VARIABLES = {"DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False"}
# Logs of more pods than that are the cluster's log system's business.
_LOG_PODS = 12

_clusters: weakref.WeakSet[KubernetesCluster] = weakref.WeakSet()


def kubernetes_cluster(
    size: SizeSettings, shared: str = "", *, allowed_failures: int | None = None
) -> KubernetesCluster:
    """A Dask cluster of pods. It begins to start at once and does not wait: entering it does.

    Args:
        size: Workers, and threads, cores and memory (GiB) of each.
        shared: Name of a warm cluster that several runs use, one after another or together; empty for an own one.
        allowed_failures: Workers that a task may lose before Dask gives it up; None for Dask's own setting.

    Raises:
        UsageError: the run would have more than it may; nothing was created.
    """
    own = [each.size for each in _clusters if not each.shared and each.status != Status.closed]
    manifest.check_caps([size] if shared else [*own, size], settings().kubernetes)
    return KubernetesCluster(size, shared=shared, run=this_run(), allowed_failures=allowed_failures)


def this_run() -> Run:
    """The run that this process executes."""
    from prefect.context import FlowRunContext
    from prefect.runtime import flow_run

    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        name = context.flow.name if context.flow else "adhoc"
        run = context.flow_run
        return Run(str(run.id), name, max(run.run_count, 1))
    if flow_run.id:
        return Run(str(flow_run.id), flow_run.flow_name or "adhoc", max(flow_run.run_count or 1, 1))
    return Run()


class KubernetesCluster(Cluster):
    """A running Dask cluster of pods.

    Args:
        size: Workers, and threads, cores and memory (GiB) of each.
        shared: Name of a shared cluster, or empty.
        run: The run that it is for.

    Attributes:
        steps: Seconds from the request to each step of the start.
        used: What its workers used; known once it is closed, None for a shared one or when the scheduler was lost.
    """

    def __init__(self, size: SizeSettings, *, shared: str, run: Run, allowed_failures: int | None = None) -> None:
        self.size = size
        self.shared = shared
        self.run = run
        self.steps: dict[str, float] = {}
        self.used: usage.Usage | None = None
        self._settings = settings().kubernetes
        self._log_to = run_log()
        self._api: KubernetesApi | None = None
        self._driver = Driver(self._settings.image)
        if allowed_failures is None:
            allowed_failures = dask.config.get("distributed.scheduler.allowed-failures")
        self._dask_settings = {
            "allowed-failures": str(allowed_failures),
            "no-workers-timeout": f"{settings().compute.no_worker_seconds:g}s",
        }
        self._created = False
        self._logs: list[usage.PodLog] = []
        self._began = self._said = monotonic()
        self._give_up = 0.0
        # The name is final once the image is known; closing before that needs none.
        super().__init__(name=manifest.name_for(run, secrets.token_hex(2)), quiet=True)  # type: ignore[no-untyped-call]
        _clusters.add(self)
        self._loop_runner.start()
        self._task: asyncio.Task[None] | None = None
        loop: Any = self.loop
        self._started = asyncio.run_coroutine_threadsafe(self._start(), loop.asyncio_loop)

    def __enter__(self) -> Self:
        """Waits until the scheduler and a worker answer.

        Raises:
            ClusterError: it did not start; the sentence says what it waited for. Nothing is left behind.
        """
        try:
            self._started.result()
        except BaseException:  # a SIGTERM too: what was created goes
            self.close()
            raise
        steps = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.steps.items())
        self._log_to.info("Dask cluster %s is ready (%s)", self.name, steps)
        self._publish(self._where(), wait=False)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self, timeout: float | None = None) -> None:
        """Collects what the run's page needs and has the cluster removed, without waiting for the removal.

        Each part is bounded; what fails is logged and left to the owner reference and the reaper.
        """
        if self.status == Status.closed:
            return
        self.sync(self._close, callback_timeout=timeout)  # type: ignore[no-untyped-call]
        self._loop_runner.stop()
        if self.steps and not self.shared:
            text = usage.page(self.name, self._where(), self.steps, self.used, self._logs, limit=90_000)
            self._publish(text, wait=True)

    @property
    def dashboard_link(self) -> str:
        """Where people find the Dask dashboard."""
        link = self._settings.dashboard_url
        if link:
            return link.format(namespace=self._kubernetes.namespace, cluster=self.name)
        return f"http://{self.name}-scheduler.{self._kubernetes.namespace}:{manifest.HTTP_PORT}/status"

    # --- starting ---------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._task = asyncio.current_task()
        patience = self._settings.start_timeout_seconds
        self._give_up = self._began + patience
        self._api = await KubernetesApi.connect(self._settings.namespace, patience)
        self._driver = await self._read_driver()
        if self.shared:
            self.name = manifest.shared_name(self.shared, self._driver.image)
        while True:
            await self._create()
            try:
                self.scheduler_comm = rpc(await self._scheduler_address())
            except _RemovedError:
                continue
            break
        await super()._start()  # type: ignore[no-untyped-call]
        await self._first_worker()
        await self._verify()
        # From here on a shared one is everybody's.
        self._created = not self.shared

    async def _read_driver(self) -> Driver:
        """What the Dask pods take over: from the pod that this runs in, or only the image where it runs in none."""
        if self._settings.pod_name:
            while True:
                driver = manifest.driver_of(await self._kubernetes.pod(self._settings.pod_name), self._settings)
                # The kubelet tells the digest a moment after the container's start; a loaded image has none.
                if "@" in driver.image or monotonic() - self._began > _DIGEST_SECONDS:
                    return driver
                await asyncio.sleep(_POLL_SECONDS)
        if not self._settings.image:
            raise ClusterError(
                "no image for the Dask pods: outside of a driver pod set TIDEPOOL_KUBERNETES_IMAGE to name@sha256:…"
            )
        return Driver(self._settings.image)

    async def _create(self) -> None:
        """Creates the DaskCluster and its worker group; a shared one may be there already, then it must be the same."""
        body = manifest.manifest(
            self.name,
            run=self.run,
            driver=self._driver,
            size=self.size,
            settings=self._settings,
            dask_settings=self._dask_settings,
            worker_variables=_WORKER_VARIABLES
            | {name: str(value) for name, value in dask.config.get("distributed.nanny.pre-spawn-environ").items()},
            versions=versions(),
            now=datetime.now(UTC),
            shared=self.shared,
        )
        while True:
            # Set first: it may be created although the answer is lost.
            self._created = not self.shared
            cluster = await self._kubernetes.create(body)
            if cluster is not None:
                self._created = True
                self._note("asked for")
                break
            cluster = await self._kubernetes.cluster(self.name)
            if cluster is not None and "deletionTimestamp" not in cluster["metadata"]:
                # Without a shared name it is our own, by a random name: the answer to the first request was lost.
                if self.shared:
                    self._compare(cluster["metadata"]["annotations"], body["metadata"]["annotations"])
                self._note("found")
                break
            await self._wait([], "the removal of its predecessor")
        await self._kubernetes.create(manifest.worker_group(cluster))
        if self._settings.adaptive_minimum:
            await self._kubernetes.create(manifest.autoscaler(cluster, self.size, self._settings))

    def _compare(self, theirs: dict[str, str], ours: dict[str, str]) -> None:
        for what, annotation in (
            ("image", manifest.ANNOTATION_IMAGE),
            ("library versions", manifest.ANNOTATION_VERSIONS),
            ("size", manifest.ANNOTATION_WORKERS),
        ):
            if theirs.get(annotation) != ours[annotation]:
                raise ClusterError(
                    f"shared Dask cluster {self.shared!r} has another {what} than this run ({theirs.get(annotation)}, "
                    f"not {ours[annotation]}): use another name, or remove it with "
                    f"`kubectl --namespace {self._kubernetes.namespace} delete daskcluster {self.name}`"
                )

    async def _scheduler_address(self) -> str:
        """Waits for a scheduler that answers on its pod's own address.

        Neither the operator's phase is asked (it may stay Pending for ever) nor the Service (its rules may not be there
        yet, and packets go astray).
        """
        while True:
            pods = await self._kubernetes.pods(self.name)
            for pod in pods:
                ip = pod.get("status", {}).get("podIP")
                if pod_status.component(pod) == "scheduler" and ip and "deletionTimestamp" not in pod["metadata"]:
                    self._note("scheduler has an address")
                    if await _answers(ip):
                        self._note("scheduler answers")
                        return f"tcp://{ip}:{manifest.SCHEDULER_PORT}"
            await self._wait(pods, "its scheduler")

    async def _first_worker(self) -> None:
        while not self.scheduler_info["workers"]:
            # The scheduler tells by itself; the pods are only asked why there is none.
            looked = monotonic()
            pods = await self._kubernetes.pods(self.name)
            while not self.scheduler_info["workers"] and monotonic() - looked < _LOOK_SECONDS:
                await self._wait(pods, "its first worker")
        self._note("first worker")

    async def _wait(self, pods: list[dict[str, Any]], what: str) -> None:
        """One pause of a waiting loop; says what it waits for now and then, and ends when it is time or hopeless."""
        now = monotonic()
        if reason := pod_status.hopeless(pods):
            raise ClusterError(f"Dask cluster {self.name} cannot start: {reason}")
        if now > self._give_up:
            raise ClusterError(
                f"Dask cluster {self.name} did not start within {self._settings.start_timeout_seconds:g} s; "
                f"it waited for {what}: {await self._reason()}"
            )
        if now - self._said > _SAY_SECONDS:
            self._said = now
            await self._still_there()
            self._log_to.info(
                "Dask cluster %s: waiting for %s, %.0f s so far: %s",
                self.name,
                what,
                now - self._began,
                await self._reason(),
            )
        await asyncio.sleep(_POLL_SECONDS)

    async def _still_there(self) -> None:
        """A cluster may be removed while it is waited for: a shared one that was idle, or any by hand."""
        cluster = await self._kubernetes.cluster(self.name)
        if cluster is None or "deletionTimestamp" in cluster["metadata"]:
            if self.shared:
                raise _RemovedError
            raise ClusterError(f"Dask cluster {self.name} was removed while it started")

    async def _reason(self) -> str:
        try:
            pods = await self._kubernetes.pods(self.name)
            warnings = await self._kubernetes.warnings(self.name)
        except (Unavailable, ClusterError) as error:
            return f"the Kubernetes API says: {error}"
        reasons = [reason for reason in (pod_status.why(pods), *warnings[-1:]) if reason]
        if not pods and not reasons:
            return f"no pod yet; is the Dask operator running in namespace {self._kubernetes.namespace}?"
        return "; ".join(reasons) or "its pods are starting"

    async def _verify(self) -> None:
        """Scheduler and workers run this process's image and libraries. They exchange pickles: nothing else will do."""
        ours, asked = versions(), self._driver.image
        scheduler: Any = self.scheduler_comm
        answers = {"scheduler": await getattr(scheduler, VERSIONS)()}
        answers |= await scheduler.broadcast(msg={"op": VERSIONS})
        for who, theirs in answers.items():
            if differs := difference(ours, str(theirs)):
                raise ClusterError(f"{who} of Dask cluster {self.name} has other libraries than this run: {differs}")
        for pod in await self._kubernetes.pods(self.name):
            image = manifest.running_image(pod)
            if "@" in asked and "@" in image and manifest.digest(image) != manifest.digest(asked):
                raise ClusterError(f"pod {pod['metadata']['name']} runs {image}, but this run {asked}")
        self._note("checked")

    @property
    def _kubernetes(self) -> KubernetesApi:
        if self._api is None:
            raise RuntimeError("the cluster has not begun to start")
        return self._api

    def _note(self, step: str) -> None:
        self.steps.setdefault(step, monotonic() - self._began)

    # --- closing ----------------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_DELETE_SECONDS)
        if self._api is not None:
            self._api.be_patient(0)
            if self.status == Status.running and not self.shared:
                try:
                    await asyncio.wait_for(self._collect(), _COLLECT_SECONDS)
                except (TimeoutError, OSError, Unavailable, TidepoolError) as error:
                    self._log_to.warning(
                        "Dask cluster %s: its last figures are lost: %s", self.name, error or "no answer"
                    )
        with suppress(TimeoutError, OSError):
            await asyncio.wait_for(super()._close(), _COLLECT_SECONDS)  # type: ignore[no-untyped-call]
        self.status = Status.closed
        if self._api is not None:
            if self._created:
                await self._delete(self._api)
            await self._api.close()

    async def _delete(self, api: KubernetesApi) -> None:
        api.be_patient(_DELETE_SECONDS)
        try:
            await api.delete_cluster(self.name)
        except (Unavailable, ClusterError) as error:
            self._log_to.warning(
                "Dask cluster %s could not be removed (%s); Kubernetes removes it with its Job, or: "
                "kubectl --namespace %s delete daskcluster %s",
                self.name,
                error,
                api.namespace,
                self.name,
            )

    async def _collect(self) -> None:
        # First: logs may take what time there is.
        counted = await getattr(self.scheduler_comm, USAGE)()
        self.used = usage.measure(counted, self.size)
        self._log_to.info("Dask cluster %s used %s", self.name, usage.summary(self.used))
        pods = (await self._kubernetes.pods(self.name))[:_LOG_PODS]
        names = [pod["metadata"]["name"] for pod in pods]
        texts = await asyncio.gather(*(self._kubernetes.log(name, _LOG_LINES) for name in names))
        self._logs = [
            usage.PodLog(
                pod=name,
                node=pod["spec"].get("nodeName", ""),
                restarts=sum(each["restartCount"] for each in pod["status"].get("containerStatuses", [])),
                ended=pod_status.last_end(pod),
                lines=text,
            )
            for pod, name, text in zip(pods, names, texts, strict=True)
        ]

    # --- lost workers -----------------------------------------------------------------------------------------------

    def worker_exit(self, address: str) -> str | None:
        """Why the worker at that address has ended, such as `OOMKilled (137)`; None when Kubernetes does not know."""
        reason: str | None = self.sync(self._worker_exit, address)  # type: ignore[no-untyped-call]
        return reason

    async def _worker_exit(self, address: str) -> str | None:
        ip = urlsplit(address).hostname
        # The kubelet tells a moment after the process ended.
        end = monotonic() + _EXIT_SECONDS
        while monotonic() < end:
            try:
                pods = await self._kubernetes.pods(self.name)
            except (Unavailable, ClusterError):
                return None
            pod = next((each for each in pods if each.get("status", {}).get("podIP") == ip), None)
            if pod is None:
                return "its pod was removed (deleted, evicted, or its node is gone)"
            if reason := pod_status.last_end(pod):
                return reason
            await asyncio.sleep(_POLL_SECONDS * 5)
        return None

    # --- the run's page ---------------------------------------------------------------------------------------------

    def _where(self) -> str:
        if self._settings.dashboard_url:
            return f"[Dask dashboard]({self.dashboard_link})"
        forward = f"kubectl --namespace {self._kubernetes.namespace} port-forward service/{self.name}-scheduler 8787"
        return f"Dask dashboard, while the run lasts: `{forward}`, then <http://localhost:8787/status>"

    def _publish(self, text: str, *, wait: bool) -> None:
        """Writes the run's page, in a thread: the Prefect API may be away, and nothing here waits long for it."""
        if not self.run.id:
            return
        key = f"{self.run.flow}-dask-cluster"
        about = usage.summary(self.used) if self.used else f"Dask cluster {self.name}"
        thread = threading.Thread(
            target=_publish_page, args=(UUID(self.run.id), key, text, about, self._log_to), daemon=True
        )
        thread.start()
        if wait:
            thread.join(_PUBLISH_SECONDS)


class _RemovedError(Exception):
    """A shared cluster was removed while it was waited for."""


async def _answers(ip: str) -> bool:
    """Whether a Dask scheduler answers there. First whether anything does: Dask's own connect waits between tries."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(ip, manifest.SCHEDULER_PORT), _CONNECT_SECONDS)
        writer.close()
        async with rpc(f"tcp://{ip}:{manifest.SCHEDULER_PORT}") as scheduler:
            await asyncio.wait_for(scheduler.identity(), _IDENTITY_SECONDS)
    except (OSError, TimeoutError):
        return False
    return True


def _publish_page(run: UUID, key: str, text: str, about: str, log: Any) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactCreate

    # Not by `report`: when a cluster closes, the context has ended from which Prefect tells whose artifact it is.
    page = ArtifactCreate(key=key, type="markdown", description=about, data=text, flow_run_id=run)
    try:
        with get_client(sync_client=True) as client:
            client.create_artifact(page)
    except Exception as error:  # noqa: BLE001 - a page is no reason to fail a run
        log.warning("the page %s was not published: %s", key, error)
