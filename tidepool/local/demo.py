"""`tidepool demo`: all deployments on this machine, on bundled samples, through a real server, work pool and worker.

Server (SQLite), process worker and runs are child processes and end with the demo, however it ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidepool.deploy.config import environments
from tidepool.errors import TidepoolError, UsageError
from tidepool.local.processes import Processes, signals_interrupt
from tidepool.local.server import USUAL_PORT, Home, Server, free_port, is_free
from tidepool.settings import set_prefect_variables, settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

ENVIRONMENT = "local"
_DEPLOY_SECONDS = 300
# From the trigger to the end of the last run; the slowest flow has its own, shorter timeout.
_RUN_SECONDS = 1800
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_STYLES = {"COMPLETED": "green", "FAILED": "red", "CRASHED": "red", "CANCELLED": "yellow", "RUNNING": "cyan"}


@dataclass(frozen=True)
class _Progress:
    """One deployment's run."""

    deployment: str
    state: str
    kind: str
    message: str
    seconds: float
    link: str


def demo(repository: Path, *, stay: bool, port: int | None, out: Console | None = None) -> int:
    """Run the demo.

    Args:
        repository: The folder that holds prefect.yaml.
        stay: Keep the server running afterwards, until Ctrl-C.
        port: Port of the server; None: 4200, or any free one when it is taken.
        out: The console to print to.

    Returns:
        Exit code: 0 if every run is Completed, 1 if not, 130 if interrupted.

    Raises:
        UsageError: another demo is running, or the port is taken.
        TidepoolError: the server, the deployment or the worker failed.
    """
    out = out or _console()
    settings()  # a misspelt setting is reported now, and not by six failed runs
    if port is not None and not is_free(port):
        raise UsageError(f"port {port} is already in use; choose another one, or omit --port for any free one")
    home = Home.of(repository)
    with home.only_demo(), signals_interrupt():
        server = Server(home, port or free_port(USUAL_PORT))
        processes = Processes(home.logs, server.variables)
        home.record.write_text(json.dumps({"port": server.port, "mark": processes.mark}))
        code = None
        try:
            code = _run(repository, server, processes, out)
            if stay:
                out.print(f"\nThe UI is at {server.url}. Ctrl-C stops everything.")
                while True:
                    processes.check()
                    time.sleep(1)
        except KeyboardInterrupt:
            return 130 if code is None else code
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

    with get_client(sync_client=True) as client:
        for pool in {deployment["work_pool"]["name"] for deployment in manifest["deployments"]}:
            _ensure_pool(client, pool)
            # A run starts its own Dask processes: half as many runs as cores. Two even on two cores, because a run's
            # first seconds are start-up that leaves a core idle.
            limit = max(2, (os.cpu_count() or 2) // 2)
            worker = ("worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit))
            processes.start("worker", "prefect", *worker, "--install-policy", "never", cwd=repository)
        out.print(f"Registering {len(manifest['deployments'])} deployments (prefect deploy --all)")
        deploy = ("--no-prompt", "deploy", "--all", "--prefect-file", str(prefect_file))
        processes.start("deploy", "prefect", *deploy, cwd=repository)
        processes.wait("deploy", _DEPLOY_SECONDS)

        runs: dict[UUID, str] = {}
        try:
            for deployment in manifest["deployments"]:
                run = _trigger(client, deployment)
                runs[run.id] = str(deployment["name"])
            done = _follow(client, processes, runs, server.url, out)
        except (KeyboardInterrupt, TidepoolError):
            processes.stop("worker")
            _cancel(client, runs)
            raise
    return _summary(done, out)


def _ensure_pool(client: SyncPrefectClient, name: str) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    try:
        client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template))
    except ObjectAlreadyExists:
        return


def _trigger(client: SyncPrefectClient, deployment: Mapping[str, Any]) -> FlowRun:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    (found,) = client.read_deployments(
        deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[deployment["name"]]))
    )
    return client.create_flow_run_from_deployment(found.id, tags=["demo"])


def _follow(
    client: SyncPrefectClient, processes: Processes, runs: Mapping[UUID, str], ui: str, out: Console
) -> list[_Progress]:
    """Show the runs until all have ended: a live table in a terminal, a line per change elsewhere."""
    seen: dict[str, str] = {}
    deadline = time.monotonic() + _RUN_SECONDS
    with Live(console=out, auto_refresh=False, transient=True) as live:
        while True:
            processes.check()
            now = _read(client, runs, ui)
            if out.is_terminal:
                live.update(_table(now), refresh=True)
            else:
                for each in now:
                    if seen.get(each.deployment) != each.state:
                        out.print(f"  {each.deployment}: {each.state}")
            seen = {each.deployment: each.state for each in now}
            if all(each.kind in _FINAL for each in now):
                return now
            if time.monotonic() > deadline:
                late = ", ".join(f"{each.deployment} is {each.state}" for each in now if each.kind not in _FINAL)
                raise TidepoolError(f"runs not finished after {_RUN_SECONDS} s: {late}")
            time.sleep(0.5)


def _read(client: SyncPrefectClient, runs: Mapping[UUID, str], ui: str) -> list[_Progress]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(runs))))
    by_id = {run.id: run for run in found}
    return [_progress(by_id[identifier], name, ui) for identifier, name in runs.items()]


def _progress(run: FlowRun, name: str, ui: str) -> _Progress:
    state = run.state
    return _Progress(
        deployment=name,
        state=state.name if state is not None and state.name else "Unknown",
        kind=state.type.value if state is not None else "",
        message=state.message or "" if state is not None else "",
        seconds=run.estimated_run_time.total_seconds(),
        link=f"{ui}/v2/runs/flow-run/{run.id}",
    )


def _cancel(client: SyncPrefectClient, runs: Mapping[UUID, str]) -> None:
    """Cancel the runs whose processes are stopped, so that the history does not show them as running."""
    from prefect.states import Cancelled

    for each in _read(client, runs, "") if runs else []:
        if each.kind not in _FINAL:
            identifier = next(key for key, name in runs.items() if name == each.deployment)
            client.set_flow_run_state(identifier, Cancelled(message="The demo was stopped"), force=True)


def _summary(done: Sequence[_Progress], out: Console) -> int:
    out.print(_table(done))
    bad = [each for each in done if each.kind != "COMPLETED"]
    for each in bad:
        out.print(f"{each.deployment}: {each.state}: {each.message or 'no reason recorded'}", style="red", markup=False)
    out.print(f"{len(done) - len(bad)} of {len(done)} Completed")
    return 1 if bad else 0


def _table(rows: Sequence[_Progress]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("deployment", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("in the UI", overflow="fold")
    for row in rows:
        state = Text(row.state, style=_STYLES.get(row.kind, "dim"))
        table.add_row(row.deployment, state, f"{row.seconds:.1f}", Text(row.link, style=f"link {row.link}"))
    return table


def _console() -> Console:
    # Without a terminal rich takes 80 columns and breaks the links.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)
