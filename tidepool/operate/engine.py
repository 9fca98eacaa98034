"""The process of a flow, `python -m tidepool.operate.engine`: Prefect's engine, which reports the end of its run."""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    """Execute the flow run of this environment's PREFECT__FLOW_RUN_ID."""
    from tidepool.report import run_report

    run_report.install()
    # It was imported for that, and is run as it is by `python -m prefect.engine`.
    sys.modules.pop("prefect.engine", None)
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
