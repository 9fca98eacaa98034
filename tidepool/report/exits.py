"""The end of a process or container in words: the same in a run's log, its state, its report and `tidepool status`."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_SIGNALLED = 128
# Kubernetes' reasons that say no more than the exit code.
_PLAIN = {"", "Completed", "Error", "OOMKilled"}


def process(code: int) -> str:
    """Return how a process ended, by Python's exit code (negative: the signal), with the code that a shell shows."""
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal_name(-code)} ({_SIGNALLED - code})"


def container(terminated: Mapping[str, Any]) -> str:
    """Return how a container ended, by the `terminated` of its status in Kubernetes."""
    code, reason = terminated.get("exitCode") or 0, terminated.get("reason") or ""
    if reason == "OOMKilled":
        return out_of_memory(code)
    if _signal(code - _SIGNALLED):
        return process(_SIGNALLED - code)
    return process(code) if reason in _PLAIN else f"{reason} ({code})"


def out_of_memory(code: int = _SIGNALLED + signal.SIGKILL) -> str:
    """Return how a process ended that was killed for its memory."""
    return f"out of memory ({code})"


def driver_out_of_memory(limit: str) -> str:
    """Return how a driver ended that was killed for its memory: the message of its run, from whichever saw it.

    Args:
        limit: Of its container, as Kubernetes writes it; empty: none.
    """
    known = f"limit {limit}" if limit else "no limit: the node's"
    return f"driver out of memory ({known}); raise memory_limit"


def signal_name(number: int) -> str:
    """Return the name of a signal, or `signal N` for one that is numbered only."""
    return _signal(number) or f"signal {number}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # such as those that are numbered only
        return ""
