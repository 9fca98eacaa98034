"""Flow runs, their states and policies, and what is decided about them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

POLICY_VARIABLES = ("after_outage", "max_runtime_seconds", "on_crash", "start_timeout_seconds")
"""Job variables that the Prefect worker does not use: `policy` reads them."""
# A date plus more of it is an error: of the whole pass, for all runs.
_MOST_SECONDS = 10 * 365 * 24 * 3600


@dataclass(frozen=True)
class Policy:
    """A deployment's rules for its flow runs, from its job variables.

    Attributes:
        crash_retries: Number of times that a run is executed again after a crash.
        after_outage: Which of the late runs of a schedule are executed.
        max_runtime: Time that a driver may run; None: any.
        start_timeout: Time from a Job to the beginning of its flow.
    """

    crash_retries: int = 0
    after_outage: Literal["all", "latest", "none"] = "all"
    max_runtime: timedelta | None = None
    start_timeout: timedelta = timedelta(seconds=600)


@dataclass(frozen=True)
class State:
    """A state of a flow run.

    Attributes:
        id: Its id; empty for one that is to be set.
        type: Prefect's type, such as RUNNING.
        name: Its name, such as Running.
        message: Its message.
        since: When it was set; of a SCHEDULED one that is to be set: when the run is due.
    """

    id: str
    type: str
    name: str
    message: str
    since: datetime


@dataclass(frozen=True)
class FlowRun:
    """A flow run of one of the work pools.

    Attributes:
        id: Its id.
        name: Its name.
        state: Its state.
        policy: The policy of its deployment, with the run's own job variables.
        infrastructure: `namespace:job`, when a Prefect worker has told it; of the last attempt.
        deployment: Id of its deployment; empty without one.
        schedule: Id of the schedule that made it; empty if a person or a program did.
        expected: When it was to start.
        history: Its states so far, oldest first; empty if they were not read.
        begun: Whether an attempt of it has begun or ended.
    """

    id: str
    name: str
    state: State
    policy: Policy
    infrastructure: str
    deployment: str
    schedule: str
    expected: datetime
    history: tuple[State, ...] = ()
    begun: bool = False


@dataclass(frozen=True)
class Job:
    """A Job to delete.

    Attributes:
        namespace: Its namespace.
        name: Its name.
        uid: Its uid: another one of the same name is not meant.
    """

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class Decision:
    """A change: set the state of a flow run, unless it has changed meanwhile; then delete its Jobs.

    Attributes:
        run: The flow run.
        state: The state to set; None to leave it.
        jobs: Jobs to delete, when the server has accepted the state.
        output: The last lines that its driver printed, for the log of a run that sent none itself.
        problem: Why nothing could be decided; empty if something was.
    """

    run: FlowRun
    state: State | None = None
    jobs: tuple[Job, ...] = ()
    output: str = ""
    problem: str = ""


def policy(*variables: Mapping[str, Any]) -> Policy:
    """Return the policy of job variables: a work pool's defaults, a deployment's, a run's own; the last one counts.

    The work pool's schema has checked them; a value of another kind is left out, and so is a time of over ten years.
    """
    merged: dict[str, Any] = {}
    for each in variables:
        merged |= {name: value for name, value in each.items() if value is not None}
    retries = re.fullmatch("retry ([0-9]{1,2})", str(merged.get("on_crash", "")))
    outage = merged.get("after_outage")
    return Policy(
        crash_retries=int(retries[1]) if retries else 0,
        after_outage=outage if outage in ("latest", "none") else "all",
        max_runtime=_positive(merged.get("max_runtime_seconds")),
        start_timeout=_positive(merged.get("start_timeout_seconds")) or Policy.start_timeout,
    )


def _positive(value: object) -> timedelta | None:
    return timedelta(seconds=value) if isinstance(value, int) and 0 < value <= _MOST_SECONDS else None
