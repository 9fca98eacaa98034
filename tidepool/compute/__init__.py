"""Task runners and Dask clusters for mapped tasks.

`@flow(task_runner=dask_runner("small"))` runs the tasks that a flow maps or submits on a Dask cluster of that size;
tasks that it calls directly run in the flow-run process. `map_batched(task, items)` runs many items per task run.
`with dask_client("small") as client:` is a cluster inside one task. Which kind of cluster (`local`, `threads`,
`address`, `kubernetes`) is the setting `TIDEPOOL_COMPUTE_PROVIDER`, not the flow's concern. The cluster starts with the
first task that is submitted: a run that submits none costs none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidepool.compute.batches import BatchError, FailedItem, map_batched
    from tidepool.compute.providers import dask_client, dask_runner, use_workers

__all__ = ["BatchError", "FailedItem", "dask_client", "dask_runner", "map_batched", "use_workers"]

_OF_BATCHES = {"BatchError", "FailedItem", "map_batched"}


def __getattr__(name: str) -> object:
    # Not imported above: a Dask scheduler imports modules of this package and must not pay for Prefect.
    if name in __all__:
        module = "batches" if name in _OF_BATCHES else "providers"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
