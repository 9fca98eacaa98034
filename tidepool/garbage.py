"""Runs a module with the image's settings of the garbage collector: `python -m tidepool.garbage MODULE ARGUMENTS`.

At Python's own a server that records task runs walks through all of its objects about every second, for 0.4 s in which
it answers nobody: a quarter of its CPU time (docs/decisions/0069-*.md).
"""

from __future__ import annotations

import gc
import runpy
import sys

# Container objects made, less those freed, before a collection of the youngest; collections of each age before one of
# the next. Python 3.11 has 700, 10, 10. The Dockerfile writes the same into app.pth.
THRESHOLDS = (50_000, 20, 20)


def collect_less() -> None:
    """Sets the thresholds for this process."""
    gc.set_threshold(*THRESHOLDS)


def main() -> None:
    """Runs a module as `python -m` does, with what follows its name as arguments."""
    collect_less()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
