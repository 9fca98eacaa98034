"""A flow run as its pod executes it: `python -m tidepool.operate.flow_run` beside a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import get_client
from prefect.states import Pending

if TYPE_CHECKING:
    from pathlib import Path

    from prefect.client.schemas.objects import FlowRun

FLOWS = """
import json, logging, os, signal, sys
from pathlib import Path
from prefect import flow

def report(flow, flow_run, state):
    Path(os.environ["HOOK"]).write_text(state.name)

@flow
def completes():
    assert os.environ["PREFECT__FLOW_ENTRYPOINT"] == "flows.py:completes"

@flow
def fails():
    raise ValueError("its own error")

@flow(on_crashed=[report])
def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)

@flow
def ends_at_once():
    os._exit(3)

@flow
def exits():
    sys.exit(3)

@flow
def reports_and_is_killed():
    import atexit
    atexit.register(os.kill, os.getpid(), signal.SIGKILL)

@flow
def waits():
    import time
    Path(os.environ["HOOK"]).write_text("waits")
    time.sleep(120)

@flow
def goes_on():
    told = Path(os.environ["HOOK"])
    told.write_text("begun")
    with open(f"{told}.go"):  # a FIFO, which is opened when the test opens it, too
        told.write_text("goes on")
    signal.alarm(60)
    signal.pause()

@flow
def tells():
    from prefect.settings import get_current_settings
    from tidepool.settings import settings
    loggers = {name: logging.getLogger(name) for name in ("", "prefect", "prefect.flow_runs", "prefect.extra")}
    Path(os.environ["HOOK"]).write_text(json.dumps({
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": sys.path,
        "arguments": sys.argv,
        "main": sys.modules["__main__"].__spec__.name,
        "settings": get_current_settings().to_environment_variables(exclude_unset=True),
        "tidepool": str(settings()),
        "loggers": {name: [each.level, *map(repr, each.handlers)] for name, each in loggers.items()},
        "signals": {each.name: getattr(signal.getsignal(each), "__qualname__", "") for each in signal.Signals},
        "leads": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "name": Path("/proc/self/comm").read_text(),
    }))
"""
# Each Python process writes what it was started with. The rest is asked for by tests.
SITE = """
import os, sys
with open(os.environ["PROCESSES"], "a") as file:
    print(*sys.orig_argv[1:3], file=file)
if "WITH_A_THREAD" in os.environ:
    import threading, time
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
if "FORKED_WITHOUT" in os.environ:
    os.register_at_fork(after_in_child=lambda: sys.modules.update({os.environ["FORKED_WITHOUT"]: None}))
"""


@dataclass(frozen=True)
class Executed:
    """An executed flow run.

    Attributes:
        flow_run: As the server has it afterwards.
        code: The exit code of the pod's process.
        output: What it printed.
        processes: Module of each Python process, in the order of their start.
        hook: What the flow, or its hook, wrote into the file HOOK.
    """

    flow_run: FlowRun
    code: int
    output: str
    processes: list[str]
    hook: str


class Pod:
    """Executes flow runs of FLOWS.

    Args:
        folder: An empty folder.
        api: URL of the server.
        environment: Further variables of the process.
    """

    def __init__(self, folder: Path, api: str, **environment: str) -> None:
        self.source, self.hook, self._processes = folder / "source", folder / "hook", folder / "processes"
        site = folder / "site"
        self.source.mkdir(parents=True)
        site.mkdir()
        (self.source / "flows.py").write_text(FLOWS)
        (site / "sitecustomize.py").write_text(SITE)
        self._environment = {
            **os.environ,
            "PREFECT_API_URL": api,
            "PYTHONPATH": str(site),
            "PROCESSES": str(self._processes),
            "HOOK": str(self.hook),
            **environment,
        }

    def create(self, name: str, pull_steps: list[dict[str, Any]] | None = None) -> FlowRun:
        """Create a deployment of a flow, and a flow run."""
        with get_client(sync_client=True) as client:
            deployment = client.create_deployment(
                flow_id=client.create_flow_from_name(name.replace("_", "-")),
                name=name,
                entrypoint=f"flows.py:{name}",
                path=".",
                pull_steps=pull_steps,
            )
            return client.create_flow_run_from_deployment(deployment, state=Pending())

    def start(
        self, flow_run: FlowRun, module: str = "tidepool.operate.flow_run", **environment: str
    ) -> subprocess.Popen[str]:
        """Start the pod's process for a flow run, or only the one of the flow: `prefect.engine`."""
        return subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=self.source,
            env={**self._environment, "PREFECT__FLOW_RUN_ID": str(flow_run.id), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, flow_run: FlowRun, process: subprocess.Popen[str]) -> Executed:
        """Wait for the end of the process."""
        output, _ = process.communicate(timeout=200)
        with get_client(sync_client=True) as client:
            ended = client.read_flow_run(flow_run.id)
        assert ended.state is not None
        return Executed(
            ended,
            process.returncode,
            output,
            self._processes.read_text().splitlines(),
            self.hook.read_text() if self.hook.exists() else "",
        )

    def execute(self, name: str, pull_steps: list[dict[str, Any]] | None = None) -> Executed:
        """Execute a new flow run of a flow, to a final state."""
        flow_run = self.create(name, pull_steps)
        executed = self.end(flow_run, self.start(flow_run))
        assert executed.flow_run.state is not None
        assert executed.flow_run.state.is_final(), f"{executed.flow_run.state}\n{executed.output}"
        return executed
