"""The logger of the current run."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from prefect.exceptions import MissingContextError
from prefect.logging import get_logger, get_run_logger
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run

if TYPE_CHECKING:
    import logging

_log = get_logger("tidepool.compute")


def run_log() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Return the logger of the current task run or flow run, or the platform's own outside of one.

    It works before the flow's context exists, when a cluster that is asked for early begins to start.
    """
    try:
        return get_run_logger()
    except MissingContextError:
        return flow_run_logger(flow_run_id=UUID(flow_run.id)) if flow_run.id else _log
