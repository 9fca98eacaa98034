"""The command `tidepool status`: once, or again and again."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from typing import TYPE_CHECKING

import typer

from tidepool.operate.status import sources, view
from tidepool.operate.status.picture import RunStatus

if TYPE_CHECKING:
    from tidepool.operate.status.picture import Overview

_AGAIN_SECONDS = 2.0
_WIDTH = 120
_CLEAR = "\x1b[2J\x1b[H"


def status(run: str, default_api: str = "", *, watch: bool, as_json: bool) -> bool:
    """Print the status; with `watch` again every two seconds, until the run has ended or Ctrl-C.

    Args:
        run: As of `Sources.run`; empty for what is wrong now.
        default_api: URL of the API if PREFECT_API_URL is not set.
        watch: Print it again and again.
        as_json: Print one JSON object each time.

    Returns:
        True if something is wrong.

    Raises:
        UsageError: there is no such run, or PREFECT_API_URL is not set.
        TidepoolError: the server does not answer.
    """
    while True:
        found = asyncio.run(_read(run, default_api))
        text = view.as_json(found) if as_json else view.as_text(found, shutil.get_terminal_size((_WIDTH, 0)).columns)
        typer.echo(f"{_CLEAR}{text}" if watch and sys.stdout.isatty() and not as_json else text)
        if not watch or (isinstance(found, RunStatus) and found.ended):
            return found.wrong
        time.sleep(_AGAIN_SECONDS)


async def _read(run: str, default_api: str) -> Overview | RunStatus:
    async with sources.connect(default_api) as opened:
        return await (opened.run(run) if run else opened.overview())
