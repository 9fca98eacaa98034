"""Private parts of kopf: its registry of handlers."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import kopf

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def remove_timer(registry: kopf.OperatorRegistry, function: Callable[..., Any]) -> None:
    """Remove the timer or daemon that calls `function` from the registry of an imported operator.

    Why: kopf can add handlers, but not remove those of an operator that is extended.
    Watch: `kopf._core.intents.registries.OperatorRegistry._spawning`.
    Delete when: kopf can remove or filter handlers, or the operator runs with a handler list of its own.
    """
    spawning = registry._spawning
    spawning._handlers = [each for each in spawning._handlers if each.fn is not function]


def remove_handlers(registry: kopf.OperatorRegistry, *functions: Callable[..., Any]) -> None:
    """Remove the handlers of changes that call one of `functions`: a kind without a handler is not watched.

    Why: kopf can add handlers, but not remove those of an operator that is extended.
    Watch: `kopf._core.intents.registries.OperatorRegistry._changing`.
    Delete when: as `remove_timer`.
    """
    changing = registry._changing
    changing._handlers = [each for each in changing._handlers if each.fn not in functions]


def not_at_creation(registry: kopf.OperatorRegistry, function: Callable[..., Any]) -> None:
    """Have the handler of a field's changes that calls `function` not called for a new object.

    Why: kopf takes the first value of a field for a change, unless the handler was registered with `old=PRESENT`.
    Watch: `kopf._core.intents.registries._matches_field_changes`.
    Delete when: as `check_first`.
    """
    changing = registry._changing
    changing._handlers = [
        dataclasses.replace(each, old=kopf.PRESENT) if each.fn is function else each for each in changing._handlers
    ]


def check_first(registry: kopf.OperatorRegistry, check: Callable[..., Awaitable[bool]]) -> None:
    """Await `check`, with a handler's arguments, before each handler of an imported operator.

    What it raises ends both; if it returns False, the handler is not called, and kopf takes it for done.

    Why: kopf has no step before the handlers, and a handler that is added runs beside the others.
    Watch: `kopf._core.intents.registries.OperatorRegistry`: handlers of changes in `_changing`, timers in `_spawning`.
    Delete when: kopf can filter or wrap the handlers of an operator that is extended.
    """
    parts: tuple[Any, ...] = (registry._changing, registry._spawning)
    for handlers in parts:
        handlers._handlers = [
            dataclasses.replace(each, fn=_checked(each.fn, check)) for each in handlers.get_all_handlers()
        ]


def _checked(function: Callable[..., Awaitable[Any]], check: Callable[..., Awaitable[bool]]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def checked(**arguments: Any) -> Any:
        return await function(**arguments) if await check(**arguments) else None

    return checked
