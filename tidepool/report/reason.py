"""The end of a run in one sentence, and what to do: the same in its state, its report, a message and `status`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidepool.report.run_record import RunRecord

_SHOWN, _ITEM = 300, 60
# Prefect's words before an error.
_PREFIXES = (
    "Flow run encountered an exception:",
    "Task run encountered an exception:",
    "Task run encountered an exception",
    "Execution was interrupted by an unexpected exception:",
)
_OWN = (
    "InputError: ",
    "MissingError: ",
    "WorkerLostError: ",
    "UsageError: ",
    "StorageError: ",
    "UnavailableError: ",
    "ClusterError: ",
    "TidepoolError: ",
)
_COUNTED = re.compile(r"; [0-9]+ of [0-9]+ items failed$")
_ENDS = {"COMPLETED": "Completed", "FAILED": "Failed", "CRASHED": "Crashed", "CANCELLED": "Cancelled"}
_BAD = {"FAILED", "CRASHED"}


@dataclass(frozen=True)
class Reason:
    """The end of a run, for people.

    Attributes:
        sentence: Why it ended so, without its state.
        advice: What to do, in one sentence; empty if there is nothing to do.
    """

    sentence: str
    advice: str


def plain(message: str | None) -> str:
    """Return the first line of a state's message without Prefect's words before it."""
    line = next((each.strip() for each in (message or "").splitlines() if each.strip()), "")
    for prefix in _PREFIXES:
        line = line.removeprefix(prefix).strip()
    for name in _OWN:  # errors of ours are sentences already
        line = line.removeprefix(name)
    return _short(line, _SHOWN)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def why(kind: str, message: str | None) -> str:
    """Return the sentence of a state that is set.

    Args:
        kind: Type or name of a final state, such as FAILED.
        message: Its message.
    """
    return plain(message) or f"{_ENDS.get(kind.upper(), kind)} without a reason"


def sentence(kind: str, message: str | None, record: RunRecord) -> str:
    """Return why a run ended as it did: the message of its state, which `why` reads.

    Args:
        kind: Type of its final state, such as FAILED.
        message: The message of that state.
        record: Figures of the run.
    """
    if kind == "COMPLETED":
        return _completed(record)
    text = why(kind, message)
    if kind == "CANCELLED" and not text.lower().startswith("cancel"):
        text = f"cancelled: {text}"
    if record.errors and (first := record.errors[0]):
        # The flow repeats the error of its item, and cannot say which one it was.
        error, _, own = first.error.partition("; item: ")  # a worker adds the item to its error
        more = ""
        if first.name not in text and error in text:
            more = f" ({_short(f'{first.name}: {own}' if own else first.name, _ITEM)})"
        # The state has it already when the report is written: items that had not ended then have failed since.
        if not _COUNTED.search(text):
            more += f"; {record.failed} of {record.submitted or record.items} items failed"
        # `tidepool status` reads the whole from the state: it has to be as short as any.
        text = f"{_short(text, _SHOWN - len(more))}{more}"
    return text


def _completed(record: RunRecord) -> str:
    if record.warnings:
        more = f" (and {len(record.warnings) - 1} more)" if len(record.warnings) > 1 else ""
        return f"completed with a warning: {record.warnings[0]}{more}"
    if not record.items:
        return "completed"
    lost = record.workers.lost
    parts = [f"{record.done} items done"]
    parts += [f"{record.failed} failed"] if record.failed else []
    parts += [f"{record.retried} retried"] if record.retried else []
    parts += [f"{lost} worker{'s' if lost > 1 else ''} lost"] if lost else []
    return f"completed: {', '.join(parts)}"


# The first that fits counts.
_ADVICE = (
    (
        "driver out of memory",
        "Raise `memory_limit` in the job_variables of its deployment (prefect.yaml), deploy, then retry.",
    ),
    ("out of memory", "Give the Dask workers more memory (a larger size, or smaller items), then retry."),
    ("worker lost", "The item ends its worker, or workers run out of memory: take a larger size, or exclude it."),
    ("cannot be pulled", "Register an image that exists: `prefect deploy --all`, or go back with `tidepool rollback`."),
    (
        " s: quota ",
        "Ask for less than its limit, or raise it (`kubectl describe resourcequota`), or wait for others; then retry.",
    ),
    (" s: no node has ", "Ask for less (`cpu_request`, `memory_request` in job_variables), or add a node; then retry."),
    ("did not start within", "Read the reason above; `tidepool status` shows its pod; then retry."),
    ("exceeded timeout", "Find out what is slow (its report has the slowest items), or raise `timeout_seconds`."),
    ("max_runtime_seconds", "Find out what is slow, or raise `max_runtime_seconds`."),
    ("heartbeat", "Its process is lost: retry."),
    ("termination signal", "Its process was told to end; retry unless that was meant."),
    ("killed by", "Its process was killed; retry, and look at the node if it happens again."),
    (
        "stale data",
        "The producer of its data has stopped: look there; then start a new run (this one keeps its date).",
    ),
    ("does not exist", "Check the name of the input, or wait for its producer; then retry."),
    ("bdbquit", "A debugger needs a terminal: `tidepool run --debug NAME` runs everything in one process."),
    ("the store http", "Look at the store first: `tidepool doctor` tells whether it answers from here; then retry."),
    ("could not connect", "Its store or a service does not answer: look at that first; then retry."),
    ("access denied", "Check the credentials of the store; then retry."),
)
_DEFAULT = {
    "FAILED": "Find the message in the runbook; correct the cause, then retry.",
    "CRASHED": "Its process ended without a report of its own; retry, and see the runbook if it happens again.",
}


def with_command(advice: str, flow_run: str, deployment: str | None) -> str:
    """Return what to do, with the command for it if that is a retry or a new run.

    Args:
        advice: Of a `Reason`.
        flow_run: Id of the run.
        deployment: Id of its deployment; None or empty without one.
    """
    found = command(advice, flow_run, deployment)
    return f"{advice} `{found}`" if found else advice


def command(advice: str, flow_run: str, deployment: str | None) -> str:
    """Return the command alone, or nothing; the arguments are those of `with_command`."""
    if "retry" in advice.lower():
        return f"prefect flow-run retry {flow_run}"
    return f"prefect deployment run --id {deployment}" if deployment and "new run" in advice else ""


def reason(kind: str, message: str | None, record: RunRecord) -> Reason:
    """Return why a run ended as its state says, and what to do; the arguments are those of `sentence`.

    What the state says is not made again: of a run whose process is gone, nothing else knows more than a part.
    """
    text = why(kind, message) if kind in _BAD else sentence(kind, message, record)
    if kind == "COMPLETED":
        again = record.workers.lost and not record.failed
        nothing = "Nothing: what the lost workers had was done again." if again else ""
        return Reason(text, "Look at the warnings below." if record.warnings else nothing)
    if kind == "CANCELLED":
        return Reason(text, "Nothing, if that was meant; otherwise retry.")
    advice = next((advice for words, advice in _ADVICE if words in text.lower()), "")
    return Reason(text, advice or _DEFAULT.get(kind, ""))
