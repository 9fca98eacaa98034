"""Entry point of a flow run's pod, `python -m tidepool.operate.flow_run`: a faster `prefect flow-run execute`.

Prefect looks after a run with one Python process, prepares its code with a second and executes it with a third; each
imports Prefect for a second. Here the first one has the run's Dask cluster asked for at once, if the deployment's job
variable `early_cluster` orders it. It prepares the code too, when there is nothing to prepare: the image is the code.
And it imports Prefect for both: it forks the one that executes the flow, which waits until it is needed. When that was
killed, the first one deletes the run's Dask clusters; its exit code, and so the state of pod and Job, is the run's. All
else is Prefect's: cancellation, SIGTERM, hooks.

| the run | exit code |
|---|---|
| Completed, Cancelled, to be executed again (Scheduled, Paused) | 0 |
| Failed; Crashed, as its own process or Prefect reported | 1 |
| told to end by SIGTERM, and not to be executed again | 143 |
| Crashed, because its process was killed by signal N (9: also out of memory) | 128 + N |
| Crashed, because its process ended with exit code N and no report | N |
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tidepool.compute.clusters.kubernetes import early
from tidepool.errors import UsageError
from tidepool.operate import engine
from tidepool.operate.forked import Child, Orders, fork
from tidepool.settings import environment, set_prefect_variables, settings

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from tidepool.operate.memory import Memory
    from tidepool.upstream.prefect_runner import Ending


_TOLD = 128 + signal.SIGTERM
# Its process keeps them in a file with each line of progress.
_UNTOLD = "they lack what its process did after its last line of progress in the log"
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_ENGINE = "tidepool.operate.engine"
# What this process and the engine need, nearly all of Prefect: imported once, before the fork.
_IN_BOTH = ("prefect.main", "prefect.flow_engine")


def authenticate_handshakes() -> None:
    """Have Prefect send its password as a header of every request; without it, a proxy refuses some of its websockets.

    The setting is read when Prefect is imported. The process that executes the flow inherits it.
    """
    variables = environment()
    if password := variables.get("PREFECT_API_AUTH_STRING"):
        headers = json.loads(variables.get("PREFECT_CLIENT_CUSTOM_HEADERS") or "{}")
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
        set_prefect_variables({"PREFECT_CLIENT_CUSTOM_HEADERS": json.dumps(headers)})


async def is_in_image(flow_run: FlowRun) -> bool:
    """Return whether the flow's code is complete in the image. Pull steps may change their process: not this one."""
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        deployment = await client.read_deployment(flow_run.deployment_id) if flow_run.deployment_id else None
    return deployment is not None and not deployment.pull_steps and not deployment.storage_document_id


async def delete_clusters(flow_run: FlowRun) -> None:
    """Delete the Dask clusters of a flow run whose process has not closed them; outside of a pod it has none."""
    try:
        kubernetes = settings().kubernetes
    except UsageError:
        return  # the flow run's process refused them too, before it created anything
    if not kubernetes.pod_name:
        return
    from prefect.logging.loggers import flow_run_logger

    from tidepool.operate import own_clusters

    await own_clusters.delete(str(flow_run.id), kubernetes, flow_run_logger(flow_run))


def cause(ending: Ending, memory: Memory | None) -> str:
    """Return why a signal ended a flow run's process, if that is known; empty: Prefect's own words stand."""
    if ending.state or ending.status is None or ending.status >= 0 or memory is None:
        return ""
    from tidepool.report import exits

    name = exits.signal_name(-ending.status)
    if name != "SIGKILL":
        return f"driver's process killed by {name}"
    if not memory.kills:
        return "driver's process killed by SIGKILL, not for its memory limit"
    return exits.driver_out_of_memory(memory.limit)


def report_end(flow_run: FlowRun, ending: Ending, words: str, record_file: str) -> None:
    """Log why a run crashed whose own process could not, killed or not of ours, and write its report.

    Args:
        flow_run: The flow run.
        ending: The end of its process.
        words: Why a signal ended the process, if that is known.
        record_file: File in which the process has kept figures of the run.
    """
    from prefect.logging.loggers import flow_run_logger

    from tidepool.report import run_record, run_report

    record, published = run_record.load(record_file)
    if published or (not ending.state and not ending.status):
        return
    log = flow_run_logger(flow_run)
    try:
        kind = message = ""
        if not ending.state:
            kind = "CANCELLED" if _is_cancelled(flow_run) else "CRASHED"
            message = "cancelled" if kind == "CANCELLED" else words or _without_words(ending)
        if kind == "CRASHED":
            # The page of a run shows its log first, and its state's message on another tab.
            log.error("Crashed: %s", message)
        if settings().report.enabled and (kind or ending.state in _FINAL):
            untold = _UNTOLD if kind else ""
            run_report.publish(flow_run.id, record, kind=kind, message=message, incomplete=untold)
    except Exception as error:  # noqa: BLE001 - a missing report must not keep the state from being reported
        log.warning("the report of the run was not published: %r", error)


def _is_cancelled(flow_run: FlowRun) -> bool:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run.id).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def _without_words(ending: Ending) -> str:
    from tidepool.report import exits

    code = ending.status or 0
    how = f"was killed by {exits.signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    return f"driver's process {how} and reported no state"


def exit_code(ending: Ending) -> int:
    """Return the exit code for the end of a flow run's process; the module's docstring has the table."""
    if ending.state:
        return int(ending.state in {"FAILED", "CRASHED"})
    if ending.status is None:
        return 1
    return 128 - ending.status if ending.status < 0 else ending.status


def main() -> None:
    """Execute the flow run of this environment's PREFECT__FLOW_RUN_ID."""
    asked = early.ask()
    authenticate_handshakes()
    gc.disable()  # modules are no garbage, and there are many
    for module in _IN_BOTH:
        import_module(module)
    from tidepool.upstream.prefect_client import share_tls_contexts

    share_tls_contexts()
    forked_engine = fork(engine.prepare)
    gc.enable()
    if isinstance(forked_engine, Orders):
        engine.begin(forked_engine)
        return
    try:
        _look_after(forked_engine)
    finally:
        # A process that was forked from this one has taken the cluster or deleted it; another knows nothing of it.
        if asked and not (forked_engine and forked_engine.has_orders):
            engine.discard(asked)


def _look_after(forked_engine: Child | None) -> None:
    from prefect.cli import app

    from tidepool.operate import memory
    from tidepool.upstream.prefect_runner import supervise

    endings: list[Ending] = []
    folder = tempfile.TemporaryDirectory(prefix="tidepool-")
    record_file = str(Path(folder.name) / "run.json")

    async def ended(flow_run: FlowRun, ending: Ending) -> str:
        endings.append(ending)
        # Told to end, the process may have exited with 0 from wherever it was.
        if ending.status or told():
            await delete_clusters(flow_run)
        words = cause(ending, memory.read())
        if not told():  # of one that was, whoever gives it its state writes the report
            await asyncio.to_thread(report_end, flow_run, ending, words, record_file)
        return words or (_without_words(ending) if ending.status and not ending.state else "")

    told = supervise(is_in_image, ended, _ENGINE, forked_engine)
    set_prefect_variables({"TIDEPOOL_REPORT_RECORD": record_file})
    sys.argv = ["prefect", "flow-run", "execute"]
    try:
        app()
    except SystemExit as command:
        if command.code and told():
            # Prefect's 1, and its last line "relinquished to infrastructure retry", say nothing of a signal.
            raise SystemExit(_TOLD) from None
        if command.code:
            raise
    sys.exit(exit_code(endings[-1]) if endings else 0)


if __name__ == "__main__":
    main()
