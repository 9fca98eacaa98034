"""The memory of this container by its cgroup: the limit, and the processes that the kernel killed for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# Version 2, then version 1: counters and limit, below the mount.
_FILES = (("memory.events", "memory.max"), ("memory/memory.oom_control", "memory/memory.limit_in_bytes"))
_UNITS = (("Gi", 1024**3), ("Mi", 1024**2))


@dataclass(frozen=True)
class Memory:
    """The memory of a container.

    Attributes:
        kills: Processes that the kernel killed for memory so far.
        limit: As Kubernetes writes it, such as 512Mi; empty: none.
    """

    kills: int
    limit: str


def read(cgroup: Path = CGROUP) -> Memory | None:
    """Return the memory of this container; None where its cgroup does not tell, as outside of a container."""
    for counters, limit in _FILES:
        try:
            counted = dict(line.split() for line in (cgroup / counters).read_text().splitlines())
            return Memory(int(counted["oom_kill"]), _quantity((cgroup / limit).read_text().strip()))
        except (OSError, KeyError, ValueError):
            continue
    return None


def _quantity(limit: str) -> str:
    # Without one: the word in version 2, the largest number of pages in version 1.
    if limit == "max" or int(limit) >= 2**62:
        return ""
    size = int(limit)
    return next((f"{size // unit}{name}" for name, unit in _UNITS if size % unit == 0), str(size))
