"""Figures of the flow run of this process, for its log and report: what task runner and clusters note as it runs.

Of bounded size, however many items a run has.
"""

from __future__ import annotations

import heapq
import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SLOWEST = 5
FAILED = 20
WARNINGS = 10
EVENTS = 40
LANES = 1000


@dataclass(frozen=True)
class Item:
    """A mapped task run, or an item of a batch, that has ended.

    Attributes:
        name: Its name.
        begun: Start time, in seconds since the epoch.
        seconds: Duration.
        worker: Where it ran: an address or a thread.
        tries: How often it was tried.
        error: First line of its error; empty if it has a result.
    """

    name: str
    begun: float = 0.0
    seconds: float = 0.0
    worker: str = ""
    tries: int = 1
    error: str = ""


@dataclass
class Workers:
    """The Dask workers of a run, of all its clusters.

    Attributes:
        asked: Number of workers of the size that was asked for.
        had: The most that there were at a time.
        lost: Workers that ended unexpectedly.
        memory_peak: The largest memory that was seen of one worker, in bytes.
        memory_limit: Memory limit of a worker, in bytes; 0 without one.
        core_seconds: Cores times seconds of the workers.
        gib_seconds: Memory limits in GiB times seconds.
    """

    asked: int = 0
    had: int = 0
    lost: int = 0
    memory_peak: int = 0
    memory_limit: int = 0
    core_seconds: float = 0.0
    gib_seconds: float = 0.0


@dataclass
class RunRecord:
    """Figures of one flow run.

    Attributes:
        done: Items with a result.
        failed: Items without one.
        retried: Additional tries of items.
        submitted: Items that were submitted so far.
        slowest: The slowest items, slowest first.
        errors: The first items that failed.
        lanes: Items for the timeline, thinned out to at most `LANES`.
        events: What happened to the clusters: (seconds since the epoch, text).
        warnings: Warnings of the run, each once.
        links: Addresses by title.
        workers: The Dask workers.
    """

    done: int = 0
    failed: int = 0
    retried: int = 0
    submitted: int = 0
    slowest: list[Item] = field(default_factory=list)
    errors: list[Item] = field(default_factory=list)
    lanes: list[Item] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    workers: Workers = field(default_factory=Workers)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._every = 1
        self._seen = 0
        self._heap: list[tuple[float, int, Item]] = []

    @property
    def items(self) -> int:
        """The number of items that have ended."""
        return self.done + self.failed

    def submit(self, count: int) -> None:
        """Count items that were submitted."""
        with self._lock:
            self.submitted += count

    def end(self, item: Item) -> None:
        """Note the end of an item."""
        with self._lock:
            self.retried += max(item.tries - 1, 0)
            if item.error:
                self.failed += 1
                if len(self.errors) < FAILED:
                    self.errors.append(item)
            else:
                self.done += 1
            self._seen += 1
            heapq.heappush(self._heap, (item.seconds, self._seen, item))
            if len(self._heap) > SLOWEST:
                heapq.heappop(self._heap)
            self.slowest = [each for _, _, each in sorted(self._heap, reverse=True)]
            if self._seen % self._every == 0 or item.error:
                self.lanes.append(item)
            if len(self.lanes) > LANES:
                # Half of those that have a result: the shape of the run stays.
                self._every *= 2
                kept = [each for at, each in enumerate(self.lanes) if at % 2 or each.error]
                self.lanes = kept[-LANES:]

    def event(self, text: str) -> None:
        """Note what happened to a cluster; of too many, the first and the last ones stay."""
        with self._lock:
            if len(self.events) >= EVENTS:
                del self.events[EVENTS // 2]
            self.events.append((time.time(), text))

    def warn(self, text: str) -> None:
        """Note a warning of the run."""
        with self._lock:
            if text not in self.warnings and len(self.warnings) < WARNINGS:
                self.warnings.append(text)

    def use(self, *, core_seconds: float, gib_seconds: float) -> None:
        """Add what a cluster's workers were asked for while they lived."""
        with self._lock:
            self.workers.core_seconds += core_seconds
            self.workers.gib_seconds += gib_seconds

    def see_workers(self, count: int, memory: int = 0, limit: int = 0) -> None:
        """Note the number of workers now, and the largest memory (bytes) of one of them with its limit."""
        with self._lock:
            self.workers.had = max(self.workers.had, count)
            self.workers.memory_peak = max(self.workers.memory_peak, memory)
            self.workers.memory_limit = max(self.workers.memory_limit, limit)

    def as_json(self) -> dict[str, Any]:
        """Return the record as values of JSON."""
        with self._lock:
            return asdict(self)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> RunRecord:
        """Return the record that `as_json` wrote."""
        items = {name: [Item(**each) for each in values[name]] for name in ("slowest", "errors", "lanes")}
        events = [(float(at), str(text)) for at, text in values["events"]]
        return cls(**{**values, **items, "events": events, "workers": Workers(**values["workers"])})


_current = RunRecord()
_file: Path | None = None


def current() -> RunRecord:
    """Return the record of the flow run of this process."""
    return _current


def begin(file: str = "") -> RunRecord:
    """Start a new record, when a flow run begins.

    Args:
        file: File in which `save` keeps it; empty for none.
    """
    global _current, _file  # of one flow run at a time: a driver has one, `tidepool run` has one
    _current, _file = RunRecord(), Path(file) if file else None
    save()
    return _current


def save(*, published: bool = False) -> None:
    """Keep the record in its file for another process, and whether its report is published; without one, do nothing.

    Figures for a report: a full disk must not fail the run.
    """
    if _file is not None:
        with suppress(OSError):
            part = _file.with_suffix(".part")
            part.write_text(json.dumps({"published": published, "record": _current.as_json()}))
            part.replace(_file)


def load(file: str) -> tuple[RunRecord, bool]:
    """Return the record in a file, and whether its report is published; an empty record if the file has none."""
    try:
        values = json.loads(Path(file).read_text())
        return RunRecord.of_json(values["record"]), bool(values["published"])
    except (OSError, ValueError, KeyError, TypeError):
        return RunRecord(), False
