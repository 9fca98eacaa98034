"""Errors of the library in the log of a run."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tidepool.errors import InputError
from tidepool.report import own_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def fails() -> None:
    raise InputError("line 3: no number")


def _raise(error: Exception) -> None:
    raise error


def fails_from_another() -> None:
    raise InputError("line 3: no number") from ValueError("x7")


def logged(call: Callable[[], None], text: str, sentences: logging.Filter | None = None) -> Any:
    """Return the line that Prefect's engine logs of what a call raises, as the filter leaves it, if it does."""
    try:
        call()
    except InputError as error:
        arguments = (error,) if "%r" in text else ()
        record = logging.LogRecord(
            "prefect.flow_runs", logging.ERROR, "flow_engine.py", 1, text, arguments, sys.exc_info()
        )
        return record if (sentences or own_errors._Sentences()).filter(record) else None
    raise AssertionError("nothing was raised")


def test_the_sentence_and_the_flows_line_are_in_place_of_the_traceback() -> None:
    record = logged(fails, "Encountered exception during execution: %r")
    line = fails.__code__.co_firstlineno + 1
    place = f"{os.path.relpath(__file__)}:{line}"
    assert record.getMessage() == f"Encountered exception during execution: line 3: no number ({place})"
    assert record.exc_info is None


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (fails, "An error was encountered while running hook 'tell'"),
        (fails_from_another, "Encountered exception during execution: %r"),
    ],
)
def test_a_traceback_that_says_more_stays(call: Callable[[], None], text: str) -> None:
    assert logged(call, text).exc_info is not None


def test_the_second_line_about_an_error_is_left_out() -> None:
    second = "Engine execution exited with unexpected exception"
    assert logged(fails, second).exc_info is not None  # nothing else has told it

    error, other = InputError("line 3: no number"), InputError("line 3: no number")
    engines = own_errors._Sentences()
    logged(partial(_raise, error), "Encountered exception during execution: %r", engines)
    assert logged(partial(_raise, error), second, engines) is None
    logged(partial(_raise, error), "Encountered exception during execution: %r", engines)
    assert logged(partial(_raise, other), second, engines).exc_info is not None


def test_a_working_directory_that_is_gone_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert __file__ in logged(fails, "Encountered exception during execution: %r").getMessage()
