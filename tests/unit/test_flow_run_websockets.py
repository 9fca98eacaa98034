"""The websockets of flow runs: whose token is replaced, and what may be subscribed to."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tidepool.operate.server import MARK, FlowRunWebsockets, may_subscribe

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

PASSWORD = "admin:x"
BASIC = b"Basic " + base64.b64encode(PASSWORD.encode())
RUN = "prefect.flow-run.00000000-0000-0000-0000-000000000007"
AUTH = {"type": "auth", "token": "runs:t"}
ALL = {"type": "filter", "filter": {}}
ONE = {"type": "filter", "filter": {"resource": {"id": [RUN]}}}


@pytest.mark.parametrize(
    ("criteria", "allowed"),
    [
        ({"event": {"name": ["prefect.flow-run.Cancelling"]}}, True),
        ({"event": {"name": ["prefect.flow-run.Suspended"], "prefix": None}, "any_resource": None}, True),
        ({"event": {"prefix": ["prefect.flow-run"]}, "resource": {"id": [RUN]}}, True),
        ({"event": {"name": ["prefect.flow-run.Completed"]}}, False),
        ({"event": {"name": ["prefect.flow-run.Cancelling", "prefect.flow-run.Completed"]}}, False),
        ({"event": {"name": []}}, False),
        ({"event": {"prefix": ["prefect.flow-run.Cancelling"]}}, False),
        ({"resource": {"id": ["prefect.flow-run.*"]}}, False),
        ({"resource": {"id": [RUN, "x"]}}, False),
        ({"resource": {"id_prefix": [RUN]}}, False),
        ({"resource": {"id": [None]}}, False),
        ({"event": {"name": [["x"]]}}, False),
        ({"event": "name"}, False),
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_a_flow_run_subscribes_to_runs_that_it_knows_and_to_signals(criteria: object, *, allowed: bool) -> None:
    assert may_subscribe(criteria) is allowed


def heard(
    *messages: dict[str, Any] | str,
    path: str = "/api/events/in",
    password: str | None = PASSWORD,
    headers: dict[bytes, bytes] | None = None,
) -> tuple[list[Any], list[Message]]:
    """Return what Prefect's application gets of these messages, and what the client gets."""
    got: list[Any] = []
    sent: list[Message] = []
    waiting = [
        {"type": "websocket.connect"},
        *(
            {"type": "websocket.receive", "text": each if isinstance(each, str) else json.dumps(each)}
            for each in messages
        ),
        {"type": "websocket.disconnect", "code": 1000},
    ]

    async def application(_scope: Scope, receive: Receive, _send: Send) -> None:
        while (message := await receive())["type"] != "websocket.disconnect":
            if message["type"] == "websocket.receive":
                got.append(json.loads(message["text"]))
        got.append(message["code"])

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    found = {MARK: b"0", b"authorization": BASIC} if headers is None else headers
    scope = {"type": "websocket", "path": path, "headers": [*found.items()]}
    asyncio.run(FlowRunWebsockets(application, password)(scope, receive, send))
    return got, sent


def test_the_proxys_header_replaces_the_token_of_the_first_message() -> None:
    got, _ = heard(AUTH, {"event": 1}, AUTH)
    assert got == [{"type": "auth", "token": PASSWORD}, {"event": 1}, AUTH, 1000]


@pytest.mark.parametrize(
    "headers", [{}, {MARK: b"0"}, {MARK: b"0", b"authorization": b"Basic eDp5"}, {b"authorization": BASIC}]
)
def test_another_connection_keeps_its_token(headers: dict[bytes, bytes]) -> None:
    assert heard(AUTH, headers=headers)[0] == [AUTH, 1000]


def test_a_server_without_a_password_trusts_no_header() -> None:
    empty = {MARK: b"0", b"authorization": b"Basic "}
    assert heard(AUTH, password=None, headers=empty)[0] == [AUTH, 1000]


def test_a_subscription_to_all_events_is_closed() -> None:
    got, sent = heard(AUTH, ALL, path="/api/events/out")
    assert got == [{"type": "auth", "token": PASSWORD}, 1008]
    assert sent[0]["code"] == 1008
    assert "flow run may subscribe" in sent[0]["reason"]
    assert heard(AUTH, ONE, path="/api/events/out")[0][1:] == [ONE, 1000]


@pytest.mark.parametrize("first", [ALL, '{"type": "filter", "filter": null}', "no JSON", "[]"])
def test_a_client_without_an_authentication_message_is_bounded_too(first: dict[str, Any] | str) -> None:
    """Prefect's server without a password serves clients that begin with the filter."""
    marked = {MARK: b"0"}
    assert heard(first, path="/api/events/out", password=None, headers=marked)[0] == [1008]
    assert heard(ONE, path="/api/events/out", password=None, headers=marked)[0] == [ONE, 1000]


def test_a_filter_is_passed_on_as_it_was_checked() -> None:
    """Of a repeated key another parser might take the first."""
    text = json.dumps(ONE)[:-1] + ', "filter": {}}'
    assert heard(AUTH, text, path="/api/events/out")[0][1:] == [1008]
    text = '{"type": "filter", "filter": {}, ' + json.dumps(ONE)[1:]
    assert heard(AUTH, text, path="/api/events/out")[0][1:] == [ONE, 1000]


def test_the_platforms_own_subscriptions_are_not_bounded() -> None:
    assert heard(AUTH, ALL, path="/api/events/out", headers={b"authorization": BASIC})[0] == [AUTH, ALL, 1000]


def test_a_flow_runs_process_sends_its_token_as_a_header_of_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from tidepool.operate.flow_run import authenticate_handshakes

    monkeypatch.setenv("PREFECT_CLIENT_CUSTOM_HEADERS", '{"X-Mine": "1"}')
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    authenticate_handshakes()
    assert os.environ["PREFECT_CLIENT_CUSTOM_HEADERS"] == '{"X-Mine": "1"}'
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
    authenticate_handshakes()
    headers = json.loads(os.environ["PREFECT_CLIENT_CUSTOM_HEADERS"])
    assert headers == {"X-Mine": "1", "Authorization": BASIC.decode()}
