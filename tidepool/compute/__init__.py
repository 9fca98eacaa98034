"""Task runners and Dask clusters for mapped tasks.

`@flow(task_runner=dask_runner("small"))` runs the tasks that a flow maps or submits on a Dask cluster of that size;
tasks that it calls directly run in the flow-run process. `with dask_client("small") as client:` is a cluster inside one
task. Which kind of cluster (`local`, `threads`, `address`, `kubernetes`) is the setting `TIDEPOOL_COMPUTE_PROVIDER`,
not the flow's concern. The cluster starts with the first task that is submitted: a run that submits none costs none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidepool.compute.providers import dask_client, dask_runner, use_workers

__all__ = ["dask_client", "dask_runner", "use_workers"]


def __getattr__(name: str) -> object:
    # Not imported above: a Dask scheduler imports modules of this package and must not pay for Prefect.
    if name in __all__:
        return getattr(import_module("tidepool.compute.providers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
