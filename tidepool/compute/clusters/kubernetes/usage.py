"""Cost and use of a Dask cluster, and the run's page (a Prefect artifact) about it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tidepool.compute.clusters.kubernetes import pod_status

if TYPE_CHECKING:
    import logging
    from collections.abc import Mapping

    from tidepool.compute.clusters.kubernetes.driver import Run
    from tidepool.settings import SizeSettings

_GIB = 1024**3
_MIB = 1024**2
_PUBLISH_SECONDS = 5.0


@dataclass(frozen=True)
class PodLog:
    """The end of one Dask pod's log.

    Attributes:
        pod: Its name.
        node: The node that it ran on.
        restarts: How often its container was restarted.
        last_exit: How the container last terminated; empty when it never did.
        lines: The last lines that it printed.
    """

    pod: str
    node: str
    restarts: int
    last_exit: str
    lines: str


@dataclass(frozen=True)
class Usage:
    """Cost and use of a cluster's workers.

    Attributes:
        core_seconds: Requested CPU cores times seconds, what a cluster is billed by.
        gib_seconds: Memory limits (GiB) times seconds.
        cpu_seconds: CPU time that the worker processes took.
        busy_seconds: Thread-seconds inside tasks.
        idle_share: Share of the thread-seconds in which no task ran, 0 to 1.
        memory_peak_gib: The largest memory that one worker held, GiB.
        workers: The scheduler's figures of each worker, also of those that left.
    """

    core_seconds: float
    gib_seconds: float
    cpu_seconds: float
    busy_seconds: float
    idle_share: float
    memory_peak_gib: float
    workers: list[Mapping[str, Any]]


def measure(counted: Mapping[str, Any], size: SizeSettings) -> Usage:
    """Add up what the scheduler counted.

    Args:
        counted: The answer of `ClusterPlugin.usage`.
        size: What each worker requests.
    """
    workers = counted["workers"]
    seconds = sum(each["seconds"] for each in workers)
    thread_seconds = sum(each["seconds"] * each["threads"] for each in workers)
    busy = counted["busy_seconds"]
    return Usage(
        core_seconds=seconds * size.cpu,
        gib_seconds=seconds * size.memory_gib,
        cpu_seconds=sum(each["cpu_seconds"] for each in workers),
        busy_seconds=busy,
        # A task that runs other tasks (a worker client) counts twice: never below 0.
        idle_share=max(0.0, 1 - busy / thread_seconds) if thread_seconds else 1.0,
        memory_peak_gib=max((each["memory_peak"] for each in workers), default=0) / _GIB,
        workers=workers,
    )


def summary(usage: Usage) -> str:
    """Return the usage in one line."""
    return (
        f"{len(usage.workers)} workers, {usage.core_seconds:.0f} core-seconds, {usage.gib_seconds:.0f} GiB-seconds, "
        f"{usage.idle_share:.0%} idle, peak memory {usage.memory_peak_gib:.2f} GiB"
    )


def pod_log(pod: Mapping[str, Any], lines: str) -> PodLog:
    """Return the end of a pod's log with what the pod's status says."""
    return PodLog(
        pod=pod["metadata"]["name"],
        node=pod["spec"].get("nodeName", ""),
        restarts=pod_status.restarts(pod),
        last_exit=pod_status.last_exit(pod),
        lines=lines,
    )


def page(
    cluster: str, where: str, steps: Mapping[str, float], usage: Usage | None, logs: list[PodLog], *, limit: int
) -> str:
    """Return the run's page about its cluster, in Markdown.

    Args:
        cluster: The cluster's name.
        where: How to reach the dashboard while the cluster exists.
        steps: Seconds from the request to each step of the start.
        usage: What was used; None when the scheduler did not answer at the end.
        logs: The pods' last lines; shortened to fit.
        limit: Bytes that the page may have.
    """
    parts = [f"# Dask cluster `{cluster}`", where]
    if steps:
        parts.append("Start: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in steps.items()) + ".")
    if usage is None:
        parts.append("Usage unknown: its scheduler did not answer at the end.")
    else:
        parts.append(
            "| used | |\n|---|---:|\n"
            f"| core-seconds requested | {usage.core_seconds:.1f} |\n"
            f"| CPU-seconds taken | {usage.cpu_seconds:.1f} |\n"
            f"| GiB-seconds requested | {usage.gib_seconds:.1f} |\n"
            f"| seconds inside tasks | {usage.busy_seconds:.1f} |\n"
            f"| idle share | {usage.idle_share:.0%} |\n"
            f"| peak memory of a worker | {usage.memory_peak_gib:.2f} GiB |"
        )
        rows = "".join(
            f"\n| {each['name']} | {each['seconds']:.1f} | {each['cpu_seconds']:.1f} "
            f"| {each['memory_peak'] / _MIB:.0f} | {each['memory_limit'] / _MIB:.0f} |"
            for each in usage.workers
        )
        parts.append(f"| worker | seconds | CPU-seconds | peak MiB | limit MiB |\n|---|---:|---:|---:|---:|{rows}")
    text = "\n\n".join(parts)
    room = (limit - len(text.encode())) // max(len(logs), 1) - 400
    for log in logs:
        title = f"{log.pod} on {log.node or 'no node'}, {log.restarts} restarts"
        title += f", {log.last_exit}" if log.last_exit else ""
        lines = log.lines.encode()[-max(room, 0) :].decode(errors="ignore").replace("```", "'''")
        text += f"\n\n<details><summary>{title}</summary>\n\n```\n{lines}\n```\n\n</details>"
    return text


def publish(run: Run, text: str, about: str, log: logging.Logger | logging.LoggerAdapter[Any], *, wait: bool) -> None:
    """Write the run's page, in a thread: the Prefect API may be away, and a run waits at most 5 s for it.

    Args:
        run: The flow run; without an id nothing is written.
        text: The page.
        about: Its description.
        log: The run's logger, for a page that cannot be written.
        wait: Wait for it.
    """
    if not run.id:
        return
    thread = threading.Thread(target=_publish, args=(run, text, about, log), daemon=True)
    thread.start()
    if wait:
        thread.join(_PUBLISH_SECONDS)


def _publish(run: Run, text: str, about: str, log: logging.Logger | logging.LoggerAdapter[Any]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactCreate

    # Not by `report`: when a cluster closes, the context from which Prefect knows the run has ended.
    key = f"{run.flow}-dask-cluster"
    page = ArtifactCreate(key=key, type="markdown", description=about, data=text, flow_run_id=UUID(run.id))
    try:
        with get_client(sync_client=True) as client:
            client.create_artifact(page)
    except Exception as error:  # noqa: BLE001 - a missing page must not fail a run
        log.warning("the page %s was not published: %s", key, error)
