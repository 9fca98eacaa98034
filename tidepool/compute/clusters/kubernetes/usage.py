"""Cost and use of a Dask cluster, and the run's page (a Prefect artifact) about it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tidepool.compute.clusters.kubernetes import names, pod_status

if TYPE_CHECKING:
    import logging
    from collections.abc import Collection, Mapping

    from tidepool.compute.clusters.kubernetes.driver import Run
    from tidepool.settings import SizeSettings

# A pod as the API returns it, and the last lines of its log.
PodLog = tuple[dict[str, Any], str]

GIB = 1024**3
_MIB = 1024**2
# The cluster is deleted by then: only the end of the run waits. A busy server took more than 5 s.
_PUBLISH_SECONDS = 15.0


@dataclass(frozen=True)
class Usage:
    """Cost and use of a cluster's workers."""

    core_seconds: float  # requested CPU cores times seconds, which a cluster is billed by
    gib_seconds: float  # memory limits (GiB) times seconds
    cpu_seconds: float  # CPU time that the worker processes took
    busy_seconds: float  # thread-seconds inside tasks
    idle_share: float  # of the thread-seconds, those in which no task ran, 0 to 1
    memory_peak_gib: float  # the largest memory that one worker held, GiB
    workers: list[Mapping[str, Any]]  # the scheduler's figures of each, also of those that left


def measure(counted: Mapping[str, Any], size: SizeSettings) -> Usage:
    """Add up what the scheduler counted (`ClusterPlugin.usage`) of workers of that size."""
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
        memory_peak_gib=max((each["memory_peak"] for each in workers), default=0) / GIB,
        workers=workers,
    )


def summary(usage: Usage) -> str:
    """Return the usage in one line."""
    return (
        f"{len(usage.workers)} workers, {usage.core_seconds:.0f} core-seconds, {usage.gib_seconds:.0f} GiB-seconds, "
        f"{usage.idle_share:.0%} idle, peak memory {usage.memory_peak_gib:.2f} GiB"
    )


def page(
    cluster: str, where: str, steps: Mapping[str, float], usage: Usage | None, logs: Collection[PodLog], *, limit: int
) -> str:
    """Return the run's page about its cluster, in Markdown.

    Args:
        cluster: The cluster's name.
        where: How to reach the dashboard while the cluster exists.
        steps: Seconds from the request to each step of the start.
        usage: None when the scheduler did not answer at the end.
        logs: Shortened to fit.
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
    for pod, printed in logs:
        node = pod["spec"].get("nodeName", "no node")
        title = f"{pod['metadata']['name']} on {node}, {pod_status.restarts(pod)} restarts"
        title += f", {ended}" if (ended := pod_status.last_exit(pod)) else ""
        lines = printed.encode()[-max(room, 0) :].decode(errors="ignore").replace("```", "'''")
        text += f"\n\n<details><summary>{title}</summary>\n\n```\n{lines}\n```\n\n</details>"
    return text


async def publish(run: Run, text: str, about: str, log: logging.Logger | logging.LoggerAdapter[Any]) -> None:
    """Write the page `text`, described by `about`, if there is a flow run.

    The Prefect API may be away: after 5 s, or an error, there is only a warning.
    """
    if not run.id:
        return
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactCreate

    # Not by `report`: when a cluster closes, the context from which Prefect knows the run has ended.
    key = f"{names.slug(run.flow)}-dask-cluster"
    page = ArtifactCreate(key=key, type="markdown", description=about, data=text, flow_run_id=UUID(run.id))
    try:
        async with asyncio.timeout(_PUBLISH_SECONDS), get_client() as client:
            await client.create_artifact(page)
    except Exception as error:  # noqa: BLE001 - a missing page must not fail a run
        log.warning("the page %s was not published: %r", key, error)
