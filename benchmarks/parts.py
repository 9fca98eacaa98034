"""CPU time and memory of the parts of a platform whose processes are on this machine, and figures of the API server."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
from kube import command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kube import Namespace

_SAMPLE_SECONDS = 5.0
_CONTROL_PLANE = {
    "kube-apiserver": "API server",
    "etcd": "etcd",
    "kube-controller-manager": "controller manager",
    "kube-scheduler": "kube-scheduler",
}
_NODE = re.compile(r"/(kubelet|kube-proxy|containerd|dockerd|containerd-shim-runc-v2|netpol)\b")
_PLATFORM = {"operator": "operator", "server": "Prefect server", "services": "Prefect services",
             "worker": "Prefect worker", "exporter": "exporter"}  # fmt: skip
_POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f-_]{27})")
_METRIC = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass
class Usage:
    """Figures of one span of time.

    Attributes:
        seconds: Its length.
        cpu: CPU seconds of each part.
        share: The most of one core that each part used within a sample.
        memory: Peak resident memory of each part, MiB.
        counts: Requests at the API server by verb, and writes of etcd.
        stored: Bytes of etcd's database at the end.
        busy: Part of the machine's CPU time that was not idle.
    """

    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    stored: float = 0.0
    busy: float = 0.0


class Parts:
    """Reads the processes of this machine.

    Args:
        platform: Namespace of the platform.
        given: The names of process ids; instead of finding the parts by themselves.
    """

    def __init__(self, platform: Namespace, given: dict[int, str]) -> None:
        self._platform, self._given = platform, given
        self._names: dict[int, str] = {}
        self._pods: dict[str, str] = {}

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the CPU seconds that each part has used so far, and its memory in MiB."""
        if not (self._pods or self._given):
            self.find_pods()
        cpu: dict[str, float] = defaultdict(float)
        memory: dict[str, float] = defaultdict(float)
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                name = self._names.get(process.pid)
                if name is None:
                    name = self._names[process.pid] = self._name(process)
                if name:
                    times = process.cpu_times()
                    # Of children that have ended, too: PostgreSQL has a process for each connection.
                    cpu[name] += times.user + times.system + times.children_user + times.children_system
                    memory[name] += process.memory_info().rss / 2**20
        return cpu, memory

    def find_pods(self) -> None:
        """Read which pods the platform has; again after one was replaced."""
        self._names.clear()
        self._pods = {}
        for each in self._platform.get("pods"):
            labels = each["metadata"].get("labels", {})
            found = labels.get("app.kubernetes.io/component") or each["metadata"]["name"].split("-")[0]
            self._pods[each["metadata"]["uid"].replace("-", "_")] = _PLATFORM.get(found, found)

    def _name(self, process: psutil.Process) -> str:
        line = process.cmdline()
        if not line:
            return ""
        if process.pid == psutil.Process().pid:
            return "this benchmark"
        if self._given:
            return self._given.get(process.pid, "")
        program = line[0].rpartition("/")[2]
        if program in _CONTROL_PLANE:
            return _CONTROL_PLANE[program]
        with open(f"/proc/{process.pid}/cgroup", encoding="utf-8") as file:  # noqa: PTH123 - as short as it is
            pod = _POD.search(file.read())
        if pod:
            part = self._pods.get(pod[1].replace("-", "_"), "")
            return "proxy of flow runs" if part == "Prefect server" and program == "haproxy" else part
        return "the node's own" if _NODE.search(" ".join(line[:3])) or program in {"containerd", "dockerd"} else ""

    async def measure(self, end: asyncio.Event) -> Usage:
        """Measure until the event is set."""
        usage, began = Usage(), time.monotonic()
        counted, total, idle = await asyncio.to_thread(counts), *_machine()
        first = last = self.read()[0]
        at = began
        while not end.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), _SAMPLE_SECONDS)
            (now, memory), before, at = self.read(), at, time.monotonic()
            for name, seconds in now.items():
                if at - before > 1:  # a shorter sample says nothing
                    share = (seconds - last.get(name, seconds)) / (at - before)
                    usage.share[name] = max(share, usage.share.get(name, 0.0))
                usage.memory[name] = max(memory[name], usage.memory.get(name, 0.0))
            last = now
        usage.seconds = time.monotonic() - began
        usage.cpu = {name: seconds - first.get(name, 0.0) for name, seconds in last.items()}
        after = await asyncio.to_thread(counts)
        usage.stored = after.pop("stored")
        usage.counts = {name: count - counted.get(name, 0.0) for name, count in after.items()}
        total, idle = _machine()[0] - total, _machine()[1] - idle
        usage.busy = 1 - idle / total
        return usage


def counts() -> dict[str, float]:
    """Return how many requests the API server has had by verb, its writes of etcd, and the size of that."""
    found: dict[str, float] = defaultdict(float)
    for line in command("kubectl", "get", "--raw", "/metrics").splitlines():
        if not (match := _METRIC.fullmatch(line)):
            continue
        name, labels, value = match[1], dict(_LABEL.findall(match[2] or "")), float(match[3])
        if name == "apiserver_request_total":
            found[labels["verb"]] += value
        elif name == "etcd_request_duration_seconds_count" and labels["operation"] in {"create", "update", "delete"}:
            found["writes of etcd"] += value
        elif name == "apiserver_storage_size_bytes":
            found["stored"] = value
    return found


def above(usage: Mapping[str, float], idle: Mapping[str, float], ratio: float, runs: int) -> dict[str, float]:
    """Return what each of some runs took above what the idle platform takes in the same time."""
    return {name: (value - idle.get(name, 0.0) * ratio) / runs for name, value in usage.items()}


def _machine() -> tuple[float, float]:
    """Return all CPU seconds of the machine so far, and the idle ones."""
    times = psutil.cpu_times()
    return sum(times[:8]), times.idle + times.iowait
