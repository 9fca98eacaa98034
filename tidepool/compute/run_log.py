"""The logger of the current run, and which lines of mapped task runs it gets."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from functools import cache
from typing import Any
from uuid import UUID

from prefect.exceptions import MissingContextError
from prefect.logging import get_logger, get_run_logger
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from tidepool.report.own_errors import log_as_sentences
from tidepool.settings import settings

_log = get_logger("tidepool.compute")

mapped: ContextVar[bool] = ContextVar("mapped", default=False)
"""The current code belongs to a mapped task run."""

# The module whose lines about a task run are Prefect's own; those of a flow's author come from the author's modules.
_ENGINE = "task_engine"


def run_log() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Return the logger of the current task run or flow run, or the platform's own outside of one.

    It works before the flow's context exists, when a cluster that is asked for early begins to start.
    """
    try:
        return get_run_logger()
    except MissingContextError:
        run = flow_run.id
        # Its name is known to the server only; the begin of its id finds it as well.
        return flow_run_logger(flow_run_id=UUID(run), flow_run_name=run[:8]) if run else _log


@cache
def print_plainly() -> None:
    """Have this process print its log lines as they are, where no terminal shows Prefect's colours.

    Prefect's handler lays out each line for a terminal: a twelfth of the CPU time of a worker with no-op tasks.
    """
    if get_current_settings().logging.markup:
        return
    loggers = [logging.root, *(each for each in logging.root.manager.loggerDict.values())]
    for logger in loggers:
        for handler in list(getattr(logger, "handlers", ())):
            console: Any = getattr(handler, "console", None)
            if not isinstance(handler, PrefectConsoleHandler) or console.is_terminal:
                continue
            plain = logging.StreamHandler(handler.stream)
            plain.setLevel(handler.level)
            plain.setFormatter(handler.formatter)
            for each in handler.filters:
                plain.addFilter(each)
            logger.removeHandler(handler)  # type: ignore[union-attr] # what has handlers is a logger
            logger.addHandler(plain)  # type: ignore[union-attr]


class _OwnLines(logging.Filter):
    """Leaves out Prefect's own lines about mapped task runs below the level of the settings."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is logged."""
        if not mapped.get() or record.module != _ENGINE:
            return True
        return record.levelno >= logging.getLevelNamesMapping()[settings().compute.tasks_log_level]


@cache
def log_for_people() -> None:
    """Have this process log Prefect's own lines about runs as a person needs them.

    Those about mapped task runs from `TIDEPOOL_COMPUTE_TASKS_LOG_LEVEL` on; errors of the library as sentences.
    """
    get_logger("prefect.task_runs").addFilter(_OwnLines())
    log_as_sentences()
