"""What a Dask cluster cost and used, and the page that says so in the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tidepool.settings import SizeSettings

_GIB = 1024**3
_MIB = 1024**2


@dataclass(frozen=True)
class PodLog:
    """The end of one Dask pod's log.

    Attributes:
        pod: Its name.
        node: The node that it ran on.
        restarts: How often its container was started again.
        ended: How the container ended the last time, empty when it never did.
        lines: The last lines that it printed.
    """

    pod: str
    node: str
    restarts: int
    ended: str
    lines: str


@dataclass(frozen=True)
class Usage:
    """What the workers of a cluster cost and used.

    Attributes:
        core_seconds: Requested CPU cores times seconds, what a cluster is billed by.
        gib_seconds: Memory limits times seconds, GiB.
        cpu_seconds: CPU time that the worker processes took.
        busy_seconds: Thread-seconds inside tasks.
        idle_share: Part of the thread-seconds in which no task ran, 0 to 1.
        memory_peak_gib: The largest memory that one worker held, GiB.
        workers: Each worker that there was.
    """

    core_seconds: float = 0.0
    gib_seconds: float = 0.0
    cpu_seconds: float = 0.0
    busy_seconds: float = 0.0
    idle_share: float = 1.0
    memory_peak_gib: float = 0.0
    workers: list[Mapping[str, Any]] = field(default_factory=list)


def measure(counted: Mapping[str, Any], size: SizeSettings) -> Usage:
    """Adds up what the scheduler counted (`ClusterPlugin.usage`).

    Args:
        counted: As the scheduler answers it.
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
        # A task that runs other tasks (a worker client) counts twice: never below nothing.
        idle_share=max(0.0, 1 - busy / thread_seconds) if thread_seconds else 1.0,
        memory_peak_gib=max((each["memory_peak"] for each in workers), default=0) / _GIB,
        workers=workers,
    )


def summary(usage: Usage) -> str:
    """The usage in one line."""
    return (
        f"{len(usage.workers)} workers, {usage.core_seconds:.0f} core-seconds, {usage.gib_seconds:.0f} GiB-seconds, "
        f"{usage.idle_share:.0%} idle, peak memory {usage.memory_peak_gib:.2f} GiB"
    )


def page(
    cluster: str, where: str, steps: Mapping[str, float], usage: Usage | None, logs: list[PodLog], *, limit: int
) -> str:
    """The run's page about its cluster, in Markdown.

    Args:
        cluster: The cluster's name.
        where: How to reach the dashboard, as long as the cluster lives.
        steps: Seconds from the request to each step of the start.
        usage: What was used; None when the scheduler could not be asked any more.
        logs: The pods' last lines; shortened to fit.
        limit: Bytes that the page may have.
    """
    parts = [f"# Dask cluster `{cluster}`", where]
    if steps:
        parts.append("Start: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in steps.items()) + ".")
    if usage is None:
        parts.append("What it used is not known: its scheduler did not answer at the end.")
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
        title = f"{log.pod} on {log.node or 'no node'}, {log.restarts} restarts" + (
            f", {log.ended}" if log.ended else ""
        )
        lines = log.lines.encode()[-max(room, 0) :].decode(errors="ignore").replace("```", "'''")
        text += f"\n\n<details><summary>{title}</summary>\n\n```\n{lines}\n```\n\n</details>"
    return text
