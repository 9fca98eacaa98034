"""The JSON that flow runs send to the Prefect server, in requests and by websocket: read, bounded, and made harmless.

The server stores most of what it gets. What it cannot store, or cannot write out again, fails the calls of others: a
batch with the events of all teams, or each list that has the run in it.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from http import HTTPStatus
from typing import Any

from tidepool.errors import TidepoolError

# Prefect serializes at most 254 levels, and adds some of its own.
MOST_LEVELS = 64
MOST_DIGITS = 64
# A state is in each list of flow runs: 200 of them, in the server's memory and the operator's.
MOST_STATE_BYTES = 256 << 10
MOST_NAME_BYTES = 1024
MOST_LABELS = 64
MOST_LABEL_BYTES = 255
MOST_RETRIES = 1000
MOST_RETRY_SECONDS = 7 * 24 * 3600

# The operator and Prefect decide by name about a run that has not ended. Prefect's own names of such states.
STATE_NAMES = {
    "SCHEDULED": {"Scheduled", "Late", "AwaitingRetry", "AwaitingConcurrencySlot"},
    "PENDING": {"Pending", "Submitting", "InfrastructurePending", "NotReady"},
    "RUNNING": {"Running", "Retrying"},
    "PAUSED": {"Paused", "Suspended"},
    "CANCELLING": {"Cancelling"},
}
# An ended run's state may have any other name: `return Completed(name="NothingToDo")`.
_FINAL_NAMES = {"COMPLETED": "Completed", "FAILED": "Failed", "CRASHED": "Crashed", "CANCELLED": "Cancelled"}
_POLICY = {
    "max_retries": MOST_RETRIES,
    "retry_delay_seconds": MOST_RETRY_SECONDS,
    "retries": MOST_RETRIES,
    "retry_delay": MOST_RETRY_SECONDS,
}
_POLICY_OTHERS = {"pause_keys", "resuming", "retry_type"}
_MOST_PAUSES = 1000
# PostgreSQL stores no NUL, and no encoding has half of a surrogate pair.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
# They begin a new line in a log or on a terminal, or control it.
_CONTROLS = {"Cc", "Zl", "Zp"}


class BodyError(TidepoolError):
    """A body or message of a flow run that the server must not get.

    Attributes:
        status: Of the answer.
    """

    status = HTTPStatus.UNPROCESSABLE_ENTITY


def read(body: bytes | str) -> Any:
    """Return the JSON of a body or message; characters that no database stores are replaced by U+FFFD.

    Raises:
        BodyError: it is not JSON in UTF-8, or nested too deeply, or has a number that other parsers do not read.
    """
    try:
        text = body.decode() if isinstance(body, bytes) else body
        content = json.loads(text, parse_constant=_no_number, parse_int=_integer, parse_float=_float)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise BodyError(f"the body is not JSON in UTF-8: {error}") from None
    return _storable(content, MOST_LEVELS)


def check(path: str, body: bytes) -> Any:
    """Return the JSON of a request's body, as the server may get it.

    Args:
        path: The request's path.
        body: In bytes, not empty.

    Raises:
        BodyError: see `read`; or a name, state, label or retry policy in it is not one that a flow run may set.
    """
    if path.endswith("/set_state") and len(body) > MOST_STATE_BYTES:
        raise BodyError(f"a state has {len(body)} bytes; at most {MOST_STATE_BYTES} are accepted")
    content = read(body)
    if isinstance(content, dict):
        _check_name("name", content.get("name"))
        _check_state(content.get("state"))
        if path.endswith("/create_flow_run"):
            _check_first_state(content.get("state"))
        # Prefect's engine retries tasks, and the server only keeps their policy.
        if not path.startswith("/api/task_runs/"):
            _check_policy(content.get("empirical_policy"))
        _check_labels(content if path.endswith("/labels") else content.get("labels"))
    return content


def _storable(value: Any, levels: int) -> Any:
    if isinstance(value, str):
        return _UNSTORABLE.sub(_REPLACEMENT, value)
    if not isinstance(value, (dict, list)):
        return value
    if not levels:
        raise _too_deep()
    if isinstance(value, list):
        return [_storable(each, levels - 1) for each in value]
    return {_UNSTORABLE.sub(_REPLACEMENT, key): _storable(each, levels - 1) for key, each in value.items()}


def _too_deep() -> BodyError:
    return BodyError(f"the body is nested more than {MOST_LEVELS} levels deep")


def _no_number(text: str) -> Any:
    raise BodyError(f"{text} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise BodyError(f"a number has {len(text)} characters; at most {MOST_DIGITS} are accepted")
    return int(text)


def _float(text: str) -> float:
    if len(text) > MOST_DIGITS:
        raise BodyError(f"a number has {len(text)} characters; at most {MOST_DIGITS} are accepted")
    if not math.isfinite(value := float(text)):
        raise BodyError(f"the number {text} is too large")
    return value


def _check_name(key: str, name: object) -> None:
    if not isinstance(name, str):
        return  # null, or the server refuses it
    if len(name.encode()) > MOST_NAME_BYTES:
        raise BodyError(f"{key} has more than {MOST_NAME_BYTES} bytes")
    if any(unicodedata.category(each) in _CONTROLS for each in name):
        raise BodyError(f"{key} {json.dumps(name)} has a line break or another control character")


def _check_state(state: object) -> None:
    if not isinstance(state, dict):
        return
    kind, name = state.get("type"), state.get("name")
    _check_name("the state's name", name)
    if not isinstance(kind, str) or not isinstance(name, str) or not name:
        return  # null or an empty one is the type's own
    if kind in STATE_NAMES:
        allowed = name in STATE_NAMES[kind]
    else:
        others = set().union(*STATE_NAMES.values(), _FINAL_NAMES.values()) - {_FINAL_NAMES.get(kind)}
        allowed = name not in others
    if not allowed:
        accepted = ", ".join(sorted(STATE_NAMES.get(kind, ()))) or "one that is not of another type"
        raise BodyError(f"a state of type {kind} is not named {name} in a flow run; accepted: {accepted}")


def _check_first_state(state: object) -> None:
    kind = state.get("type") if isinstance(state, dict) else None
    if kind not in {None, "SCHEDULED", "PENDING"}:  # the run would have no Job
        raise BodyError(f"a run of a deployment is created {json.dumps(kind)}; accepted: SCHEDULED, PENDING")


def _check_policy(policy: object) -> None:
    if policy is None:
        return
    if not isinstance(policy, dict):
        raise BodyError("empirical_policy must be an object")
    if unknown := policy.keys() - _POLICY.keys() - _POLICY_OTHERS:
        raise BodyError(f"unknown key in empirical_policy: {', '.join(sorted(unknown))}")
    for key, most in _POLICY.items():
        value = policy.get(key)
        # A text would become a number in the server.
        if value is not None and (not isinstance(value, (int, float)) or not 0 <= value <= most):
            raise BodyError(f"empirical_policy.{key} must be a number from 0 to {most}")
    pauses = policy.get("pause_keys") or []
    if not isinstance(pauses, list) or len(pauses) > _MOST_PAUSES:
        raise BodyError(f"empirical_policy.pause_keys must be a list of at most {_MOST_PAUSES} texts")


def _check_labels(labels: object) -> None:
    if not isinstance(labels, dict):
        return
    if len(labels) > MOST_LABELS:
        raise BodyError(f"{len(labels)} labels; at most {MOST_LABELS} are accepted")
    for key, value in labels.items():
        short = all(len(each.encode()) <= MOST_LABEL_BYTES for each in (key, value) if isinstance(each, str))
        if not short or isinstance(value, (dict, list)):
            raise BodyError(
                f"a label and its value may have {MOST_LABEL_BYTES} bytes each, and the value is not nested"
            )
