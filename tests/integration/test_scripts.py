"""Scripts that call a flow themselves: its mapped tasks run on Dask, and its body runs once."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

# Without `if __name__ == "__main__":`, and with what the tasks need of the script: its classes and its variables.
SCRIPT = """
from dataclasses import dataclass
from prefect import flow, task
from tidepool.compute import dask_client, dask_runner

print("the body runs")
OFFSET = 7

@dataclass
class Pair:
    before: int
    after: int

class OwnError(Exception):
    pass

@task
def double(number: int) -> Pair:
    return Pair(number, 2 * number + OFFSET)

@task
def fail(number: int) -> None:
    raise OwnError(f"not {number}")

@flow(task_runner=dask_runner("small"))
def doubled() -> list[Pair]:
    error = fail.map([1])[0].result(raise_on_failure=False)
    assert type(error) is OwnError, error
    return double.map(range(3)).result()

assert doubled() == [Pair(0, 7), Pair(1, 9), Pair(2, 11)]
with dask_client("small", workers=1) as client:
    assert client.submit(lambda: Pair(1, OFFSET)).result() == Pair(1, 7)
print("the end")
"""


# As a notebook executes its cells: in the main module, while its event loop runs.
CELL = f"""
import asyncio

async def cell() -> None:
    exec({SCRIPT!r}, globals())

asyncio.run(cell())
"""


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("way", ["file", "standard input", "cell"])
def test_a_script_without_a_main_guard_runs_once(tmp_path: Path, way: str) -> None:
    """Each worker process ran the script again, and ended before it had joined its cluster."""
    script = CELL if way == "cell" else SCRIPT
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py" if way == "file" else "-"],
        input="" if way == "file" else script,
        cwd=tmp_path,
        env={**os.environ, "TIDEPOOL_COMPUTE_PROVIDER": "local"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the body runs\nthe end\n"


def test_a_script_without_a_server_starts_one_and_its_workers_use_it(tmp_path: Path) -> None:
    """Each worker started one of its own; on a busy machine they were not ready in Prefect's time."""
    (tmp_path / "script.py").write_text(SCRIPT)
    kept = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    more = {
        "TIDEPOOL_COMPUTE_PROVIDER": "local",
        "PREFECT_HOME": str(tmp_path / "home"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "PREFECT_LOGGING_LEVEL": "INFO",
    }
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**kept, **more},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert f"{done.stdout}{done.stderr}".count("Starting temporary server on ") == 1
