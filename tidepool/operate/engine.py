"""The process of a flow, `python -m tidepool.operate.engine`: Prefect's engine, which reports the end of its run."""

from __future__ import annotations

import os
import runpy
import sys
import threading

# A server that has just come back is busy: until it answers the last websocket, Prefect's event worker holds the exit.
_EXIT_SECONDS = 30.0


def main() -> None:
    """Execute the flow run of this environment's PREFECT__FLOW_RUN_ID.

    Once the run has ended, its process sends what is left of its events for 30 s, and no longer.
    """
    from tidepool.report import run_report
    from tidepool.report.own_errors import log_as_sentences

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
