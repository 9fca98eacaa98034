"""The process of a flow, `python -m tidepool.operate.engine`: Prefect's engine, which reports the end of its run.

In a driver pod it is a child of `tidepool.operate.flow_run`, forked when that had imported what both need.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from contextlib import suppress
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tidepool.compute.clusters.kubernetes import early

if TYPE_CHECKING:
    from tidepool.operate.forked import Orders

# As `ps` and `top` show it, at most 15 characters: its command line may be that of the process that it was forked from.
NAME = "tidepool-engine"
# What is imported until the flow begins.
_IMPORTED = (
    "prefect.engine",
    "prefect.flow_engine",
    "pydantic.v1",  # by each flow's decorator
    "tidepool.report.run_report",
    "tidepool.upstream.prefect",
)
# A server that has just come back is busy: until it answers the last websocket, Prefect's event worker holds the exit.
_EXIT_SECONDS = 30.0


def prepare() -> None:
    """Import what the engine needs, before it is known which run it executes."""
    for module in _IMPORTED:
        import_module(module)


def begin(orders: Orders) -> None:
    """Execute the flow run of these orders in this process, which has been forked before they were known."""
    from prefect.context import refresh_global_settings_context

    orders.take(__file__)
    refresh_global_settings_context()
    main()


def main() -> None:
    """Execute the flow run of this environment's PREFECT__FLOW_RUN_ID.

    Once the run has ended, its process sends what is left of its events for 30 s, and no longer.
    """
    from tidepool.report import run_report
    from tidepool.report.own_errors import log_as_sentences

    with suppress(OSError):
        Path("/proc/self/comm").write_text(NAME)
    run_report.install()
    log_as_sentences()
    # It was imported for that, and is run as it is by `python -m prefect.engine`.
    sys.modules.pop("prefect.engine", None)
    status = 1
    try:
        runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        _exit_soon(status)
        if asked := early.asked():
            discard(asked)


def discard(asked: early.Early) -> None:
    """Delete the Dask cluster that was asked for early, if no flow has taken it, and print that for the pod's log."""
    try:
        words = (name := asked.discard()) and f"Dask cluster {name} deleted: it was asked for early, and not used"
    except (OSError, HTTPException) as error:
        words = f"the Dask cluster that was asked for early was not deleted ({error}); Kubernetes does, with the Job"
    if words:
        sys.stderr.write(f"{words}\n")


def _exit_soon(status: int) -> None:
    def end() -> None:
        words = "its process is ended, and events that it has not sent are lost"
        sys.stderr.write(f"the run has ended {_EXIT_SECONDS:g} s ago: {words}\n")
        sys.stderr.flush()
        os._exit(status)

    timer = threading.Timer(_EXIT_SECONDS, end)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
