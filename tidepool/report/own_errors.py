"""The library's own errors in the log of a run: the sentence that each is, in place of a traceback."""

from __future__ import annotations

import logging
import os
import sysconfig
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path

from tidepool.errors import TidepoolError

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
_SECOND = "Engine execution exited with unexpected exception"  # also when a flow has just failed
# Prefect's modules that log the exception of a run.
_ENGINES = {"flow_engine", "task_engine"}


class _Sentences(logging.Filter):
    """Replaces the traceback of an error of the library by the flow's line that it comes from.

    It stays where it says more: of an error that has another as its cause, that comes from no line of the flow, or that
    the line itself does not have. The flow engine's second line about the error that it has just logged is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: BaseException | None = None  # by the flow engine, last

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is logged."""
        error = record.exc_info[1] if record.exc_info else None
        if record.module == "flow_engine" and error is not None:
            known, self._told = error is self._told, error
            if known and record.msg == _SECOND:
                self._told = None
                return False
        if record.module in _ENGINES and isinstance(error, TidepoolError) and error.__cause__ is None:
            said, place = record.getMessage(), _place(error)
            if place and repr(error) in said:
                record.msg, record.args = f"{said.replace(repr(error), str(error))} ({place})", ()
                record.exc_info = record.exc_text = None
        return True


@cache
def _not_the_flows() -> tuple[str, ...]:
    """Return the beginnings of files that belong to Python, to an installed package or to the library."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return ("<", *(f"{folder}{os.sep}" for folder in [*folders, str(Path(__file__).parents[1])]))


def _place(error: BaseException) -> str:
    """Return the last line of the traceback that belongs to no installed package, nor to the library; or nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_not_the_flows())]
    if not own:
        return ""
    file = own[-1].filename
    with suppress(OSError, ValueError):  # the working directory may be gone
        file = os.path.relpath(file)
    return f"{file}:{own[-1].lineno}"


@cache
def log_as_sentences() -> None:
    """Have this process log errors of the library without their traceback, unless PREFECT_LOGGING_LEVEL is DEBUG."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not logger.isEnabledFor(logging.DEBUG):
            logger.addFilter(_Sentences())
