"""`tidepool demo`: all deployments on this machine, on bundled samples, through a real server, work pool and worker.

Server (SQLite), process worker and runs are child processes and end with the demo, however it ends.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidepool.deploy.config import environments
from tidepool.errors import TidepoolError, UsageError
from tidepool.local.processes import Processes, signals_interrupt
from tidepool.local.server import Home, Server, free_port
from tidepool.settings import set_prefect_variables, settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

ENVIRONMENT = "local"
_USUAL_PORT = 4200
_DEPLOY_SECONDS = 300
# From the trigger to the end of the last run; the slowest flow has its own, shorter timeout.
_RUN_SECONDS = 1800
_REPORT_SECONDS = 30
_STYLES = {"COMPLETED": "green", "FAILED": "red", "CRASHED": "red", "CANCELLED": "yellow", "RUNNING": "cyan"}


def demo(repository: Path, *, stay: bool, port: int | None) -> int:
    """Run the demo.

    Args:
        repository: The folder that holds prefect.yaml.
        stay: Keep the server running afterwards, until Ctrl-C.
        port: Port of the server; None: 4200, or any free one when it is taken.

    Returns:
        Exit code: 0 if every run is Completed, 1 if not, 130 if interrupted.

    Raises:
        UsageError: another demo is running, or the port is taken.
        TidepoolError: the server, the deployment or the worker failed.
    """
    # Without a terminal rich takes 80 columns and breaks the links.
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    settings()  # a misspelt setting is reported now, and not by six failed runs
    if port is not None and free_port(port) != port:
        raise UsageError(f"port {port} is already in use; choose another one, or omit --port for any free one")
    home = Home.of(repository)
    with home.only_demo(), signals_interrupt():
        server = Server(home, port or free_port(_USUAL_PORT))
        processes = Processes(home.logs, server.variables)
        home.record.write_text(json.dumps({"port": server.port, "mark": processes.mark}))
        code = 130
        try:
            with suppress(KeyboardInterrupt):
                code = _run(repository, server, processes, out)
                if stay:
                    out.print(f"\nThe UI is at {server.url}. Ctrl-C stops everything.")
                while stay:
                    processes.check()
                    time.sleep(1)
        finally:
            out.print("Stopping the server, the worker and the runs …")
            processes.stop_all()
            out.print(f"Stopped. The run history is kept in {home.prefect.relative_to(repository)}/.")
    return code


def _run(repository: Path, server: Server, processes: Processes, out: Console) -> int:
    """Start everything, trigger a run of each deployment, and follow the runs."""
    manifest = environments.load(repository, ENVIRONMENT)
    prefect_file = server.home.path / f"prefect.{ENVIRONMENT}.yaml"
    prefect_file.write_text(environments.to_yaml(manifest), encoding="utf-8")

    log = (server.home.logs / "server.log").relative_to(repository)
    out.print(f"Prefect server: starting on port {server.port} (log: {log})")
    server.start(processes)
    set_prefect_variables(server.variables)

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
    from prefect.client.schemas.objects import TERMINAL_STATES
    from prefect.states import Cancelled
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    # As in a driver pod: each run reports its end.
    template["variables"]["properties"]["command"]["default"] = shlex.join(
        [sys.executable, "-m", "tidepool.operate.engine"]
    )
    with get_client(sync_client=True) as client:
        for pool in {deployment["work_pool"]["name"] for deployment in manifest["deployments"]}:
            client.create_work_pool(
                WorkPoolCreate(name=pool, type=ProcessWorker.type, base_job_template=template), overwrite=True
            )
            # A run starts its own Dask processes: half as many runs as cores. Two even on two cores, because a run's
            # first seconds are start-up that leaves a core idle.
            limit = max(2, (os.cpu_count() or 2) // 2)
            worker = ("worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit))
            processes.start("worker", "prefect", *worker, "--install-policy", "never", cwd=repository)
        out.print(f"Registering {len(manifest['deployments'])} deployments (prefect deploy --all)")
        deploy = ("--no-prompt", "deploy", "--all", "--prefect-file", str(prefect_file))
        processes.start("deploy", "prefect", *deploy, cwd=repository)
        processes.wait("deploy", _DEPLOY_SECONDS)

        runs: dict[str, FlowRun] = {}
        try:
            for name in environments.deployment_names(manifest):
                called = DeploymentFilter(name=DeploymentFilterName(any_=[name]))
                (found,) = client.read_deployments(deployment_filter=called)
                runs[name] = client.create_flow_run_from_deployment(found.id, tags=["demo"])
            done = _follow(client, processes, runs, server.url, out)
            _wait_for_reports(client, done, out)
        except (KeyboardInterrupt, TidepoolError):
            processes.stop("worker")
            # The processes of these runs are stopped: the history must not show them as running.
            for run in _read(client, runs).values():
                if run.state_type not in TERMINAL_STATES:
                    client.set_flow_run_state(run.id, Cancelled(message="The demo was stopped"), force=True)
            raise
    return _summary(done, server.url, out)


def _follow(
    client: SyncPrefectClient, processes: Processes, runs: Mapping[str, FlowRun], ui: str, out: Console
) -> Mapping[str, FlowRun]:
    """Show the runs until all have ended: a live table in a terminal, a line per change elsewhere."""
    from prefect.client.schemas.objects import TERMINAL_STATES

    shown: dict[str, str | None] = {}
    deadline = time.monotonic() + _RUN_SECONDS
    with Live(console=out, auto_refresh=False, transient=True) as live:
        while True:
            processes.check()
            runs = _read(client, runs)
            states = {name: run.state_name for name, run in runs.items()}
            if out.is_terminal:
                live.update(_table(runs, ui), refresh=True)
            else:
                for name, state in states.items():
                    if shown.get(name) != state:
                        out.print(f"  {name}: {state}")
            shown = states
            late = [name for name, run in runs.items() if run.state_type not in TERMINAL_STATES]
            if not late:
                return runs
            if time.monotonic() > deadline:
                listed = ", ".join(f"{name} is {states[name]}" for name in late)
                raise TidepoolError(f"runs not finished after {_RUN_SECONDS} s: {listed}")
            time.sleep(0.5)


def _wait_for_reports(client: SyncPrefectClient, runs: Mapping[str, FlowRun], out: Console) -> None:
    """Wait for the reports of the runs: a process writes its own after its final state, and the demo may end it."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    missing = {run.id: name for name, run in runs.items() if run.state_type in {"COMPLETED", "FAILED"}}
    deadline = time.monotonic() + _REPORT_SECONDS
    while settings().report.enabled and missing:
        only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=list(missing)))
        for each in client.read_artifacts(artifact_filter=only):
            if each.flow_run_id and str(each.key).endswith("-run"):
                missing.pop(each.flow_run_id, None)
        if time.monotonic() > deadline:
            out.print(f"[yellow]no report after {_REPORT_SECONDS} s of: {', '.join(sorted(missing.values()))}[/]")
            return
        time.sleep(0.5)


def _read(client: SyncPrefectClient, runs: Mapping[str, FlowRun]) -> dict[str, FlowRun]:
    """Read the runs, by deployment, again."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    ids = FlowRunFilterId(any_=[run.id for run in runs.values()])
    found = {run.id: run for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(id=ids))}
    return {name: found[run.id] for name, run in runs.items()}


def _summary(runs: Mapping[str, FlowRun], ui: str, out: Console) -> int:
    out.print(_table(runs, ui))
    bad = {name: run for name, run in runs.items() if run.state_type != "COMPLETED"}
    for name, run in bad.items():
        reason = (run.state and run.state.message) or "no reason recorded"
        out.print(f"{name}: {run.state_name}: {reason}", style="red", markup=False)
    out.print(f"{len(runs) - len(bad)} of {len(runs)} Completed")
    return 1 if bad else 0


def _table(runs: Mapping[str, FlowRun], ui: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("deployment", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("in the UI", overflow="fold")
    for name, run in runs.items():
        state = Text(run.state_name or "", style=_STYLES.get(run.state_type or "", "dim"))
        link = f"{ui}/v2/runs/flow-run/{run.id}"
        seconds = f"{run.estimated_run_time.total_seconds():.1f}"
        table.add_row(name, state, seconds, Text(link, style=f"link {link}"))
    return table
