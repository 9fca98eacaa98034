"""A flow run is not Completed before a check has passed.

Prefect proposes Completed as soon as the flow function returns, before the task runner ends: too late for the runner to
say that tasks are still running or were lost. So the flow's own client asks first. What the check raises is the flow's
error: Prefect's engine makes it Failed, with its retries and hooks.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prefect.client.schemas.objects import StateType

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient, SyncPrefectClient
    from prefect.client.schemas.objects import State

# A flow and its subflows share a client, and subflows may end in several threads.
_lock = threading.Lock()
_checks: WeakKeyDictionary[PrefectClient | SyncPrefectClient, dict[UUID, Callable[[], None]]] = WeakKeyDictionary()


def before_completed(
    client: PrefectClient | SyncPrefectClient, flow_run_id: UUID, check: Callable[[], None]
) -> Callable[[], None]:
    """Calls `check` before this client proposes Completed for that flow run.

    Args:
        client: The client of the flow run's engine.
        flow_run_id: The flow run.
        check: Raises what keeps the flow run from being Completed; may block.

    Returns:
        A function that takes the check away.
    """
    with _lock:
        checks = _checks.setdefault(client, {})
        if not checks:
            _ask_first(client, checks)
        checks[flow_run_id] = check

    def remove() -> None:
        with _lock:
            checks.pop(flow_run_id, None)
            if not checks:
                # The instance's attribute gives way to the class's method.
                client.__dict__.pop("set_flow_run_state", None)

    return remove


def _ask_first(client: Any, checks: dict[UUID, Callable[[], None]]) -> None:
    propose = client.set_flow_run_state

    def check_for(flow_run_id: UUID, state: State[Any]) -> Callable[[], None] | None:
        return checks.get(flow_run_id) if state.type == StateType.COMPLETED else None

    def ask(flow_run_id: UUID, state: State[Any], force: bool = False) -> Any:  # noqa: FBT001, FBT002 - Prefect's
        if check := check_for(flow_run_id, state):
            check()
        return propose(flow_run_id, state, force=force)

    async def ask_async(flow_run_id: UUID, state: State[Any], force: bool = False) -> Any:  # noqa: FBT001, FBT002
        if check := check_for(flow_run_id, state):
            await asyncio.to_thread(check)
        return await propose(flow_run_id, state, force=force)

    client.set_flow_run_state = ask_async if inspect.iscoroutinefunction(propose) else ask
