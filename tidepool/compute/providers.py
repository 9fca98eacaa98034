"""From a size and the settings to a task runner or a Dask client. Every flow imports it: nothing heavy at the top."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from tidepool.errors import UsageError
from tidepool.settings import SizeSettings, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client


def dask_runner(size: str = "small") -> TaskRunner[PrefectFuture[Any]]:
    """The task runner for `@flow(task_runner=…)`.

    Args:
        size: Name of the cluster's size: `small`, `medium` or `large`.

    Returns:
        A runner that reads the settings when a run begins, not when the flow is imported.
    """
    return DeferredTaskRunner(size)


class DeferredTaskRunner(TaskRunner[PrefectFuture[Any]]):
    """Stands for the runner of a flow until the flow runs; Prefect asks every runner for a duplicate then.

    Importing Dask takes as long as importing Prefect, and every-minute flows seldom map anything.

    Args:
        size: Name of the cluster's size.
    """

    def __init__(self, size: str) -> None:
        self.size = size
        super().__init__()  # type: ignore[no-untyped-call] # Prefect leaves it unannotated

    # Prefect calls this for every run: the one place where the stand-in becomes the real runner.
    def duplicate(self) -> TaskRunner[PrefectFuture[Any]]:  # type: ignore[override]
        """The runner of one run, as the settings say.

        Raises:
            UsageError: the size is unknown, or the provider lacks what it needs.
        """
        return _runner(settings().size(self.size))

    def submit(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuses: only a duplicate runs tasks."""
        raise RuntimeError("a deferred task runner runs nothing itself; Prefect calls duplicate() when a run begins")

    map = submit


@contextmanager
def dask_client(size: str = "small", workers: int | None = None) -> Iterator[Client]:
    """A Dask cluster for the time of the block, inside one task; what fails to close never hides the block's own error.

    Args:
        size: Name of the cluster's size.
        workers: Number of workers, in place of the size's own.

    Yields:
        A client of the cluster, which is the default one inside the block, so that `dask.dataframe` computes there.

    Raises:
        UsageError: the size is unknown, or the provider lacks what it needs.
    """
    from tidepool.compute import local

    chosen = settings().size(size)
    if workers is not None:
        chosen = chosen.model_copy(update={"workers": workers})
    provider = settings().compute.provider
    if provider == "address":
        with local.existing(_address()) as client:
            yield client
    elif provider == "kubernetes":
        _no_kubernetes()
    else:
        with local.cluster(chosen, processes=provider == "local") as cluster, local.client(cluster) as client:
            yield client


def use_workers(count: int) -> None:
    """Sets how many workers the cluster of the current flow run gets; for flows whose parameters say it.

    Call it in the flow before its first mapped task, with which the cluster starts. A cluster of another's making
    (`address`) and the threads of the process (`threads`) stay as they are.

    Args:
        count: Number of workers, in place of the size's own.
    """
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    options = getattr(context.task_runner, "cluster_kwargs", None) if context else None
    if options and "size" in options:
        options["size"] = options["size"].model_copy(update={"workers": count})


def _runner(size: SizeSettings) -> TaskRunner[PrefectFuture[Any]]:
    provider = settings().compute.provider
    if provider == "threads":
        return cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=size.workers * size.threads))

    from tidepool.compute.runner import TidepoolTaskRunner

    if provider == "address":
        return TidepoolTaskRunner(address=_address())
    if provider == "kubernetes":
        _no_kubernetes()

    from tidepool.compute.local import local_cluster

    return TidepoolTaskRunner(cluster_class=local_cluster, cluster_kwargs={"size": size})


def _address() -> str:
    address = settings().compute.address
    if not address:
        raise UsageError(
            "TIDEPOOL_COMPUTE_PROVIDER is `address`, but TIDEPOOL_COMPUTE_ADDRESS is empty: give tcp://host:8786"
        )
    return address


def _no_kubernetes() -> NoReturn:
    """The place of the Kubernetes provider (`tidepool.compute.kubernetes`)."""
    raise UsageError("TIDEPOOL_COMPUTE_PROVIDER=kubernetes is not built yet; the providers are local, threads, address")
