"""Entry point of a flow run's pod, `python -m tidepool.operate.flow_run`: a faster `prefect flow-run execute`.

Prefect looks after a run with one Python process, prepares its code with a second and executes it with a third; each
imports Prefect for a second. Here the first one prepares the code too, when there is nothing to prepare: the image is
the code. All else is Prefect's: cancellation, SIGTERM, hooks, exit code.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import TYPE_CHECKING

from tidepool.settings import environment, set_prefect_variables

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun


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


def main() -> None:
    """Execute the flow run of this environment's PREFECT__FLOW_RUN_ID."""
    authenticate_handshakes()
    from prefect.cli import app

    from tidepool.upstream.prefect_runner import prepare_in_process

    prepare_in_process(is_in_image)
    sys.argv = ["prefect", "flow-run", "execute"]
    app()


if __name__ == "__main__":
    main()
