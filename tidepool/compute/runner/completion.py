"""Checks that a flow run must pass before it is Completed.

Prefect proposes Completed as soon as the flow function returns, before it leaves the task runner: too late for the
runner to report that task runs are in flight or were lost. So the flow's engine is made to ask first. An exception of
the check is the flow's error: Prefect makes the run Failed, with its retries and hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidepool.upstream.prefect import check_before_success

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

# Subflows may end in several threads; operations on a dictionary are atomic.
_checks: dict[UUID, Callable[[], None]] = {}


def before_completed(flow_run_id: UUID, check: Callable[[], None]) -> Callable[[], None]:
    """Call `check` before the engine of that flow run proposes Completed.

    Args:
        flow_run_id: The flow run.
        check: Raises an exception to keep the flow run from being Completed; may block.

    Returns:
        A function that removes the check.
    """
    check_before_success(_check)
    _checks[flow_run_id] = check

    def remove() -> None:
        _checks.pop(flow_run_id, None)

    return remove


def _check(flow_run_id: UUID) -> None:
    if check := _checks.get(flow_run_id):
        check()
