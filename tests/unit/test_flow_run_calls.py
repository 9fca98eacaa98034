"""The calls of flow runs: whose token is replaced, what may be subscribed to, and what the server gets."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tidepool.operate.owners import Owners
from tidepool.operate.server import MARK, FlowRunCalls, may_subscribe

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

PASSWORD = "admin:x"
BASIC = b"Basic " + base64.b64encode(PASSWORD.encode())
RUN = "prefect.flow-run.00000000-0000-0000-0000-000000000007"
AUTH = {"type": "auth", "token": "runs:t"}
OTHER = "00000000-0000-0000-0000-000000000009"
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


async def of_media(_kind: str, id_: str) -> str:
    """Every object but one is of the work pool `a pool`."""
    return "other" if id_ == OTHER else "a pool"


async def no_flow_runs(_task_runs: object) -> dict[str, str]:
    return {}


def event(name: str = "mine", **others: Any) -> dict[str, Any]:
    return {"event": name, "resource": {"prefect.resource.id": "x"}, **others}


def heard(
    *messages: dict[str, Any] | str,
    path: str = "/api/events/in",
    password: str | None = PASSWORD,
    headers: dict[bytes, bytes] | None = None,
) -> tuple[list[Any], list[Message]]:
    """Return what Prefect's application gets of these messages, and what the client gets."""
    got: list[Any] = []
    sent: list[Message] = []
    waiting: list[Message] = [
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

    found = {MARK: b"a+pool", b"authorization": BASIC} if headers is None else headers
    scope = {"type": "websocket", "path": path, "headers": [*found.items()]}
    asyncio.run(FlowRunCalls(application, password, Owners(of_media, no_flow_runs))(scope, receive, send))
    return got, sent


def test_the_proxys_header_replaces_the_token_of_the_first_message() -> None:
    got, _ = heard(AUTH, event(), AUTH)
    assert got == [{"type": "auth", "token": PASSWORD}, event(), 1000]


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


# --- what is in a message, and in a request ------------------------------------------------------------------------


def test_a_message_that_no_database_stores_is_passed_on_without_it() -> None:
    text = json.dumps(event(payload=0))[:-2]
    got, _ = heard(AUTH, text + r'{"b\u0000": "\ud800"}}')
    assert got[1:] == [event(payload={"b\ufffd": "\ufffd"}), 1000]


@pytest.mark.parametrize("bad", ["[" * 100 + "]" * 100, '{"a": NaN}', "no JSON", '{"a": 1e999}', ""])
def test_a_message_that_cannot_be_stored_is_dropped_with_one_line(bad: str, caplog: pytest.LogCaptureFixture) -> None:
    """A closed connection would be opened again, and the message sent again."""
    got, sent = heard(AUTH, bad, bad, event())
    assert got[1:] == [event(), 1000]
    assert sent == []
    assert len([each for each in caplog.records if "a message was dropped" in each.getMessage()]) == 1


TASK_RUN = {"prefect.resource.id": f"prefect.task-run.{OTHER}"}
OF_RUN = [{"prefect.resource.id": RUN, "prefect.resource.role": "flow-run"}]
OF_OTHER = [{"prefect.resource.id": f"prefect.flow-run.{OTHER}", "prefect.resource.role": "flow-run"}]


@pytest.mark.parametrize(
    "good",
    [
        event(related=[*OF_RUN, {"prefect.resource.id": "prefect.tag.a"}]),
        event("prefect.flow-run.heartbeat", resource={"prefect.resource.id": RUN}),
        # Whose it is: tests/contract/test_upstream_prefect_server.py
        event("prefect.task-run.Running", resource=TASK_RUN, related=OF_RUN, payload={"task_run": {"name": "a"}}),
    ],
)
def test_what_a_flow_run_tells_of_itself_passes(good: dict[str, Any]) -> None:
    assert heard(AUTH, good)[0][1:] == [good, 1000]


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        # A driver that hears it ends its run without asking.
        (event("prefect.flow-run.Cancelling", resource={"prefect.resource.id": RUN}), "does not send"),
        (event("prefect.deployment.created"), "does not send"),
        (event("prefect.flow-run.heartbeat", resource={"prefect.resource.id": f"prefect.flow-run.{OTHER}"}), "not of"),
        (event(related=OF_OTHER), "is not of work pool a pool"),
        (event(resource=TASK_RUN), "is not of work pool a pool"),
        (event(related=[{"prefect.resource.id": f"prefect.flow-run.{OTHER.replace('-', '')}"}]), "is not a run"),
        # A driver logs it.
        (event("x", resource={"prefect.resource.id": "prefect.flow-run.x\n[forged]"}), "control characters"),
        (event("x\x1b[31m"), "control characters"),
        (event("prefect.task-run.Failed", resource=TASK_RUN, related=OF_OTHER, payload={"task_run": {}}), "not of"),
        (event("prefect.task-run.Failed", related=OF_RUN, payload={"task_run": {}}), "is a task run"),
        (
            event("prefect.task-run.Failed", resource=TASK_RUN, payload={"task_run": {"flow_run_id": OTHER}}),
            "ids of its",
        ),
        (event(resource=None), "prefect.resource.id"),
        (event(related={"a": 1}), "are a list"),
        ([event()], "JSON object"),
        (7, "JSON object"),
    ],
)
def test_what_it_may_not_tell_is_dropped(bad: Any, sentence: str, caplog: pytest.LogCaptureFixture) -> None:
    assert heard(AUTH, json.dumps(bad), event())[0][1:] == [event(), 1000]
    assert sentence in caplog.text


def test_the_platforms_own_messages_pass_as_they_are() -> None:
    deep = "[" * 100 + "]" * 100
    assert heard(AUTH, deep, headers={b"authorization": BASIC})[0][1] == json.loads(deep)


def asked(
    body: bytes, path: str = f"/api/flow_runs/{RUN[-36:]}/set_state", *, mark: bytes | None = b"a+pool"
) -> tuple[list[Any], list[Message]]:
    """Return the body and the length that Prefect's application gets of a request in two pieces, and the answer."""
    got: list[Any] = []
    sent: list[Message] = []
    half = len(body) // 2
    waiting: list[Message] = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:]},
        {"type": "http.disconnect"},
    ]

    async def application(scope: Scope, receive: Receive, _send: Send) -> None:
        whole = b""
        while (message := await receive())["type"] == "http.request":
            whole += message["body"]
        got.extend([whole, int(dict(scope["headers"])[b"content-length"])])

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-length", str(len(body)).encode()), *([(MARK, mark)] if mark is not None else [])]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(FlowRunCalls(application, PASSWORD, Owners(of_media, no_flow_runs))(scope, receive, send))
    return got, sent


def test_a_body_is_passed_on_as_it_was_checked() -> None:
    got, _ = asked(b'{"state": {"type": "RUNNING", "name": "Suspended", "name": "Running"}, "a": "\\u0000"}')
    assert json.loads(got[0]) == {"state": {"type": "RUNNING", "name": "Running"}, "a": "\ufffd"}
    assert b'"Suspended"' not in got[0]
    assert got[1] == len(got[0])
    assert asked(b"")[0] == [b"", 0]


@pytest.mark.parametrize(
    ("body", "path", "status", "sentence"),
    [
        (b'{"state": {"type": "RUNNING", "name": "Suspended"}}', None, 422, "is not named Suspended"),
        (b'{"data": ' + b"[" * 260 + b"]" * 260 + b"}", None, 422, "nested more than 64 levels"),
        (b"{}", f"/api/flow_runs/{OTHER}/set_state", 403, "is not of work pool a pool"),
        (b'{"state": {"type": "RUNNING"}}', f"/api/deployments/{RUN[-36:]}/create_flow_run", 422, "SCHEDULED, PENDING"),
        (b'{"empirical_policy": []}', f"/api/flow_runs/{RUN[-36:]}", 422, "must be an object"),
    ],
)
def test_a_refused_request_is_answered_with_a_sentence(
    body: bytes, path: str | None, status: int, sentence: str
) -> None:
    got, sent = asked(body, path) if path else asked(body)
    assert got == []
    assert sent[0]["status"] == status
    assert sentence in json.loads(sent[1]["body"])["detail"]


def test_an_idempotency_key_is_of_the_team() -> None:
    """The server's are those of a flow, which teams share: one got the other's run, and took its key."""
    path = f"/api/deployments/{RUN[-36:]}/create_flow_run"
    got, _ = asked(b'{"idempotency_key": "daily-2026-11-28"}', path)
    assert json.loads(got[0]) == {"idempotency_key": "a pool: daily-2026-11-28"}
    assert json.loads(asked(b'{"idempotency_key": null}', path)[0][0]) == {"idempotency_key": None}


def test_the_platforms_own_requests_pass_as_they_are() -> None:
    deep = b"[" * 260 + b"]" * 260
    assert asked(deep, f"/api/flow_runs/{OTHER}/set_state", mark=None)[0] == [deep, len(deep)]


def test_an_owner_that_cannot_be_read_is_asked_again_later() -> None:
    async def fails(_kind: str, _id: str) -> str:
        raise ConnectionRefusedError

    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def application(*_: Any) -> None:
        raise AssertionError("it was asked")

    scope = {"type": "http", "method": "POST", "path": f"/api/flow_runs/{OTHER}/set_state", "headers": [(MARK, b"p")]}
    asyncio.run(FlowRunCalls(application, PASSWORD, Owners(fails, no_flow_runs))(scope, receive, send))
    assert sent[0]["status"] == 503
