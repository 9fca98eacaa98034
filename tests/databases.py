"""A database of the Prefect server to copy: its migrations take 10 s of CPU time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tidepool.local.processes import file_lock

CACHE = Path(__file__).parents[1] / ".pytest_cache"


def migrated(folder: Path) -> Path:
    """A database with all migrations of this version of Prefect, made in a folder if there is none yet."""
    database = CACHE / f"prefect-{version('prefect')}.db"
    CACHE.mkdir(exist_ok=True)
    with file_lock(database.with_suffix(".lock"), wait=True):  # pytest-xdist's workers are processes
        if not database.exists():
            kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "COVERAGE_"))}
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            subprocess.run(command, env={**kept, "PREFECT_HOME": str(folder)}, check=True, stdout=subprocess.DEVNULL)
            shutil.copy(folder / "prefect.db", database.with_suffix(".new"))
            database.with_suffix(".new").replace(database)
    return database
