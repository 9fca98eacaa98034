"""The chaos suite, `make chaos`: each fault of `faults.ROWS` into running flows, and the promises that are kept.

`make test-cluster` does not run it, and neither does CI: it takes hours, and needs the cluster for itself.
CHAOS_ROWS names the rows (all), with `@stock` for stock's; CHAOS_N their trials (5); CHAOS_AT_ONCE how many run at the
same time (2). CHAOS_RESTART_API and CHAOS_STOP_KUBELET are shell commands of two rows (`faults.py`). The results
are added to those of earlier runs.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import results
from faults import NOT_RUN, ROWS, STOCK
from several import SEVERAL
from trials import batch, faults, now

if TYPE_CHECKING:
    from collections.abc import Iterator

    from world import World

TRIALS = int(os.environ.get("CHAOS_N") or 5)
AT_ONCE = int(os.environ.get("CHAOS_AT_ONCE") or 2)
# How often each of stock's trials is tried: a quarter to a half of its clusters do not start (docs/decisions/0045).
STOCK_TRIES = 4
EVERY = [*(name for name in (*ROWS, *SEVERAL) if name not in NOT_RUN), *(f"{name}@stock" for name in STOCK)]
CHOSEN = os.environ.get("CHAOS_ROWS", "").split() or EVERY
if unknown := sorted(set(CHOSEN) - set(EVERY)):
    raise pytest.UsageError(f"ROWS: unknown or not run: {', '.join(unknown)}; rows: {', '.join(EVERY)}")


@pytest.mark.timeout(0)
@pytest.mark.parametrize("chosen", CHOSEN)
def test_row(request: pytest.FixtureRequest, chosen: str) -> None:
    name, _, runner = chosen.partition("@")
    world: World = request.getfixturevalue(runner or "world")
    broken: list[str] = []
    for record in _records(world, name, broken):
        results.add(record)
        results.write_table(NOT_RUN, [*ROWS, *SEVERAL])
        _say(record)
        broken += record["faults"]
    # Stock promises none of this: its rows are measured only.
    assert not broken or runner, "\n".join(broken)


def _records(world: World, name: str, broken: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a record for each trial; add to `broken` what kept a trial from being one, and go on with the next."""
    common = {"row": name, "runner": world.runner}
    missing, tries = TRIALS, TRIALS if world.runner == "tidepool" else STOCK_TRIES * TRIALS
    while missing and tries:
        count = min(missing, tries, AT_ONCE) if name in ROWS else 1
        tries -= count
        try:
            if name in ROWS:
                row = ROWS[name]
                for figures in batch(world, name, row, count):
                    missing -= 1
                    yield {
                        **common, "at": now(), "from_end": row.from_end, **figures, "faults": faults(row, figures),
                    }  # fmt: skip
            else:
                missing -= 1
                yield {**common, "at": now(), "from_end": True, **SEVERAL[name](world)}
        except Exception as error:  # noqa: BLE001 - it fails the row, after the trials that are left
            broken.append(f"no trial: {type(error).__name__}: {error}")
            sys.__stderr__.write(f"[{time.strftime('%H:%M:%S')}] {name} {broken[-1]}\n")


def _say(record: dict[str, Any]) -> None:
    """Print a trial as it is measured."""
    sys.__stderr__.write(
        f"[{time.strftime('%H:%M:%S')}] {record['row']} {record['runner']}: {record['name']} after "
        f"{record['seconds_to_state']} s, no Dask pod after {record['seconds_to_no_dask_pod']} s, "
        f"{record['done']} of {record['items']} items, {record['twice']} twice; {record['message']!r}"
        f"{''.join(f'{chr(10)}    BROKEN {reason}' for reason in record['faults'])}\n"
    )
