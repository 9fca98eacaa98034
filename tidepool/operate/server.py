"""Entry point of the server's pods, `python -m tidepool.operate.server`: `prefect server start` behind a proxy.

The proxy authenticates flow runs, and replaces their token by the server's password (templates/_flow-run-api.tpl). In a
websocket the token is in a message, which the proxy does not see: this module replaces it there. It also bounds
what the server gets of flow runs: what they subscribe to, which team's objects they write, and what is in bodies.

With the argument `services` it is `prefect server services start`.
"""

from __future__ import annotations

import base64
import hmac
import json
import logging
import re
import sys
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

from sqlalchemy.exc import SQLAlchemyError

from tidepool.operate import bodies
from tidepool.operate.bodies import BodyError
from tidepool.operate.owners import UUID

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tidepool.operate.owners import Owners

# The name of the team's work pool. The proxy sets it, and removes what a client sends. From another client it only
# restricts.
MARK = b"x-tidepool-flow-run"
# Prefect's runner waits for them, for any run. The ids of other runs stay unknown otherwise.
SIGNALS = frozenset({"prefect.flow-run.Cancelling", "prefect.flow-run.Suspended"})
_RUN = re.compile(rf"prefect\.flow-run\.{UUID.pattern}")
_POLICY_VIOLATION, _INTERNAL_ERROR = 1008, 1011
# The database is away.
_UNREADABLE = (SQLAlchemyError, OSError)
_LOGGER = logging.getLogger(__name__)


def may_subscribe(criteria: object) -> bool:
    """Return whether a flow run may subscribe to what a filter selects: signals to runs, or runs that it knows."""

    def texts(part: str, field: str) -> list[Any]:
        found = criteria.get(part) if isinstance(criteria, dict) else None
        values = found.get(field) if isinstance(found, dict) else None
        return values if isinstance(values, list) else []

    names, runs = texts("event", "name"), texts("resource", "id")
    signals = bool(names) and all(isinstance(name, str) and name in SIGNALS for name in names)
    return signals or (bool(runs) and all(isinstance(run, str) and _RUN.fullmatch(run) for run in runs))


class FlowRunCalls:
    """ASGI application: the requests and websockets of flow runs, in front of Prefect's.

    What passes is written again from what was checked: another parser might read the text as it came differently.

    Args:
        application: Prefect's.
        password: `user:password` of the server; None if it has none.
        owners: Of the server's objects.
    """

    def __init__(self, application: ASGIApp, password: str | None, owners: Owners) -> None:
        self._application = application
        self._password = password
        self._owners = owners
        self._expected = b"Basic " + base64.b64encode((password or "").encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or connection."""
        headers = dict(scope.get("headers", ()))
        if MARK not in headers or scope["type"] not in {"http", "websocket"}:
            await self._application(scope, receive, send)
            return
        team = unquote_plus(headers[MARK].decode("latin-1"))
        if scope["type"] == "http":
            await self._request(scope, team, receive, send)
        else:
            trusted = self._password is not None and hmac.compare_digest(
                headers.get(b"authorization", b""), self._expected
            )
            await self._websocket(scope, team, receive, send, trusted=trusted)

    async def _request(self, scope: Scope, team: str, receive: Receive, send: Send) -> None:
        parts, more = [], True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # it has gone
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(parts)
        try:
            content = bodies.check(scope["path"], body) if body else None
            await self._owners.check(team, scope["method"], scope["path"], content)
        except BodyError as error:
            await _answer(send, error.status, str(error))
            return
        except _UNREADABLE:
            _LOGGER.exception("the owner of what a flow run writes cannot be read")
            # Prefect's client tries again.
            await _answer(send, HTTPStatus.SERVICE_UNAVAILABLE, "the database does not answer")
            return
        if body:
            body = json.dumps(_own_key(scope["path"], team, content)).encode()
        length = (b"content-length", str(len(body)).encode())
        headers = [length if name == b"content-length" else (name, value) for name, value in scope["headers"]]
        read = False

        async def again() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._application({**scope, "headers": headers}, again, send)

    async def _websocket(self, scope: Scope, team: str, receive: Receive, send: Send, *, trusted: bool) -> None:
        first, dropped = True, False

        async def checked() -> Message:
            nonlocal first, dropped
            while True:
                message = await receive()
                if message["type"] != "websocket.receive":
                    return message
                was_first, first = first, False
                if was_first and trusted:
                    return _text({"type": "auth", "token": self._password})
                try:
                    content = await self._content(scope["path"], team, message, first=was_first)
                except _UNREADABLE:
                    _LOGGER.exception("the owner of what a flow run writes cannot be read")
                    # Prefect's client connects again, and sends again what it is not sure of.
                    await send({"type": "websocket.close", "code": _INTERNAL_ERROR})
                    return {"type": "websocket.disconnect", "code": _INTERNAL_ERROR}
                if scope["path"].endswith("/events/out"):
                    given = content if isinstance(content, dict) else {}
                    if not (was_first and given.get("type") == "auth") and not may_subscribe(given.get("filter")):
                        reason = "a flow run may subscribe to flow runs by id, and to cancellations"
                        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
                        return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION}
                if not isinstance(content, BodyError):
                    return _text(content)
                # Prefect's client would connect again, and send the same event again. One line for each connection.
                if not dropped:
                    _LOGGER.warning("%s of a flow run: a message was dropped: %s", scope["path"], content)
                dropped = True

        await self._application(scope, checked, send)

    async def _content(self, path: str, team: str, message: Message, *, first: bool) -> Any:
        """Return the JSON of a message, or what keeps the server from getting it."""
        try:
            content = bodies.read(message.get("text") or message.get("bytes") or "")
            signs_in = first and isinstance(content, dict) and content.get("type") == "auth"
            if path.endswith("/events/in") and not signs_in:
                await self._owners.check_event(team, content)
        except BodyError as error:
            return error
        return content


def _own_key(path: str, team: str, content: Any) -> Any:
    """Return a body whose idempotency key is the team's alone: the server's are those of a flow, whoever runs it."""
    key = content.get("idempotency_key") if isinstance(content, dict) else None
    if path.endswith("/create_flow_run") and isinstance(key, str):
        return content | {"idempotency_key": f"{team}: {key}"}
    return content


def _text(content: Any) -> Message:
    return {"type": "websocket.receive", "text": json.dumps(content)}


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Start the server with the arguments of `prefect server start`, or its services."""
    from prefect.cli import app
    from prefect.settings import get_current_settings

    from tidepool.operate.owners import Owners
    from tidepool.upstream import prefect_server

    password = get_current_settings().server.api.auth_string
    secret = password.get_secret_value() if password else None
    owners = Owners(prefect_server.work_pool, prefect_server.flow_runs_of)
    prefect_server.wrap_application(lambda each: FlowRunCalls(each, secret, owners))
    prefect_server.keep_rest_of_batch()
    prefect_server.refuse_pending_after_the_end()
    arguments = ["services", "start"] if sys.argv[1:] == ["services"] else ["start", *sys.argv[1:]]
    sys.argv = ["prefect", "server", *arguments]
    app()


if __name__ == "__main__":
    main()
