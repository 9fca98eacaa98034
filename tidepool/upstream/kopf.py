"""Private parts of kopf: its registry of handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import kopf


def remove_timer(registry: kopf.OperatorRegistry, function: Callable[..., Any]) -> None:
    """Remove the timer or daemon that calls `function` from the registry of an imported operator.

    Why: kopf can add handlers, but not remove those of an operator that is extended.
    Watch: `kopf._core.intents.registries.OperatorRegistry._spawning`.
    Delete when: kopf can remove or filter handlers, or the operator runs with a handler list of its own.
    """
    spawning = registry._spawning
    spawning._handlers = [each for each in spawning._handlers if each.fn is not function]
