"""Entry point of a flow run's pod, `python -m tidepool.operate.flow_run`: a faster `prefect flow-run execute`.

Prefect looks after a run with one Python process, prepares its code with a second and executes it with a third; each
imports Prefect for a second. Here the first one prepares the code too, when there is nothing to prepare: the image is
the code. All else is Prefect's: cancellation, SIGTERM, hooks, exit code.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client

from tidepool.upstream.prefect_runner import prepare_in_process

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun


async def is_in_image(flow_run: FlowRun) -> bool:
    """Return whether the flow's code is complete in the image. Pull steps may change their process: not this one."""
    async with get_client() as client:
        deployment = await client.read_deployment(flow_run.deployment_id) if flow_run.deployment_id else None
    return deployment is not None and not deployment.pull_steps and not deployment.storage_document_id


def main() -> None:
    """Execute the flow run of this environment's PREFECT__FLOW_RUN_ID."""
    from prefect.cli import app

    prepare_in_process(is_in_image)
    sys.argv = ["prefect", "flow-run", "execute"]
    app()


if __name__ == "__main__":
    main()
