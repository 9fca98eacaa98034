"""A repository of small flows for the tests of `tidepool run` and `tidepool demo`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import psutil
import yaml

if TYPE_CHECKING:
    from pathlib import Path

FLOWS = '''
"""Flows of a test."""
import subprocess, sys, time
from typing import Annotated
from prefect import flow, task
from pydantic import Field
from tidepool import report, storage
from tidepool.compute import dask_runner
from tidepool.errors import InputError

@task
def double(x: int) -> int:
    return 2 * x

@flow(name="good-flow")
def good(count: Annotated[int, Field(ge=1, le=10)], word: str = "a") -> dict:
    print("printed by the flow")
    subprocess.run([sys.executable, "-c", "print('printed by a child')"], check=True)
    total = sum(double.map(list(range(count))).result())
    storage.write("good/total.txt", str(total).encode())
    report.table("good-flow-rows", [{"total": total}], f"the total is {total}")
    report.outputs("good-flow", ["good/total.txt"])
    return {"total": total, "word": word}

@flow(name="bad-flow")
def bad() -> None:
    raise InputError("line 3, column 2: 'x7' is not an integer")

@flow
def variadic(first: int, *others: int, word: str = "a", **labels: int) -> list:
    return [first, others, word, labels]

@flow
async def later(count: int = 2) -> int:
    return count

@flow
def several(count: int):
    yield from range(count)

@flow
async def several_later(count: int):
    for number in range(count):
        yield number
    raise ValueError("no more")

@task(retries=1)
def look(word: str) -> str:
    breakpoint()
    return word

@flow(name="stopping-flow", timeout_seconds=600, task_runner=dask_runner("small"))
def stopping(word: str = "a") -> list:
    return look.map([word, word]).result()

@flow(name="stopping-twice-flow", timeout_seconds=600, task_runner=dask_runner("small"))
def stopping_twice(word: str = "a") -> list:
    breakpoint()
    return look.map([word, word]).result()

@flow(name="slow-flow")
def slow() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    child.wait()
'''

_ENTRIES: dict[str, dict[str, Any]] = {
    "good": {"parameters": {"count": 3}},
    "bad": {},
    "slow": {},
    "stopping": {},
    "stopping_twice": {},
    "variadic": {"parameters": {"first": 1, "others": [2], "labels": {"x": 4}}},
    "later": {},
    "several": {"parameters": {"count": 3}},
    "several_later": {"parameters": {"count": 3}},
}


def make(folder: Path, *names: str) -> Path:
    """A repository with the deployments of those names, in Git, because versions come from there."""
    folder.mkdir()
    (folder / "small_flows.py").write_text(textwrap.dedent(FLOWS))
    deployments = [
        {
            "name": name.replace("_", "-"),
            "entrypoint": f"small_flows.{name}",
            "version": "{{ commit.stdout }}",
            "tags": ["managed-by:tidepool"],
            "work_pool": {"name": "kubernetes", "job_variables": {"image": "none"}},
            **_ENTRIES[name],
        }
        for name in names
    ]
    script = {"id": "commit", "script": "git describe --always", "stream_output": False}
    build = [{"tidepool.deploy.steps.validate": {}}, {"prefect.deployments.steps.run_shell_script": script}]
    manifest = {"name": "small", "build": build, "pull": [], "deployments": deployments}
    (folder / "prefect.yaml").write_text(yaml.safe_dump(manifest))
    (folder / "environments").mkdir()
    local = {"image": None, "every_deployment": {"work_pool": {"name": "local", "job_variables": {"working_dir": "."}}}}
    (folder / "environments" / "local.yaml").write_text(yaml.safe_dump(local))
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for arguments in (["init", "--quiet"], ["add", "--all"], [*author, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def command(*arguments: str) -> list[str]:
    """The command line of `tidepool`, as the console script runs it."""
    return [sys.executable, "-m", "tidepool.cli", *arguments]


def variables(**more: str) -> dict[str, str]:
    """This process's environment with threads as the provider, and without a Prefect server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TIDEPOOL_"))}
    return {**kept, "TIDEPOOL_COMPUTE_PROVIDER": "threads", **more}


def processes_of(repository: Path) -> list[str]:
    """The command lines of the processes that belong to the repository's own server, worker or runs."""
    home = str(repository / ".tidepool" / "prefect")
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == home and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
