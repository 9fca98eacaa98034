"""`tidepool demo`: all deployments on this machine, on bundled samples, through a real server, work pool and worker.

Then the incidents of `tidepool/local/incidents.py`, each of which is meant to end in its way. Server (SQLite), process
worker and runs are child processes and end with the demo, however it ends.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidepool.deploy.config import automations, environments
from tidepool.errors import TidepoolError, UsageError
from tidepool.local import pages
from tidepool.local.incidents import INCIDENTS, kill_worker
from tidepool.local.processes import Processes, signals_interrupt
from tidepool.local.server import Home, Server, free_port
from tidepool.settings import set_prefect_variables, settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

ENVIRONMENT = "local"
_USUAL_PORT = 4200
_DEPLOY_SECONDS = 300
# From the trigger to the end of the last run; the slowest flow has its own, shorter timeout.
_RUN_SECONDS = 1800
_REPORT_SECONDS = 30
_WHERE = """
Where to look, while the server runs:
  {ui}/v2/runs  the runs; each has its report under Artifacts
  {ui}/v2/automations  alerts and repairs
  tidepool status  what is wrong now; `tidepool status NAME`: the last run of a deployment"""
# Of the documents of a repository, the one that the runs above are explained by.
_ON_CALL = "docs/on-call.md"
_STYLES = {"COMPLETED": "green", "FAILED": "red", "CRASHED": "red", "CANCELLED": "yellow", "RUNNING": "cyan"}


def demo(repository: Path, *, stay: bool, port: int | None) -> int:
    """Run the demo.

    Args:
        repository: The folder that holds prefect.yaml.
        stay: Keep the server running afterwards, until Ctrl-C.
        port: Port of the server; None: 4200, or any free one when it is taken.

    Returns:
        Exit code: 0 if every run is Completed and every incident ended as meant, 1 if not, 130 if interrupted.

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
    with ExitStack() as stack:
        stack.enter_context(home.only_demo())
        stack.enter_context(signals_interrupt())
        server = Server(home, port or free_port(_USUAL_PORT))
        documents = stack.enter_context(pages.served(repository, free_port(server.port + 1)))
        more = {"TIDEPOOL_REPOSITORY_URL": documents, "TIDEPOOL_DEPLOY_DELETE_SHARE": "1"}
        processes = Processes(home.logs, {**server.variables, **more})
        home.record.write_text(json.dumps({"port": server.port, "mark": processes.mark}))
        code = 130
        try:
            with suppress(KeyboardInterrupt):
                code = _run(repository, server, processes, out)
                if stay:
                    out.print(_WHERE.format(ui=server.url), highlight=False)
                    if (repository / _ON_CALL).is_file():
                        out.print(f"  {documents}/{_ON_CALL}  what on-call reads first", highlight=False)
                    out.print(f"\nThe UI is at {server.url}. Ctrl-C stops everything.")
                else:
                    out.print("Without --exit the demo shows these runs again, in the Prefect UI.")
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
    log = (server.home.logs / "server.log").relative_to(repository)
    out.print(f"Prefect server: starting on port {server.port} (log: {log})")
    server.start(processes)
    set_prefect_variables(server.variables)

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
    from prefect.client.schemas.objects import TERMINAL_STATES
    from prefect.states import Cancelled

    with get_client(sync_client=True) as client:
        for pool in {deployment["work_pool"]["name"] for deployment in manifest["deployments"]}:
            create_work_pool(client, pool)
            # A run starts its own Dask processes: half as many runs as cores. Two even on two cores, because a run's
            # first seconds are start-up that leaves a core idle.
            limit = max(2, (os.cpu_count() or 2) // 2)
            worker = ("worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit))
            processes.start("worker", "prefect", *worker, "--install-policy", "never", cwd=repository)
        counts = len(manifest["deployments"]), len(automations.load(repository).automations)
        done = "Registering deployments: {}, automations: {} (tidepool apply --environment {})"
        out.print(done.format(*counts, ENVIRONMENT))
        apply = ("apply", "--environment", ENVIRONMENT, "--no-record")
        processes.start("apply", "tidepool.cli", *apply, cwd=repository)
        processes.wait("apply", _DEPLOY_SECONDS)

        runs: dict[str, FlowRun] = {}
        try:
            for name in environments.deployment_names(manifest):
                called = DeploymentFilter(name=DeploymentFilterName(any_=[name]))
                (found,) = client.read_deployments(deployment_filter=called)
                runs[name] = client.create_flow_run_from_deployment(found.id, tags=["demo"])
            _follow(client, processes, runs, server.url, out)
            reports = _wait_for_reports(client, runs, out)
        except (KeyboardInterrupt, TidepoolError):
            processes.stop("worker")
            # The processes of these runs are stopped: the history must not show them as running.
            for run in _read(client, runs).values():
                if run.state_type not in TERMINAL_STATES:
                    client.set_flow_run_state(run.id, Cancelled(message="The demo was stopped"), force=True)
            raise
    return _summary(runs, reports, server.url, out)


def create_work_pool(client: SyncPrefectClient, name: str) -> None:
    """Create a work pool, or replace it, whose runs are processes of this machine and report their end."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    # As in a driver pod.
    template["variables"]["properties"]["command"]["default"] = shlex.join(
        [sys.executable, "-m", "tidepool.operate.engine"]
    )
    client.create_work_pool(
        WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template), overwrite=True
    )


def _follow(client: SyncPrefectClient, processes: Processes, runs: dict[str, FlowRun], ui: str, out: Console) -> None:
    """Show the runs until all have ended: a live table in a terminal, a line per change elsewhere.

    Incidents are added to the runs: each when the run of its deployment before it has ended.
    """
    from prefect.client.schemas.objects import TERMINAL_STATES

    deployments = {name: run.deployment_id for name, run in runs.items()}
    waiting = _possible(deployments)
    to_kill = [name for name in waiting if INCIDENTS[name].kills_worker]
    shown: dict[str, str | None] = {}
    deadline = time.monotonic() + _RUN_SECONDS
    with Live(console=out, auto_refresh=False, transient=True) as live:
        while True:
            processes.check()
            runs.update(_read(client, runs))
            busy = {run.deployment_id for run in runs.values() if run.state_type not in TERMINAL_STATES}
            for name in list(waiting):
                id_ = deployments[INCIDENTS[name].deployment]
                if id_ is not None and id_ not in busy:
                    waiting.remove(name)
                    busy.add(id_)
                    runs[name] = client.create_flow_run_from_deployment(
                        id_, parameters=dict(INCIDENTS[name].parameters), tags=["demo", "incident"]
                    )
            to_kill = [name for name in to_kill if name not in runs or not kill_worker(client, runs[name])]
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
                return
            if time.monotonic() > deadline:
                listed = ", ".join(f"{name} is {states[name]}" for name in late)
                raise TidepoolError(f"runs not finished after {_RUN_SECONDS} s: {listed}")
            time.sleep(0.5)


def _possible(deployments: Iterable[str]) -> list[str]:
    """Return the incidents that a repository with these deployments can have, where its mapped tasks run."""
    workers = settings().compute.provider == "local"
    return [
        name
        for name, each in INCIDENTS.items()
        if each.deployment in deployments and (workers or not each.kills_worker)
    ]


def _wait_for_reports(client: SyncPrefectClient, runs: Mapping[str, FlowRun], out: Console) -> dict[UUID, UUID]:
    """Wait for the reports of the runs: a process writes its own after its final state, and the demo may end it.

    Returns:
        Their ids, by the run's.
    """
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    wanted = {run.id: name for name, run in runs.items() if run.state_type in {"COMPLETED", "FAILED"}}
    found: dict[UUID, UUID] = {}
    deadline = time.monotonic() + _REPORT_SECONDS
    while settings().report.enabled and (missing := wanted.keys() - found.keys()):
        only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=list(missing)))
        for each in client.read_artifacts(artifact_filter=only):
            if each.flow_run_id and str(each.key).endswith("-run"):
                found[each.flow_run_id] = each.id
        if time.monotonic() > deadline:
            names = ", ".join(sorted(wanted[each] for each in wanted.keys() - found.keys()))
            out.print(f"[yellow]no report after {_REPORT_SECONDS} s of: {names}[/]")
            break
        time.sleep(0.5)
    return found


def _read(client: SyncPrefectClient, runs: Mapping[str, FlowRun]) -> dict[str, FlowRun]:
    """Read the runs, by deployment, again."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    ids = FlowRunFilterId(any_=[run.id for run in runs.values()])
    found = {run.id: run for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(id=ids))}
    return {name: found[run.id] for name, run in runs.items()}


def _summary(runs: Mapping[str, FlowRun], reports: Mapping[UUID, UUID], ui: str, out: Console) -> int:
    out.print(_table(runs, ui, reports))
    plain = {name: run for name, run in runs.items() if name not in INCIDENTS}
    meant = {name: run for name, run in runs.items() if name in INCIDENTS}
    bad = {name: run for name, run in plain.items() if run.state_type != "COMPLETED"}
    other = {name: run for name, run in meant.items() if not INCIDENTS[name].is_as_meant(run)}
    for name, run in [*bad.items(), *other.items()]:
        out.print(f"{name}: {run.state_name}: {_sentence(run)}", style="red", markup=False)
    out.print(f"{len(plain) - len(bad)} of {len(plain)} Completed")
    if meant:
        out.print(f"{len(meant) - len(other)} of {len(meant)} incidents ended as they were meant to")
    return 1 if bad or other else 0


def _sentence(run: FlowRun) -> str:
    return (run.state and run.state.message) or "no reason recorded"


def _table(runs: Mapping[str, FlowRun], ui: str, reports: Mapping[UUID, UUID] | None = None) -> Table:
    """Return the runs as a table; the incidents in a second part, each with the sentence of its report and the link."""
    table = Table(box=None, pad_edge=False)
    table.add_column("deployment", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("in the UI", overflow="fold")
    plain = [name for name in runs if name not in INCIDENTS]
    for name in plain:
        table.add_row(*_row(name, runs[name], ui))
    if len(plain) < len(runs):
        table.add_row()
        table.add_row(Text("meant to go wrong", style="bold"))
    for name in [each for each in runs if each in INCIDENTS]:
        table.add_row(*_row(name, runs[name], ui))
        if report := (reports or {}).get(runs[name].id):
            table.add_row("", "", "", Text(_sentence(runs[name])))
            table.add_row("", "", "", _link(f"{ui}/v2/artifacts/artifact/{report}"))
    return table


def _row(name: str, run: FlowRun, ui: str) -> tuple[str, Text, str, Text]:
    state = Text(run.state_name or "", style=_STYLES.get(run.state_type or "", "dim"))
    seconds = f"{run.estimated_run_time.total_seconds():.1f}"
    return name, state, seconds, _link(f"{ui}/v2/runs/flow-run/{run.id}")


def _link(address: str) -> Text:
    return Text(address, style=f"link {address}")
