"""The library's own errors in the log of a run: the sentence that each is, in place of a traceback."""

from __future__ import annotations

import logging
import os
import sysconfig
import traceback
from functools import cache
from pathlib import Path

from tidepool.errors import TidepoolError

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
# Prefect's modules that log the exception of a run.
_ENGINES = {"flow_engine", "task_engine"}
_INSTALLED = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), str(Path(__file__).parents[1]))


class _Sentences(logging.Filter):
    """Replaces the traceback of an error of the library by the flow's line that it comes from."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True: the line is logged."""
        error = record.exc_info[1] if record.exc_info else None
        if record.module in _ENGINES and isinstance(error, TidepoolError):
            record.msg, record.args = f"{record.getMessage().replace(repr(error), str(error))}{_place(error)}", ()
            record.exc_info = record.exc_text = None
        return True


def _place(error: BaseException) -> str:
    """Return the last line of the traceback that belongs to no installed package, nor to the library."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_INSTALLED)]
    return f" ({os.path.relpath(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""


@cache
def log_as_sentences() -> None:
    """Have this process log errors of the library without their traceback, unless PREFECT_LOGGING_LEVEL is DEBUG."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not logger.isEnabledFor(logging.DEBUG):
            logger.addFilter(_Sentences())
