"""Entry point of the server's pod, `python -m tidepool.operate.server`: `prefect server start` behind a proxy.

The proxy authenticates flow runs, and replaces their token by the server's password (templates/_flow-run-api.tpl). In a
websocket the token is in a message, which the proxy does not see: this module replaces it there. It also bounds
what a flow run may subscribe to, because a filter is a message too.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The proxy sets it, and removes what a client sends. From another client it only restricts.
MARK = b"x-tidepool-flow-run"
# Prefect's runner waits for them, for any run. The ids of other runs stay unknown otherwise.
SIGNALS = frozenset({"prefect.flow-run.Cancelling", "prefect.flow-run.Suspended"})
_RUN = re.compile(r"prefect\.flow-run\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_POLICY_VIOLATION = 1008


def may_subscribe(criteria: object) -> bool:
    """Return whether a flow run may subscribe to what a filter selects: signals to runs, or runs that it knows."""

    def texts(part: str, field: str) -> list[Any]:
        found = criteria.get(part) if isinstance(criteria, dict) else None
        values = found.get(field) if isinstance(found, dict) else None
        return values if isinstance(values, list) else []

    names, runs = texts("event", "name"), texts("resource", "id")
    signals = bool(names) and all(isinstance(name, str) and name in SIGNALS for name in names)
    return signals or (bool(runs) and all(isinstance(run, str) and _RUN.fullmatch(run) for run in runs))


class FlowRunWebsockets:
    """ASGI application: the websockets of flow runs, in front of Prefect's.

    Args:
        application: Prefect's.
        password: `user:password` of the server; None if it has none.
    """

    def __init__(self, application: ASGIApp, password: str | None) -> None:
        self._application = application
        self._password = password
        self._expected = b"Basic " + base64.b64encode((password or "").encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        headers = dict(scope.get("headers", ()))
        if scope["type"] != "websocket" or MARK not in headers:
            await self._application(scope, receive, send)
            return
        trusted = self._password is not None and hmac.compare_digest(headers.get(b"authorization", b""), self._expected)
        first = True

        async def checked() -> Message:
            nonlocal first
            message = await receive()
            if message["type"] != "websocket.receive":
                return message
            was_first, first = first, False
            if was_first and trusted:
                return _text({"type": "auth", "token": self._password})
            if not scope["path"].endswith("/events/out"):
                return message
            content = _json(message)
            if not (was_first and content.get("type") == "auth") and not may_subscribe(content.get("filter")):
                reason = "a flow run may subscribe to flow runs by id, and to cancellations"
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
                return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION}
            return _text(content)  # not the text as it came: another parser might read it differently

        await self._application(scope, checked, send)


def _json(message: Message) -> dict[str, Any]:
    try:
        content = json.loads(message.get("text") or message.get("bytes") or "")
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


def _text(content: Any) -> Message:
    return {"type": "websocket.receive", "text": json.dumps(content)}


def main() -> None:
    """Start the server with the arguments of `prefect server start`."""
    from prefect.cli import app
    from prefect.settings import get_current_settings

    from tidepool.upstream.prefect_server import wrap_application

    password = get_current_settings().server.api.auth_string
    wrap_application(lambda each: FlowRunWebsockets(each, password.get_secret_value() if password else None))
    sys.argv = ["prefect", "server", "start", *sys.argv[1:]]
    app()


if __name__ == "__main__":
    main()
