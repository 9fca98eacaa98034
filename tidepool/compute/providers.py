"""Task runners and Dask clients by size and settings. Every flow imports it: nothing heavy at the top."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner

from tidepool.errors import UsageError
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client


def dask_runner(size: str = "small", *, start_early: bool = False, shared: str = "") -> TaskRunner[PrefectFuture[Any]]:
    """Return the task runner for `@flow(task_runner=…)`.

    Args:
        size: Name of the cluster's size: `small`, `medium` or `large`.
        start_early: Start the cluster when the flow begins, while its first tasks run in the flow-run process, and not
            with the first task that is mapped or submitted. For flows that always map.
        shared: Name of a warm cluster that runs share and that outlives them (kubernetes; elsewhere each run has its
            own). For flows that are too short for an own one. All its users name the same size, and have the same
            TIDEPOOL_KUBERNETES_SHARED_KEY.

    Returns:
        A runner that reads the settings when a run begins, not when the flow is imported.
    """
    return DeferredTaskRunner(size, start_early=start_early, shared=shared)


class DeferredTaskRunner(TaskRunner[PrefectFuture[Any]]):
    """Stands for the runner of a flow until the flow runs; Prefect asks every runner for a duplicate then.

    Importing Dask takes as long as importing Prefect, and every-minute flows seldom map anything.

    Args:
        size: Name of the cluster's size.
        start_early: As of `dask_runner`.
        shared: As of `dask_runner`.
    """

    def __init__(self, size: str, *, start_early: bool, shared: str) -> None:
        self.size = size
        self.start_early = start_early
        self.shared = shared
        super().__init__()  # type: ignore[no-untyped-call] # Prefect leaves it unannotated

    # Prefect calls this for every run: the one place where the stand-in becomes the real runner.
    def duplicate(self) -> Any:
        """Return the runner of one run, by the settings.

        Raises:
            UsageError: the size is unknown, or the provider lacks what it needs.
        """
        size, provider = settings().size(self.size), settings().compute.provider
        if provider == "threads":
            from tidepool.compute.threads import ThreadsTaskRunner

            return ThreadsTaskRunner(max_workers=size.workers * size.threads)

        from tidepool.compute.runner.task_runner import TidepoolTaskRunner

        if provider == "address":
            return TidepoolTaskRunner(address=_address())
        start_early = self.start_early
        if provider == "kubernetes":
            from tidepool.compute.clusters.kubernetes.cluster import KubernetesCluster

            options = {"size": size, "shared": self.shared, "allowed_failures": 0}
            return TidepoolTaskRunner(cluster_class=KubernetesCluster, cluster_kwargs=options, start_early=start_early)

        from tidepool.compute.clusters.local import local_cluster

        return TidepoolTaskRunner(cluster_class=local_cluster, cluster_kwargs={"size": size}, start_early=start_early)

    def submit(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse: only a duplicate runs tasks."""
        raise RuntimeError("a deferred task runner runs nothing itself; Prefect calls duplicate() when a run begins")

    map = submit


@contextmanager
def dask_client(size: str = "small", workers: int | None = None, *, shared: str = "") -> Iterator[Client]:
    """Start a Dask cluster for the time of the block, inside one task; a failing close never hides the block's error.

    Args:
        size: Name of the cluster's size.
        workers: Number of workers, instead of the size's own.
        shared: As of `dask_runner`.

    Yields:
        A client of the cluster, which is the default one inside the block, so that `dask.dataframe` computes there.

    Raises:
        UsageError: the size is unknown, or the provider lacks what it needs.
    """
    import distributed

    from tidepool.compute.clusters import local
    from tidepool.compute.run_log import run_log

    chosen = settings().size(size)
    if workers is not None:
        chosen = chosen.model_copy(update={"workers": workers})
    provider = settings().compute.provider
    with ExitStack() as stack:
        if provider == "address":
            cluster: Any = _address()
        elif provider == "kubernetes":
            from tidepool.compute.clusters.kubernetes.cluster import KubernetesCluster

            cluster = stack.enter_context(KubernetesCluster(chosen, shared))
        else:
            cluster = stack.enter_context(local.cluster(chosen, processes=provider == "local"))
        client = stack.enter_context(distributed.Client(cluster, set_as_default=False))
        stack.enter_context(client.as_current())
        if provider == "address":
            run_log().info("Dask cluster at %s: connected", cluster)
        yield client


def use_workers(count: int) -> None:
    """Set how many workers the cluster of the current flow run gets; for flows that have a parameter for it.

    Call it in the flow before its first mapped task, with which the cluster starts. An existing cluster (`address`) and
    the threads of the process (`threads`) stay as they are.

    Args:
        count: Number of workers, instead of the size's own.
    """
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    options = getattr(context.task_runner, "cluster_kwargs", None) if context else None
    if options and "size" in options:
        options["size"] = options["size"].model_copy(update={"workers": count})


def _address() -> str:
    address = settings().compute.address
    if not address:
        raise UsageError(
            "TIDEPOOL_COMPUTE_PROVIDER is `address`, but TIDEPOOL_COMPUTE_ADDRESS is empty: give tcp://host:8786"
        )
    return address
