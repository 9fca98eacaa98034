"""The last Completed runs of a deployment, in the store: a flow run may not ask the server about other runs.

One small JSON file for each deployment, `runs/<deployment>.json`, with at most `MOST` runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from tidepool import storage
from tidepool.report.run_page import Past

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST = 14


def read(deployment: str) -> list[Past]:
    """Return the last Completed runs, oldest first; empty if there is no history.

    Raises:
        ValueError: the file is not a history.
        StorageError: the store refuses.
    """
    target = _target(deployment)
    if not storage.exists(target):
        return []
    values = json.loads(storage.read(target))
    try:
        return [
            Past(str(each["id"]), float(each["seconds"]), int(each["items"]), int(each["retried"])) for each in values
        ][-MOST:]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{storage.url(target)} is not a history of runs") from error


def add(deployment: str, past: Sequence[Past], run: Past) -> None:
    """Write the history with another run. Of two runs that end at the same time, one may be missing."""
    kept = [*(each for each in past if each.id != run.id), run][-MOST:]
    storage.write(_target(deployment), json.dumps([asdict(each) for each in kept]).encode())


def _target(deployment: str) -> str:
    return f"runs/{deployment}.json"
