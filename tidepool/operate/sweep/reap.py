"""The command `tidepool reap`: one pass of the loop by hand, with a table of what was left behind."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tidepool.operate.sweep.leftovers import leftovers
from tidepool.operate.sweep.loop import DeletionError, delete
from tidepool.operate.sweep.observation import connect, observe
from tidepool.settings import settings
from tidepool.upstream.kr8s import close_connection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidepool.operate.sweep.leftovers import Leftover

DELETED, GONE, WOULD_DELETE = "deleted", "already gone", "would be deleted"
_COLUMNS = ("KIND", "NAMESPACE", "NAME", "WHY", "DONE")


@dataclass(frozen=True)
class Report:
    """The result of one pass.

    Attributes:
        read: Jobs and Dask clusters that were looked at, by namespace.
        outcomes: What was left behind, and what became of it.
    """

    read: dict[str, tuple[int, int]]
    outcomes: list[tuple[Leftover, str]]

    @property
    def failed(self) -> bool:
        """True if something that should have been deleted was not."""
        return any(outcome not in {DELETED, GONE, WOULD_DELETE} for _, outcome in self.outcomes)

    def text(self) -> str:
        """Return a table, and a line for each namespace: a misspelt one has no Jobs."""
        rows = [(each.kind, each.namespace, each.name, each.reason, outcome) for each, outcome in self.outcomes]
        table = [_COLUMNS, *rows] if rows else []
        widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))] if table else []
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        for namespace, (jobs, clusters) in self.read.items():
            left = sum(each.namespace == namespace for each, _ in self.outcomes)
            lines.append(f"{namespace}: {jobs} Jobs and {clusters} Dask clusters read, {left} left behind")
        return "\n".join(lines)

    def json(self) -> str:
        """Return the same as one JSON object."""
        namespaces = {name: {"jobs": jobs, "dask_clusters": clusters} for name, (jobs, clusters) in self.read.items()}
        found = [asdict(each) | {"outcome": outcome} for each, outcome in self.outcomes]
        return json.dumps({"namespaces": namespaces, "left_behind": found}, indent=2)


def reap(namespaces: Sequence[str], *, dry_run: bool) -> Report:
    """Delete what is left behind in some namespaces.

    Args:
        namespaces: Their names. None: TIDEPOOL_OPERATOR_NAMESPACES, else the kubeconfig's or the pod's own.
        dry_run: Delete nothing.

    Raises:
        ReadingError: a namespace could not be read; nothing was deleted.
    """
    return asyncio.run(_reap(namespaces, dry_run=dry_run))


async def _reap(namespaces: Sequence[str], *, dry_run: bool) -> Report:
    api = await connect()
    try:
        chosen = namespaces or settings().operator.namespaces.split() or [api.namespace]
        observations = [await observe(api, each) for each in dict.fromkeys(chosen)]
        now = datetime.now(UTC)
        outcomes = []
        for each in (found for observation in observations for found in leftovers(observation, {}, now)):
            outcome = WOULD_DELETE
            if not dry_run:
                try:
                    outcome = DELETED if await delete(api, each) else GONE
                except DeletionError as error:
                    outcome = str(error)
            outcomes.append((each, outcome))
    finally:
        await close_connection(api)
    return Report({each.namespace: (len(each.jobs), len(each.clusters)) for each in observations}, outcomes)
