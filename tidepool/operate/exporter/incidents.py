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
# Runs of a deployment whose attempts are kept apart.
_COUNTED = 1000


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
class Over:
    """A deployment that is Completed again.

    Attributes:
        id: Its id.
        deployment: The deployment.
        attempts: Attempts of its runs that failed before, also those that a retry followed.
    """

    id: str
    deployment: Deployment
    attempts: int


@dataclass(frozen=True)
class Told:
    """News for on-call.

    Attributes:
        failures: New failures, of one cause unless there are several `causes`; one for each deployment.
        over: Deployments that are Completed again.
        causes: Number of causes.
        attempts: Attempts of these deployments' runs that failed so far.
        keys: Deployment ids and causes of the failures.
    """

    failures: tuple[Failure, ...] = ()
    over: tuple[Over, ...] = ()
    causes: int = 0
    attempts: int = 0
    keys: tuple[tuple[str, str], ...] = ()


@dataclass
class _Open:
    """A cause that a deployment fails with; told, or about to be.

    Attributes:
        lasting: Its last failures that no retry has ended, by the run's id, oldest first.
        told: On-call knows it, or a message about it is on its way.
    """

    lasting: dict[str, Failure] = field(default_factory=dict)
    told: bool = False

    @property
    def failure(self) -> Failure:
        """The last one."""
        return next(reversed(self.lasting.values()))

    def add(self, failure: Failure) -> None:
        """Add a failure; more than the last few have nothing to say."""
        self.lasting.pop(failure.run.id, None)
        self.lasting[failure.run.id] = failure
        while len(self.lasting) > MOST:
            del self.lasting[next(iter(self.lasting))]


@dataclass
class _Attempts:
    """The failed attempts of one deployment's runs since it was Completed.

    Attributes:
        runs: By the run's id: how many, and when the last one failed.
        earlier: Those of runs before these.
    """

    runs: dict[str, tuple[int, float]] = field(default_factory=dict)
    earlier: int = 0

    @property
    def count(self) -> int:
        """All of them."""
        return self.earlier + sum(number for number, _ in self.runs.values())

    def add(self, run: Run) -> None:
        """Count an attempt. One that a retry followed sooner than the exporter could read it is in the run's number."""
        seen = self.runs.pop(run.id, (0, 0.0))[0] + 1
        self.runs[run.id] = max(seen, run.attempts), run.since
        if len(self.runs) > _COUNTED:
            self.earlier += self.runs.pop(next(iter(self.runs)))[0]

    def take(self, completed: Run) -> int:
        """Return the number of those before a Completed run, its own with them; the others stay."""
        before = {key: number for key, (number, at) in self.runs.items() if at < completed.since}
        if completed.id in before or completed.id not in self.runs:
            before[completed.id] = max(before.get(completed.id, 0), completed.attempts - 1)
        self.runs = {key: each for key, each in self.runs.items() if key not in before}
        number, self.earlier = self.earlier + sum(before.values()), 0
        return number


@dataclass
class Incidents:
    """The failures that last.

    Attributes:
        held: Failures that may still be retried, by the run's id.
    """

    held: dict[str, Failure] = field(default_factory=dict)
    _open: dict[tuple[str, str], _Open] = field(default_factory=dict)  # by deployment id and cause
    _attempts: dict[str, _Attempts] = field(default_factory=dict)  # by deployment id
    _known: dict[str, Deployment] = field(default_factory=dict)  # on-call knows that it fails, by id
    _over: dict[str, Over] = field(default_factory=dict)  # not told yet, by deployment id
    _told: dict[str, float] = field(default_factory=dict)  # when, by cause
    _several: float = float("-inf")  # when several causes were told together

    def add(self, failure: Failure) -> None:
        """Take note of a run that ended as Failed or Crashed."""
        if failure.deployment.tier != _SILENT_TIER:
            self.held[failure.run.id] = failure
            self._attempts.setdefault(failure.run.deployment, _Attempts()).add(failure.run)

    def due(self, now: float) -> set[str]:
        """Return the ids of the runs of which is to be asked whether they still are Failed.

        They have been held long enough, or wait to be told: behind others, a retry may have begun meanwhile.
        """
        held = {key for key, each in self.held.items() if now - each.run.since >= HOLD_SECONDS}
        return held | {key for each in self._open.values() if not each.told for key in each.lasting}

    def settle(self, due: Collection[str], lasting: Collection[str]) -> None:
        """Forget the runs of `due` that a retry has ended; what is left of them is `lasting`."""
        ended = set(due) - set(lasting)
        for each in self._open.values():
            if not each.told:
                each.lasting = {key: failure for key, failure in each.lasting.items() if key not in ended}
        self._open = {key: each for key, each in self._open.items() if each.lasting}
        for key in [each for each in self.held if each in due]:
            failure = self.held.pop(key)
            if key in lasting:
                self._open.setdefault(self._key(failure), _Open()).add(failure)

    def _key(self, failure: Failure) -> tuple[str, str]:
        """Return where a failure belongs; a deployment with a new cause each time has not more than `MOST` and one."""
        key = failure.run.deployment, failure.alike
        if key in self._open or sum(deployment == key[0] for deployment, _ in self._open) < MOST:
            return key
        # Not alike, but of one deployment.
        return key[0], f"{_OTHERS} of {key[0]}"

    def completed(self, runs: Iterable[Run]) -> None:
        """Note that these runs are Completed: what they end is over, and is never told if it was not."""
        ended = {each.deployment: each for each in runs}

        def lasts(failure: Failure) -> bool:
            last = ended.get(failure.run.deployment)
            return last is None or last.since <= failure.run.since

        self.held = {key: each for key, each in self.held.items() if lasts(each)}
        self._open = {key: each for key, each in self._open.items() if lasts(each.failure)}
        failing = {deployment for deployment, _ in self._open}
        for id_ in (ended.keys() & self._attempts.keys()) - failing:
            attempts = self._attempts[id_].take(ended[id_])
            if not self._attempts[id_].count:
                del self._attempts[id_]
            if deployment := self._known.pop(id_, None):
                self._is_over(Over(id_, deployment, attempts))

    def _is_over(self, over: Over) -> None:
        before = self._over[over.id].attempts if over.id in self._over else 0
        self._over[over.id] = Over(over.id, over.deployment, before + over.attempts)

    def told(self, now: float) -> list[Told]:
        """Return what is to be told now; each failure and each end once, unless it is `lost`."""
        self._told = {cause: at for cause, at in self._told.items() if now - at < AGAIN_SECONDS}
        # One that was lost, of a deployment that fails again, is told with the next end.
        over = tuple(self._over.pop(id_) for id_ in list(self._over) if id_ not in self._known)
        waiting: dict[str, list[tuple[str, str]]] = {}
        for key, each in self._open.items():
            if not each.told and key[1] not in self._told:
                waiting.setdefault(key[1], []).append(key)
        found = [Told(over=over)] if over else []
        while waiting and len(self._told) < MOST:
            cause = next(iter(waiting))
            found.append(self._tell(now, {cause: waiting.pop(cause)}))
        if waiting and now - self._several >= AGAIN_SECONDS:
            self._several = now
            found.append(self._tell(now, waiting))
        return found

    def _tell(self, now: float, causes: dict[str, list[tuple[str, str]]]) -> Told:
        keys = tuple(key for alike in causes.values() for key in alike)
        for key in keys:
            self._open[key].told = True
        if len(causes) == 1:
            self._told[next(iter(causes))] = now
        last = {key[0]: self._open[key].failure for key in keys}
        self._known |= {id_: failure.deployment for id_, failure in last.items()}
        attempts = sum(self._attempts[id_].count for id_ in last)
        return Told(tuple(last.values()), causes=len(causes), attempts=attempts, keys=keys)

    def lost(self, told: Told) -> None:
        """Note that no target has accepted this: what of it lasts is told again, and so is what is over."""
        for key in told.keys:
            if key in self._open:
                self._open[key].told = False
            self._told.pop(key[1], None)
        told_of = {deployment for (deployment, _), each in self._open.items() if each.told}
        for id_ in {deployment for deployment, _ in told.keys} - told_of:
            self._known.pop(id_, None)
        if told.causes > 1:
            self._several = float("-inf")
        for each in told.over:
            self._is_over(each)
