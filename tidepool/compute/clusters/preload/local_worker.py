"""Dask preload of a worker process on this machine: it runs at a lower priority than everything else there.

`breakpoint()` in it says what to do instead.

The workers take all cores that there are. The Prefect server beside them would fall behind, and they would then have to
wait for it with a core idle (docs/decisions/0073-*.md).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tidepool.compute.worker.breakpoints import refuse_breakpoints

if TYPE_CHECKING:
    from distributed import Worker

# At niceness +2 a process gets two thirds of the time of one at 0, where there is not enough for both: then the server
# keeps up with two workers on two cores. At 5 it would be level with them all the time, and they a quarter slower.
NICENESS = 2


def dask_setup(_worker: Worker) -> None:
    """Lower the priority; Dask calls it in the main thread, before the threads that run tasks: they inherit it."""
    os.nice(NICENESS)
    refuse_breakpoints()
