"""Private parts of Prefect's server."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from prefect.server.api import server

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp


def wrap_application(wrap: Callable[[ASGIApp], ASGIApp]) -> None:
    """Have `prefect server start` in this process serve the wrapped application.

    Why: flow runs authenticate to a proxy, but websockets authenticate with a message that a proxy cannot see.
    Watch: `prefect.cli._server_utils._run_in_foreground`, which imports `create_app` when it is called.
    Delete when: Prefect's server accepts the `Authorization` header of a websocket's handshake.
    """
    create = server.create_app

    @wraps(create)
    def create_wrapped(*args: Any, **kwargs: Any) -> ASGIApp:
        return wrap(create(*args, **kwargs))

    server.create_app = create_wrapped  # type: ignore[assignment]
