"""Start of a driver: from its first process to the flow's first line, in seconds and in CPU seconds of its processes.

    python -m benchmarks.driver_start --turns 10
    python -m benchmarks.driver_start --turns 10 --beside ../before

In turns: tidepool's command, Prefect's own, and with `--beside` that of another checkout of this repository, with the
packages of this one. The server is on this machine; what Kubernetes does before the first process is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.servers import prefect_server
from tidepool.settings import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.orchestration import SyncPrefectClient

COMMANDS = {
    "tidepool": ["-m", "tidepool.operate.flow_run"],
    "beside": ["-m", "tidepool.operate.flow_run"],
    "Prefect's": ["-m", "prefect", "flow-run", "execute"],
}
FLOW = """
import json, os, time
import psutil
from prefect import flow
from tidepool import report, storage

@flow
def first_line():
    now = time.time()
    process = psutil.Process()
    used = [each.cpu_times() for each in (process, process.parent())]
    with open(os.environ["DRIVER_START"], "a") as file:
        print(json.dumps(["first line", now, sum(each.user + each.system for each in used)]), file=file)
"""
# In each Python process: the moments at which it first does something.
SITE = """
import json, os, sys, time
seen = set()
def note(step):
    if step not in seen:
        seen.add(step)
        with open(os.environ["DRIVER_START"], "a") as file:
            print(json.dumps([step, time.time(), time.process_time()]), file=file)
def hook(event, arguments):
    if event == "socket.connect":
        note("first request")
    elif event == "exec":
        code = arguments[0]
        if code.co_filename.endswith("prefect/engine.py") and sys.argv[0].endswith("prefect/engine.py"):
            note("engine")
        elif code.co_filename.endswith("first_line.py"):
            note("flow's module")
note("interpreter")
sys.addaudithook(hook)
"""
# Of the same step in two processes, the first one counts, but the engine is the last to be begun.
STEPS = ("interpreter", "first request", "engine", "flow's module", "first line")


class Driver:
    """Executes runs of a flow as driver pods do, one after another.

    Args:
        folder: An empty folder.
        api: URL of the server.
        beside: Another checkout of the repository, of which a variant executes tidepool's command.
    """

    def __init__(self, folder: Path, api: str, beside: Path | None) -> None:
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        self._source, self._steps, self._api, self._beside = folder / "source", folder / "steps", api, beside
        site = folder / "site"
        for each in (self._source, site):
            each.mkdir()
        (self._source / "first_line.py").write_text(FLOW)
        (site / "sitecustomize.py").write_text(SITE)
        self._path = [str(site)]
        stack = ExitStack()
        stack.enter_context(temporary_settings({PREFECT_API_URL: api}))
        self.client: SyncPrefectClient = stack.enter_context(get_client(sync_client=True))
        flow = self.client.create_flow_from_name("first-line")
        self._deployment = self.client.create_deployment(
            flow_id=flow, name="first-line", entrypoint="first_line.py:first_line", path="."
        )

    def measure(self, variant: str) -> dict[str, float]:
        """Execute a run; return seconds from the start of its first process to each step, and the CPU seconds."""
        from prefect.states import Pending

        run = self.client.create_flow_run_from_deployment(self._deployment, state=Pending())
        self._steps.write_text("")
        paths = [*self._path, str(self._beside)] if variant == "beside" else self._path
        began = time.time()
        done = subprocess.run(
            [sys.executable, *COMMANDS[variant]],
            cwd=self._source,
            env={
                **environment(),
                "PREFECT_API_URL": self._api,
                "PREFECT__FLOW_RUN_ID": str(run.id),
                "DRIVER_START": str(self._steps),
                "PYTHONPATH": os.pathsep.join(paths),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        found: dict[str, float] = {}
        for step, moment, cpu in map(json.loads, self._steps.read_text().splitlines()):
            found.setdefault(step, moment - began)
            if step == "first line":
                found["CPU"] = cpu
        if done.returncode or found.keys() != {*STEPS, "CPU"}:
            raise RuntimeError(f"{variant}: exit code {done.returncode}, {found}\n{done.stdout}{done.stderr}")
        return found


def turns(driver: Driver, variants: list[str], count: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Execute each variant so often, each time in another order; the first turn is a rehearsal."""
    for turn in range(count + 1):
        first = turn % len(variants)
        for variant in variants[first:] + variants[:first]:
            found = driver.measure(variant)
            if turn:
                yield variant, found


def main() -> None:
    """Run the command."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--turns", type=int, default=10)
    arguments.add_argument("--beside", type=Path, help="another checkout of this repository")
    arguments.add_argument("--api", help="URL of a running server; otherwise a new one on SQLite")
    chosen = arguments.parse_args()
    variants = [each for each in COMMANDS if each != "beside" or chosen.beside]
    beside = chosen.beside.resolve() if chosen.beside else None
    measured: dict[str, list[dict[str, float]]] = {each: [] for each in variants}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidepool-bench-")))
        api = chosen.api or stack.enter_context(prefect_server("sqlite")).api
        for variant, found in turns(Driver(folder, api, beside), variants, chosen.turns):
            measured[variant].append(found)
    print(f"{chosen.turns} turns, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians\n")
    print(f"{'seconds to':<16}" + "".join(f"{each:>12}" for each in variants))
    for step in (*STEPS, "CPU"):
        cells = [statistics.median(each[step] for each in measured[variant]) for variant in variants]
        print(f"{step if step != 'CPU' else 'CPU seconds':<16}" + "".join(f"{each:>12.2f}" for each in cells))


if __name__ == "__main__":
    main()
