"""What tidepool adds to a Dask worker process on this machine: it lets everything else there go first.

The workers take all cores that there are. The Prefect server beside them would fall behind, and they would then have to
wait for it with a core idle (docs/decisions/0073-*.md). They also collect garbage as seldom as in the image.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tidepool.garbage import collect_less

if TYPE_CHECKING:
    from distributed import Worker

# A process that is 2 nicer gets two thirds of the time of one that is not, where there is not enough for both: then the
# server can follow two workers on two cores. At 5 it would be level with them all the time, and they a quarter slower.
NICENESS = 2


def dask_setup(_worker: Worker) -> None:
    """Called by a Dask worker in its main thread, before the threads that run tasks: they inherit it."""
    collect_less()
    os.nice(NICENESS)
