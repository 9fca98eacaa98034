"""The chaos suite, `make chaos`: each fault of `faults.ROWS` into running flows, and the promises that are kept.

`make test-cluster` does not run it, and neither does CI: it takes hours, and needs the cluster for itself.
CHAOS_ROWS names the rows (all); CHAOS_N their trials (5); CHAOS_AT_ONCE how many run at the
same time (2). The results are added to those of earlier runs.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import results
from faults import NOT_RUN, ROWS
from several import SEVERAL
from trials import batch, faults, now

if TYPE_CHECKING:
    from world import World

TRIALS = int(os.environ.get("CHAOS_N") or 5)
AT_ONCE = int(os.environ.get("CHAOS_AT_ONCE") or 2)
EVERY = [name for name in (*ROWS, *SEVERAL) if name not in NOT_RUN]
CHOSEN = os.environ.get("CHAOS_ROWS", "").split() or EVERY
if unknown := sorted(set(CHOSEN) - set(EVERY)):
    raise pytest.UsageError(f"ROWS: unknown or not run: {', '.join(unknown)}; rows: {', '.join(EVERY)}")


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", CHOSEN)
def test_row(world: World, name: str) -> None:
    broken = []
    for record in _records(world, name):
        results.add(record)
        results.write_table(NOT_RUN, [*ROWS, *SEVERAL])
        _say(record)
        broken += record["faults"]
    assert not broken, "\n".join(broken)


def _records(world: World, name: str) -> Any:
    """Yield a record for each trial."""
    common = {"row": name}
    if name in SEVERAL:
        for _ in range(TRIALS):
            yield {**common, "at": now(), "from_end": True, **SEVERAL[name](world)}
        return
    row = ROWS[name]
    left = TRIALS
    while left > 0:
        count = min(left, AT_ONCE)
        for figures in batch(world, name, row, count):
            yield {**common, "at": now(), "from_end": row.from_end, **figures, "faults": faults(row, figures)}
        left -= count


def _say(record: dict[str, Any]) -> None:
    """Print a trial as it is measured."""
    sys.__stderr__.write(
        f"[{time.strftime('%H:%M:%S')}] {record['row']}: {record['name']} after "
        f"{record['seconds_to_state']} s, no Dask pod after {record['seconds_to_no_dask_pod']} s, "
        f"{record['done']} of {record['items']} items, {record['twice']} twice; {record['message']!r}"
        f"{''.join(f'{chr(10)}    BROKEN {reason}' for reason in record['faults'])}\n"
    )
