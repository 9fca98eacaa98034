"""What the Prefect server gets of the JSON that flow runs send."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidepool.operate import bodies
from tidepool.operate.bodies import BodyError

RUN = "/api/flow_runs/00000000-0000-0000-0000-000000000007"
SET_STATE = f"{RUN}/set_state"


def nested(levels: int, kind: str = "[]") -> str:
    begin, end = ("[", "]") if kind == "[]" else ('{"a":', "}")
    return begin * levels + "1" + end * levels


@pytest.mark.parametrize("kind", ["[]", "{}"])
def test_nesting_is_bounded_in_every_part(kind: str) -> None:
    assert json.dumps(bodies.read(nested(64, kind)), separators=(",", ":")) == nested(64, kind)
    for levels in (65, 260, 200_000):
        with pytest.raises(BodyError, match="nested more than 64 levels"):
            bodies.read(nested(levels, kind))
    with pytest.raises(BodyError, match="levels"):
        bodies.check(SET_STATE, f'{{"state": {{"type": "RUNNING", "data": {nested(260, kind)}}}}}'.encode())


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (r'"a\u0000b"', "a\ufffdb"),
        ('"a\\ud800b"', "a\ufffdb"),
        ('"a\\udc00\\ud800b"', "a\ufffd\ufffdb"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        (r'"\\u0000"', r"\u0000"),
        (r'{"a\u0000": [{"\u0000": "\u0000"}]}', {"a\ufffd": [{"\ufffd": "\ufffd"}]}),
    ],
)
def test_a_text_that_no_database_stores_is_replaced(text: str, read: Any) -> None:
    assert bodies.read(text) == read
    assert "\0" not in json.dumps(bodies.read(text.encode()))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("NaN", "NaN is not a JSON number"),
        ("[-Infinity]", "Infinity is not a JSON number"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ("9" * 65, "a number has 65 characters"),
        ("9" * 5000, "a number has 5000 characters"),
        ("0." + "0" * 100, "a number has 102 characters"),
        ("", "not JSON in UTF-8"),
        ("{'a': 1}", "not JSON in UTF-8"),
        ("[1] [2]", "not JSON in UTF-8"),
    ],
)
def test_what_is_not_plain_json_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(BodyError, match=sentence):
        bodies.read(text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_another_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(BodyError, match="not JSON in UTF-8"):
        bodies.check(RUN, '{"name": "x"}'.encode(encoding))


def test_half_of_a_surrogate_pair_in_utf_8_is_refused() -> None:
    with pytest.raises(BodyError, match="not JSON in UTF-8"):
        bodies.check(RUN, '{"name": "\ud800"}'.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "body", [b"[]", b"null", b"1", b'"x"', b'{"state": []}', b'{"state": {"type": [], "name": 1}}']
)
def test_a_body_of_another_shape_is_left_to_the_server(body: bytes) -> None:
    assert bodies.check(SET_STATE, body) == json.loads(body)


@pytest.mark.parametrize("name", ["a\nb", "a\r", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u2029"])
def test_a_name_is_one_line(name: str) -> None:
    with pytest.raises(BodyError, match="control character"):
        bodies.check(RUN, json.dumps({"name": name}).encode())
    with pytest.raises(BodyError, match="control character"):
        bodies.check(SET_STATE, json.dumps({"state": {"type": "COMPLETED", "name": name}}).encode())


def test_a_name_is_bounded_in_bytes() -> None:
    assert bodies.check(RUN, json.dumps({"name": "ü" * 512}).encode())
    with pytest.raises(BodyError, match="name has more than 1024 bytes"):
        bodies.check(RUN, json.dumps({"name": "ü" * 513}).encode())


def test_a_state_is_bounded_in_bytes() -> None:
    def body(size: int) -> bytes:
        text = json.dumps({"state": {"type": "FAILED", "message": "üü"}}, ensure_ascii=False).encode()
        return text + b" " * (size - len(text))

    assert bodies.check(SET_STATE, body(256 << 10))
    with pytest.raises(BodyError, match="a state has 262145 bytes"):
        bodies.check(SET_STATE, body((256 << 10) + 1))
    assert bodies.check("/api/logs/", body((256 << 10) + 1))


@pytest.mark.parametrize(
    ("kind", "name", "allowed"),
    [
        ("RUNNING", "Running", True),
        ("RUNNING", "Retrying", True),
        ("RUNNING", None, True),
        ("RUNNING", "Suspended", False),
        ("RUNNING", "Training", False),
        ("RUNNING", "running", False),
        ("PAUSED", "Suspended", True),
        ("PENDING", "Suspended", False),
        ("PENDING", "InfrastructureWaiting", False),  # the operator's own
        ("PENDING", "NotReady", True),
        ("SCHEDULED", "AwaitingRetry", True),
        ("SCHEDULED", "Skipped", False),
        ("CANCELLING", "Cancelling", True),
        ("CANCELLED", "Cancelling", False),
        ("COMPLETED", "NothingToDo", True),
        ("COMPLETED", "Completed", True),
        ("COMPLETED", "Failed", False),
        ("COMPLETED", "Suspended", False),
        ("FAILED", "TimedOut", True),
        ("CRASHED", "Running", False),
    ],
)
def test_a_state_is_named_as_prefect_names_its_type(kind: str, name: str | None, *, allowed: bool) -> None:
    body = json.dumps({"state": {"type": kind, "name": name}, "force": False}).encode()
    if allowed:
        assert bodies.check(SET_STATE, body) == json.loads(body)
        return
    with pytest.raises(BodyError, match=f"type {kind} is not named {name}"):
        bodies.check(SET_STATE, body)


def test_prefects_own_states_pass() -> None:
    from prefect import states

    made: list[Any] = [
        states.Scheduled(), states.Late(), states.AwaitingRetry(), states.AwaitingConcurrencySlot(), states.Pending(),
        states.Submitting(), states.InfrastructurePending(), states.Running(), states.Retrying(), states.Paused(),
        states.Suspended(), states.Cancelling(), states.Cancelled(), states.Completed(), states.Failed(),
        states.Crashed(), states.Pending(name="NotReady"), states.Failed(name="TimedOut"),
    ]  # fmt: skip
    for each in made:
        body = {"state": states.to_state_create(each).model_dump(mode="json"), "force": False}
        assert bodies.check(SET_STATE, json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ({"retries": 1001}, "retries must be a number from 0 to 1000"),
        ({"retries": -1}, "retries must be a number"),
        ({"retries": "9999999"}, "retries must be a number"),
        ({"max_retries": 1e9}, "max_retries must be"),
        ({"retry_delay": 604801}, "retry_delay must be a number from 0 to 604800"),
        ({"mine": 1}, "unknown key in empirical_policy: mine"),
        ({"pause_keys": ["x"] * 1001}, "pause_keys must be a list of at most 1000"),
        ({"pause_keys": {}, "retries": 1}, None),
        ({"retries": 1000, "retry_delay": 604800, "pause_keys": ["a"], "resuming": False, "retry_type": None}, None),
    ],
)
def test_retries_are_bounded(policy: dict[str, Any], sentence: str | None) -> None:
    body = json.dumps({"empirical_policy": policy}).encode()
    if sentence is None:
        assert bodies.check(RUN, body)
        return
    with pytest.raises(BodyError, match=sentence):
        bodies.check(RUN, body)


def test_prefects_own_policy_passes() -> None:
    from prefect.client.schemas.objects import FlowRunPolicy, TaskRunPolicy

    policy = FlowRunPolicy(retries=3, retry_delay=10).model_dump(mode="json")
    assert bodies.check(RUN, json.dumps({"empirical_policy": policy}).encode())
    policy = TaskRunPolicy(retries=3, retry_delay=[1, 2], retry_jitter_factor=0.5).model_dump(mode="json")
    assert bodies.check("/api/task_runs/", json.dumps({"empirical_policy": policy}).encode())


@pytest.mark.parametrize(
    "labels",
    [{"a": "ü" * 128}, {"ü" * 128: 1}, {"a": ["x"]}, {"a": {}}, {str(number): 1 for number in range(65)}],
)
def test_labels_are_few_and_short(labels: dict[str, Any]) -> None:
    for path, body in ((f"{RUN}/labels", labels), ("/api/deployments/x/create_flow_run", {"labels": labels})):
        with pytest.raises(BodyError, match="label"):
            bodies.check(path, json.dumps(body).encode())
    assert bodies.check(f"{RUN}/labels", b'{"a": "00-ab-cd-01", "b": true, "c": 1.5, "d": null}')
