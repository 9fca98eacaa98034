"""Prefect's server as it is, with a garbage collector that walks through it less often.

`python -m tidepool.operate.prefect_server start` is `prefect server start`, in this process.

While task runs wait to be recorded, the server holds their events as some hundred thousand objects. At Python's own
thresholds it walks through all of them about every second, for 0.4 s in which it answers nobody: a quarter of its CPU
time (docs/decisions/0069-*.md).
"""

from __future__ import annotations

import gc
import runpy
import sys

# Container objects made, less those freed, before a collection of the youngest; collections of each age before one of
# the next. Python 3.11 has 700, 10, 10.
THRESHOLDS = (20_000, 20, 20)


def main() -> None:
    """Runs `prefect server` with this process's arguments."""
    gc.set_threshold(*THRESHOLDS)
    sys.argv[:1] = ["prefect", "server"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
