"""Entry point of a flow run's pod, `python -m tidepool.operate.flow_run`: a faster `prefect flow-run execute`.

Prefect looks after a run with one Python process, prepares its code with a second and executes it with a third; each
imports Prefect for a second. Here the first one prepares the code too, when there is nothing to prepare: the image is
the code. When the process that executes the flow was killed, the first one deletes the run's Dask clusters; its exit
code, and so the state of pod and Job, is the run's. All else is Prefect's: cancellation, SIGTERM, hooks.

| the run | exit code |
|---|---|
| Completed, Cancelled, to be executed again (Scheduled, Paused) | 0 |
| Failed; Crashed, as its own process or Prefect reported; told to end by SIGTERM | 1 |
| Crashed, because its process was killed by signal N (9: also out of memory) | 128 + N |
| Crashed, because its process ended with exit code N and no report | N |
"""

from __future__ import annotations

import base64
import json
import signal
import sys
from typing import TYPE_CHECKING

from tidepool.errors import UsageError
from tidepool.settings import environment, set_prefect_variables, settings

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from tidepool.operate.memory import Memory
    from tidepool.upstream.prefect_runner import Ending


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


async def delete_clusters(flow_run: FlowRun, ending: Ending) -> None:
    """Delete the Dask clusters of a flow run whose process ended badly; outside of a pod it has none."""
    if not ending.status:
        return
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
    name = signal.Signals(-ending.status).name
    if name != "SIGKILL":
        return f"driver's process killed by {name}"
    if not memory.kills:
        return "driver's process killed by SIGKILL, not for its memory limit"
    limit = f"limit {memory.limit}" if memory.limit else "no limit: the node's"
    return f"driver out of memory ({limit}); raise memory_limit"


def exit_code(ending: Ending) -> int:
    """Return the exit code for the end of a flow run's process; the module's docstring has the table."""
    if ending.state:
        return int(ending.state in {"FAILED", "CRASHED"})
    if ending.status is None:
        return 1
    return 128 - ending.status if ending.status < 0 else ending.status


def main() -> None:
    """Execute the flow run of this environment's PREFECT__FLOW_RUN_ID."""
    authenticate_handshakes()
    from prefect.cli import app

    from tidepool.operate import memory
    from tidepool.upstream.prefect_runner import supervise

    endings: list[Ending] = []

    async def ended(flow_run: FlowRun, ending: Ending) -> str:
        endings.append(ending)
        await delete_clusters(flow_run, ending)
        return cause(ending, memory.read())

    supervise(is_in_image, ended)
    sys.argv = ["prefect", "flow-run", "execute"]
    try:
        app()
    except SystemExit as command:
        if command.code:
            raise
    sys.exit(exit_code(endings[-1]) if endings else 0)


if __name__ == "__main__":
    main()
