"""The decision about what on-call is told of failed runs, and when. Pure: no request, no message is sent here.

A failure is told when it has lasted, once for all that fail alike, and again when it is over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from tidepool.operate.exporter.records import Deployment, Run

HOLD_SECONDS = 60.0
"""A failure that a retry ends sooner is not told."""
AGAIN_SECONDS = 600.0
"""Failures alike are one message in this time, in however many deployments, and so are all beyond `MOST`."""
MOST = 5
FAILED = frozenset({"Failed", "Crashed"})
# Of a deployment with the tag `tier:3` nothing is told.
_SILENT_TIER = "3"
_ALIKE = 160
_OTHERS = "many causes"


@dataclass(frozen=True)
class Failure:
    """A run that ended badly.

    Attributes:
        run: The run.
        deployment: Its deployment.
        sentence: Why.
        success: End of the deployment's last Completed run, Unix time; None if it is not known.
    """

    run: Run
    deployment: Deployment
    sentence: str
    success: float | None

    @property
    def alike(self) -> str:
        """Its sentence without numbers, ids and names in quotes: the same for failures of one cause."""
        return re.sub(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{6,}\b|\d+", "#", self.sentence.lower())[:_ALIKE]


@dataclass(frozen=True)
class Told:
    """News for on-call.

    Attributes:
        failures: New failures, of one cause unless there are several `causes`; one for each deployment.
        over: Deployments that are Completed again, with the number of their failed runs.
        causes: Number of causes.
        runs: Number of failed runs.
    """

    failures: tuple[Failure, ...] = ()
    over: tuple[tuple[Deployment, int], ...] = ()
    causes: int = 0
    runs: int = 0


@dataclass
class _Open:
    """A cause that a deployment fails with; told, or about to be.

    Attributes:
        failure: The last such failure.
        runs: Runs that failed so.
        told: On-call knows it.
    """

    failure: Failure
    runs: int = 0
    told: bool = False


@dataclass
class Incidents:
    """The failures that last.

    Attributes:
        held: Failures that may still be retried, by the run's id.
    """

    held: dict[str, Failure] = field(default_factory=dict)
    _open: dict[tuple[str, str], _Open] = field(default_factory=dict)  # by deployment id and cause
    _told: dict[str, float] = field(default_factory=dict)  # when, by cause
    _several: float = float("-inf")  # when several causes were told together

    def add(self, failure: Failure) -> None:
        """Take note of a run that ended as Failed or Crashed."""
        if failure.deployment.tier != _SILENT_TIER:
            self.held[failure.run.id] = failure

    def due(self, now: float) -> set[str]:
        """Return the ids of the runs that have been held long enough: whether they still are Failed is to be asked."""
        return {key for key, each in self.held.items() if now - each.run.since >= HOLD_SECONDS}

    def settle(self, due: Iterable[str], lasting: Collection[str]) -> None:
        """Forget the runs of `due` that a retry has ended; what is left of them is `lasting`."""
        for key in due:
            failure = self.held.pop(key)
            if key in lasting:
                found = self._open.setdefault(self._key(failure), _Open(failure))
                found.failure, found.runs = failure, found.runs + 1

    def _key(self, failure: Failure) -> tuple[str, str]:
        """Return where a failure belongs; a deployment with a new cause each time has not more than `MOST` and one."""
        key = failure.run.deployment, failure.alike
        if key in self._open or sum(deployment == key[0] for deployment, _ in self._open) < MOST:
            return key
        # Not alike, but of one deployment.
        return key[0], f"{_OTHERS} of {key[0]}"

    def completed(self, runs: Iterable[Run]) -> Told | None:
        """Return what is over, now that these runs are Completed; what is held and over is never told."""
        ended = {each.deployment: each.since for each in runs}

        def lasts(failure: Failure) -> bool:
            return ended.get(failure.run.deployment, float("-inf")) <= failure.run.since

        self.held = {key: each for key, each in self.held.items() if lasts(each)}
        over: dict[str, tuple[Deployment, int]] = {}
        for key, each in list(self._open.items()):
            if not lasts(each.failure):
                del self._open[key]
                if each.told:
                    count = over.get(key[0], (each.failure.deployment, 0))[1] + each.runs
                    over[key[0]] = (each.failure.deployment, count)
        return Told(over=tuple(over.values())) if over else None

    def told(self, now: float) -> list[Told]:
        """Return what is to be told now; each failure at most once."""
        self._told = {cause: at for cause, at in self._told.items() if now - at < AGAIN_SECONDS}
        waiting: dict[str, list[_Open]] = {}
        for (_, cause), each in self._open.items():
            if not each.told and cause not in self._told:
                waiting.setdefault(cause, []).append(each)
        found = []
        while waiting and len(self._told) < MOST:
            cause = next(iter(waiting))
            found.append(self._tell(now, {cause: waiting.pop(cause)}))
        if waiting and now - self._several >= AGAIN_SECONDS:
            self._several = now
            found.append(self._tell(now, waiting))
        return found

    def _tell(self, now: float, causes: dict[str, list[_Open]]) -> Told:
        failing = [each for alike in causes.values() for each in alike]
        for each in failing:
            each.told = True
        if len(causes) == 1:
            self._told[next(iter(causes))] = now
        last = {each.failure.run.deployment: each.failure for each in failing}
        return Told(tuple(last.values()), causes=len(causes), runs=sum(each.runs for each in failing))
