from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from tidepool import notify

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Receiver

# Apprise's mail plug-in tries to import a module that Python 3.13 removed.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")

log = logging.getLogger("test.notify")


def test_a_message_arrives(receiver: Receiver, targets: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    targets(receiver.target)
    with caplog.at_level(logging.INFO, "test.notify"):
        assert notify.send(log, "all well", "1. one\n2. two", "success") == 1
    assert [(got["title"], got["message"], got["type"]) for got in receiver.got] == [
        ("all well", "1. one\n2. two", "success")
    ]
    assert "notified target 1 of 1 in TIDEPOOL_NOTIFY_URLS: 'all well'" in caplog.text
    assert "s3cret" not in caplog.text


def test_without_targets_no_notification_is_sent(
    targets: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    targets()
    with caplog.at_level(logging.INFO, "test.notify"):
        assert notify.send(log, "all well", "") == 0
    assert "no notification sent ('all well'): TIDEPOOL_NOTIFY_URLS is empty" in caplog.text


def test_a_failing_target_does_not_prevent_the_others(
    receiver: Receiver, targets: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    targets("json://127.0.0.1:9/s3cret-path", "not a target", "slack://s3cret", receiver.target)
    with caplog.at_level(logging.INFO, "test.notify"):
        assert notify.send(log, "broken", "why", "failure") == 1
    assert len(receiver.got) == 1
    lines = [record.getMessage() for record in caplog.records if record.name == "test.notify"]
    setting = "6 in TIDEPOOL_NOTIFY_URLS"
    assert lines[0] == f"could not notify target 1 of {setting} (JSON did not accept it): 'broken'; the run continues"
    assert f"target 5 of {setting} (not an Apprise URL, such as slack://TokenA/TokenB/TokenC)" in lines[4]
    assert "s3cret" not in "".join(lines)


def test_a_target_that_answers_with_an_error_is_logged(
    receiver: Receiver, targets: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answer = 500
    targets(receiver.target)
    with caplog.at_level(logging.ERROR, "test.notify"):
        assert notify.send(log, "broken", "why") == 0
    assert "JSON did not accept it" in caplog.text


def test_a_long_message_is_cut(receiver: Receiver, targets: Callable[..., None]) -> None:
    targets(receiver.target)
    notify.send(log, "long", "x" * 10_000)
    assert receiver.got[0]["message"] == "x" * 2500 + " …"
