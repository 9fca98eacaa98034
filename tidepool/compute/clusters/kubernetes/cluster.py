"""A Dask cluster on Kubernetes for one run, or shared by name.

Upstream's `KubeCluster` waits for a status field that the operator may never set (a quarter of its clusters hang),
starts schedulers and workers with commands that Dask no longer has, and joins an existing cluster of the same name.
This is the same `DaskCluster` object and the same operator, with another client: a cluster is ready when its scheduler
and its first worker answer.
"""

from __future__ import annotations

import asyncio
import secrets
import weakref
from contextlib import suppress
from http.client import HTTPException
from time import monotonic
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import dask.config
from distributed.comm.core import FatalCommClosedError
from distributed.core import Status
from distributed.versions import get_versions

from tidepool.compute.clusters.kubernetes import certificate, driver, early, manifest, names, pod_status, usage
from tidepool.compute.clusters.kubernetes.api import KubernetesApi
from tidepool.compute.clusters.preload.scheduler import USAGE
from tidepool.compute.run_log import run_log
from tidepool.errors import ClusterError, UsageError
from tidepool.report import run_record
from tidepool.settings import settings
from tidepool.upstream.distributed_cluster import RemoteCluster

if TYPE_CHECKING:
    from tidepool.settings import SizeSettings

# Polling intervals of a start: for a change that is due, and for the reason why it does not come.
_POLL_SECONDS = 0.05
_DIAGNOSE_SECONDS = 1.0
_CONNECT_SECONDS = 0.5
_IDENTITY_SECONDS = 5.0
_EXIT_SECONDS = 3.0
# How often a slow start logs what it waits for.
_LOG_SECONDS = 15.0
# Bounds of closing: together well within the grace period of a pod that is told to end.
_COLLECT_SECONDS = 5.0
_DELETE_SECONDS = 10.0
_LOG_LINES = 60
# Logs of more pods than that are for the log system of the Kubernetes cluster.
_LOG_PODS = 12

_clusters: weakref.WeakSet[KubernetesCluster] = weakref.WeakSet()


class KubernetesCluster(RemoteCluster):
    """A Dask cluster of pods that has been asked for; entering it waits until it runs.

    Args:
        size: Workers, and threads, cores and memory (GiB) of each.
        shared: Name of a warm cluster that several runs use, one after another or together; empty for an own one.
        allowed_failures: Workers that a task may lose before Dask gives it up; None for Dask's own setting.

    Attributes:
        steps: Seconds from the request to each step of the start.
        used: What its workers used; None until it is closed, for a shared one, and when the scheduler was lost.

    Raises:
        UsageError: the run would exceed its caps, or has no key for a shared cluster; nothing was created.
    """

    def __init__(self, size: SizeSettings, shared: str = "", *, allowed_failures: int | None = None) -> None:
        self.size = size
        self.shared = shared
        self._settings = settings().kubernetes
        own = [each.size for each in _clusters if not each.shared and each.status != Status.closed]
        manifest.check_caps([size] if shared else [*own, size], self._settings)
        given = self._settings.shared_key
        self._key = given.get_secret_value() if given and self._settings.tls else ""
        if shared and self._settings.tls and not given:
            raise UsageError(
                f"shared Dask cluster {shared!r} needs a key: set TIDEPOOL_KUBERNETES_SHARED_KEY, at least 32 random "
                "characters, in the Secret with the flow runs' credentials; nothing was created"
            )
        self.run = driver.this_run()
        self.steps: dict[str, float] = {}
        self.used: usage.Usage | None = None
        self._logger = run_log()
        self._kubernetes = KubernetesApi(self._settings.namespace)
        self._driver = driver.Driver(self._settings.image)
        if allowed_failures is None:
            allowed_failures = dask.config.get("distributed.scheduler.allowed-failures")
        self._dask_settings = manifest.scheduler_settings(allowed_failures, settings().compute.no_worker_seconds)
        self._must_delete = False
        self._logs: list[usage.PodLog] = []
        self._began = self._logged = self._diagnosed = monotonic()
        self._give_up = self._began + self._settings.start_timeout_seconds
        self._suffix = secrets.token_hex(2)
        # Final once the driver's pod is known; closing before that needs none.
        super().__init__(manifest.name_for(self.run, self._suffix))
        self._identify(certificate.own() if self._settings.tls else None)
        _clusters.add(self)
        self._start_task: asyncio.Task[None] | None = None
        self._ready = self.start_soon(self._bring_up())

    def __enter__(self) -> Self:
        """Wait until the scheduler and a worker answer.

        Raises:
            ClusterError: it did not start; the message says what it waited for. Nothing is left behind.
        """
        try:
            self._ready.result()
        except BaseException:  # a SIGTERM too: what was created is deleted
            self.close()
            raise
        steps = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.steps.items())
        self._logger.info("Dask cluster %s is ready (%s)", self.name, steps)
        self.start_soon(usage.publish(self.run, self._where(), f"Dask cluster {self.name}", self._logger))
        return self

    def close(self, timeout: float | None = None) -> None:
        """Collect figures and logs for the run's page and have the cluster deleted, without waiting for the deletion.

        Each part is bounded; what fails is logged and left to the owner reference and the operator's idle timeout.
        """
        if self.status == Status.closed:
            return
        self.sync(self._shut_down, callback_timeout=timeout)  # type: ignore[no-untyped-call]
        self.stop_loop()

    @property
    def dashboard_link(self) -> str:
        """Address of the Dask dashboard for people."""
        if link := self._settings.dashboard_url:
            return link.format(namespace=self._kubernetes.namespace, cluster=self.name)
        return f"{names.scheduler_url(self.name, self._kubernetes.namespace)}/status"

    def _where(self) -> str:
        """Return how to reach the dashboard, for the run's page."""
        if self._settings.dashboard_url:
            return f"[Dask dashboard]({self.dashboard_link})"
        service, port = names.scheduler_service(self.name), names.HTTP_PORT
        forward = f"kubectl --namespace {self._kubernetes.namespace} port-forward service/{service} {port}"
        return f"Dask dashboard, while the run lasts: `{forward}`, then <http://localhost:{port}/status>"

    # --- starting ---------------------------------------------------------------------------------------------------

    async def _bring_up(self) -> None:
        self._start_task = asyncio.current_task()
        await self._kubernetes.connect(self._settings.start_timeout_seconds)
        is_created = not self.shared and await self._take_early()
        if not is_created:
            self._driver = await self._read_driver()
            if self.shared:
                self.name = manifest.shared_name(self.shared, self._driver.image, self._key)
                if self._key:
                    self._identify(certificate.shared(self._key, self.name))
            else:
                self.name = manifest.name_for(self.run, self._suffix, self._driver.uid)
        while True:
            try:
                if not is_created:
                    await self._create()
                await self.connect(await self._scheduler_address())
                break
            except _DeletedError:
                if not self.shared:
                    raise
        await self._first_worker()
        await self._verify()
        # From here on a shared one may have other users.
        self._must_delete = not self.shared

    def _identify(self, identity: certificate.Identity | None) -> None:
        self._identity = identity
        self.security = identity.security() if identity else None

    async def _take_early(self) -> bool:
        """Take over the cluster that this driver has asked for early, if it is the one to be created here."""
        asked = early.asked()
        if asked is None:
            return False
        await asyncio.to_thread(asked.wait)
        # Until it is taken the end of the process deletes it; from here on, this.
        found = asked.take()
        if found is None:
            await self._discard(asked)
            return False
        self._must_delete, self.name, self._driver = True, found.name, found.driver
        self._identify(found.identity)
        body = self._body()
        if body == found.body:
            self._note("asked for early")
            return True
        has, wanted = (each["metadata"]["annotations"][names.ANNOTATION_WORKERS] for each in (found.body, body))
        self._logger.warning(
            "Dask cluster %s was asked for early with %s and is deleted, because this flow asks for %s: the "
            "deployment's job variable early_cluster does not fit",
            self.name,
            has,
            wanted,
        )
        await self._kubernetes.delete_cluster(self.name)
        self._identify(certificate.own() if self._settings.tls else None)
        return False

    async def _discard(self, asked: early.Early) -> None:
        """Delete what there is of a cluster that is not complete; if that fails, the end of the process tries again."""
        try:
            name = await asyncio.to_thread(asked.discard)
        except (OSError, HTTPException) as error:
            self._logger.warning("the Dask cluster that was asked for early was not deleted: %s", error)
            return
        if name:
            self._logger.warning("Dask cluster %s, asked for early, was not complete: deleted", name)

    def _body(self) -> dict[str, Any]:
        return manifest.manifest(
            self.name,
            run=self.run,
            driver=self._driver,
            size=self.size,
            settings=self._settings,
            dask_settings=self._dask_settings,
            shared=self.shared,
            versions=driver.in_one_line(get_versions(driver.PACKAGES)) if self.shared else "",
        )

    async def _read_driver(self) -> driver.Driver:
        """Read what the Dask pods inherit: from the pod that this runs in; outside of a pod, only the image."""
        while self._settings.pod_name:
            found = driver.driver_of(await self._kubernetes.pod(self._settings.pod_name), self._settings)
            if "@" in found.image or monotonic() - self._began > driver.DIGEST_SECONDS:
                return found
            await asyncio.sleep(_POLL_SECONDS)
        if not self._settings.image:
            raise ClusterError(
                "no image for the Dask pods: outside of a driver pod set TIDEPOOL_KUBERNETES_IMAGE to name@sha256:…"
            )
        return driver.Driver(self._settings.image)

    async def _create(self) -> None:
        """Create the DaskCluster and its worker group; a shared one may exist already, then it must be the same."""
        body = self._body()
        while True:
            # Set first: it may be created although the answer is lost.
            self._must_delete = not self.shared
            if cluster := await self._kubernetes.create(body):
                self._must_delete = True
                self._note("created")
                break
            cluster = await self._kubernetes.cluster(self.name)
            if cluster and "deletionTimestamp" not in cluster["metadata"]:
                # Without a shared name it is our own, by a random name: the answer to the first request was lost.
                if self.shared:
                    self._compare(cluster["metadata"]["annotations"], body["metadata"]["annotations"])
                self._note("joined")
                break
            await self._wait([], "the deletion of its predecessor")
        for part in manifest.parts(cluster, self.size, self._settings, self._identity):
            made = await self._kubernetes.create(part)
            # A shared cluster's Secret may be of another run that shares it. With another key in it, the scheduler is
            # not believed.
            if part["kind"] == "Secret" and not (made or self.shared or self._kubernetes.unsure):
                raise ClusterError(
                    f"Dask cluster {self.name} cannot start: a Secret {part['metadata']['name']} exists already, and "
                    "this run did not create it"
                )

    def _compare(self, actual: dict[str, str], desired: dict[str, str]) -> None:
        for what, annotation in (
            ("image", names.ANNOTATION_IMAGE),
            ("library versions", names.ANNOTATION_VERSIONS),
            ("size", names.ANNOTATION_WORKERS),
        ):
            if actual.get(annotation) != desired[annotation]:
                raise ClusterError(
                    f"shared Dask cluster {self.shared!r} has another {what} than this run ({actual.get(annotation)}, "
                    f"not {desired[annotation]}): use another name, or delete it with `{self._delete_command()}`"
                )

    async def _scheduler_address(self) -> str:
        """Wait for a scheduler that answers on its pod's own address.

        Not for the operator's phase (it may stay Pending forever), and not for the Service: its rules may not be on the
        node yet, and packets are lost.
        """
        while True:
            pods = await self._kubernetes.pods(self.name)
            for pod in pods:
                ip = pod.get("status", {}).get("podIP")
                if pod_status.component(pod) == "scheduler" and ip and "deletionTimestamp" not in pod["metadata"]:
                    self._note("scheduler has an address")
                    if await self._answers(ip):
                        self._note("scheduler answers")
                        return self._scheduler_at(ip)
            await self._wait(pods, "its scheduler")

    def _scheduler_at(self, ip: str) -> str:
        return f"{manifest.protocol(self._settings)}://{ip}:{names.SCHEDULER_PORT}"

    async def _answers(self, ip: str) -> bool:
        """Return whether a Dask scheduler answers; first whether anything does: Dask's connect waits between tries."""
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(ip, names.SCHEDULER_PORT), _CONNECT_SECONDS)
            writer.close()
            async with self.caller(self._scheduler_at(ip)) as scheduler:
                await asyncio.wait_for(scheduler.identity(), _IDENTITY_SECONDS)
        except FatalCommClosedError as error:
            raise ClusterError(f"the scheduler of Dask cluster {self.name} does not have the cluster's key") from error
        except (OSError, TimeoutError):
            return False
        return True

    async def _first_worker(self) -> None:
        scheduler: Any = self.scheduler_comm
        # The scheduler reports workers to the driver that connected last: another one of a shared cluster has to ask.
        while not (self.scheduler_info["workers"] or (await scheduler.identity())["workers"]):
            # The pods are only asked why there is none.
            looked = monotonic()
            pods = await self._kubernetes.pods(self.name)
            while not self.scheduler_info["workers"] and monotonic() - looked < _DIAGNOSE_SECONDS:
                await self._wait(pods, "its first worker")
        self._note("first worker")

    async def _wait(self, pods: list[dict[str, Any]], what: str) -> None:
        """Pause a waiting loop: log what it waits for now and then, and raise at the timeout or a permanent failure."""
        now = monotonic()
        reason = pod_status.permanent_failure(pods)
        if not reason and now - self._diagnosed > _DIAGNOSE_SECONDS:
            self._diagnosed, reason = now, await self._kubernetes.refusal()
        if reason:
            raise ClusterError(f"Dask cluster {self.name} cannot start: {reason}")
        if now > self._give_up:
            raise ClusterError(
                f"Dask cluster {self.name} did not start within {self._settings.start_timeout_seconds:g} s; "
                f"it waited for {what}: {await self._reason()}"
            )
        if now - self._logged > _LOG_SECONDS:
            self._logged = now
            text = "Dask cluster %s: waiting for %s, %.0f s so far: %s"
            self._logger.info(text, self.name, what, now - self._began, await self._reason())
            cluster = await self._kubernetes.cluster(self.name)
            if cluster is None or "deletionTimestamp" in cluster["metadata"]:  # when idle (a shared one), or by hand
                raise _DeletedError(f"Dask cluster {self.name} was deleted while it started")
        await asyncio.sleep(_POLL_SECONDS)

    async def _reason(self) -> str:
        try:
            pods = await self._kubernetes.pods(self.name)
            warnings = await self._kubernetes.warnings(self.name)
        except ClusterError as error:
            return str(error)
        reasons = [reason for reason in (pod_status.reasons(pods), *warnings[-1:]) if reason]
        if not pods and not reasons:
            return f"no pod yet; is a Dask operator running that watches namespace {self._kubernetes.namespace}?"
        return "; ".join(reasons) or "its pods are starting"

    async def _verify(self) -> None:
        """Check that scheduler and workers run this process's image and libraries: they exchange pickles."""
        ours, desired = get_versions(driver.PACKAGES), self._driver.image
        scheduler: Any = self.scheduler_comm
        answers = {"scheduler": await scheduler.versions(packages=driver.PACKAGES)}
        answers |= await scheduler.broadcast(msg={"op": "versions", "packages": driver.PACKAGES})
        for who, theirs in answers.items():
            if differs := driver.difference(driver.in_one_line(ours), driver.in_one_line(theirs)):
                raise ClusterError(f"{who} of Dask cluster {self.name} has other libraries than this run: {differs}")
        for pod in await self._kubernetes.pods(self.name):
            image = driver.running_image(pod)
            if "@" in desired and "@" in image and driver.digest(image) != driver.digest(desired):
                raise ClusterError(f"pod {pod['metadata']['name']} runs {image}, but this run {desired}")
        self._note("verified")

    def _note(self, step: str) -> None:
        self.steps.setdefault(step, monotonic() - self._began)

    # --- closing ----------------------------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        if self._start_task is not None and not self._start_task.done():
            self._start_task.cancel()
            await asyncio.wait({self._start_task}, timeout=_DELETE_SECONDS)
        self._kubernetes.retry_for(0)
        if self.status == Status.running and not self.shared:
            try:
                await asyncio.wait_for(self._collect(), _COLLECT_SECONDS)
            except (TimeoutError, OSError, ClusterError) as error:
                text = "Dask cluster %s: usage and logs could not be collected: %s"
                self._logger.warning(text, self.name, error or "no answer")
        with suppress(TimeoutError, OSError):
            await asyncio.wait_for(self.disconnect(), _COLLECT_SECONDS)
        self.status = Status.closed
        if self._must_delete:
            await self._delete()
        await self._kubernetes.close()
        if self.steps and not self.shared:
            text = usage.page(self.name, self._where(), self.steps, self.used, self._logs, limit=90_000)
            about = usage.summary(self.used) if self.used else f"Dask cluster {self.name}"
            await usage.publish(self.run, text, about, self._logger)

    async def _delete(self) -> None:
        self._kubernetes.retry_for(_DELETE_SECONDS)
        try:
            await self._kubernetes.delete_cluster(self.name)
        except ClusterError as error:
            text = "Dask cluster %s could not be deleted (%s); Kubernetes deletes it with its Job, or: %s"
            self._logger.warning(text, self.name, error, self._delete_command())

    def _delete_command(self) -> str:
        return f"kubectl --namespace {self._kubernetes.namespace} delete daskcluster {self.name}"

    async def _collect(self) -> None:
        # First: logs may take what time there is.
        counted = await getattr(self.scheduler_comm, USAGE)()
        self.used = usage.measure(counted, self.size)
        record = run_record.current()
        record.use(core_seconds=self.used.core_seconds, gib_seconds=self.used.gib_seconds)
        limit = int(self.size.memory_gib * usage.GIB)
        record.see_workers(len(self.used.workers), int(self.used.memory_peak_gib * usage.GIB), limit)
        self._logger.info("Dask cluster %s used %s", self.name, usage.summary(self.used))
        pods = (await self._kubernetes.pods(self.name))[:_LOG_PODS]
        logs = await asyncio.gather(*(self._kubernetes.log(pod["metadata"]["name"], _LOG_LINES) for pod in pods))
        self._logs = list(zip(pods, logs, strict=True))

    # --- lost workers -----------------------------------------------------------------------------------------------

    def worker_exit(self, address: str) -> str | None:
        """Return why the worker at that address ended, such as `out of memory (137)`; None if that is unknown."""
        reason: str | None = self.sync(self._worker_exit, address)  # type: ignore[no-untyped-call]
        return reason

    async def _worker_exit(self, address: str) -> str | None:
        ip = urlsplit(address).hostname
        # The kubelet reports it a moment after the process ended.
        end = monotonic() + _EXIT_SECONDS
        while monotonic() < end:
            try:
                pods = await self._kubernetes.pods(self.name)
            except ClusterError:
                return None
            pod = next((each for each in pods if each.get("status", {}).get("podIP") == ip), None)
            if pod is None:
                return "its pod was removed (deleted, evicted, or its node is gone)"
            if reason := pod_status.last_exit(pod):
                return reason
            await asyncio.sleep(_POLL_SECONDS * 5)
        return None


class _DeletedError(ClusterError):
    """The cluster was deleted while it was waited for; a shared one is then created again."""
