"""Private parts of prefect-dask, and of Prefect's futures that it builds on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from prefect_dask.task_runners import DaskTaskRunner, PrefectDaskFuture

if TYPE_CHECKING:
    from contextlib import ExitStack

    from distributed.deploy.cluster import Cluster
    from prefect_dask.client import PrefectDaskClient

R = TypeVar("R")


class DaskRunner(DaskTaskRunner):
    """The stock runner, with public names for the parts that a subclass needs.

    Why: the stock constructor and client are kept as they are; only submission, following and closing are replaced.
    Watch: `prefect_dask.task_runners.DaskTaskRunner.__init__` and `client`.
    Delete when: these attributes are public, or `TidepoolTaskRunner` no longer extends the stock runner.
    """

    @property
    def connected(self) -> PrefectDaskClient | None:
        """The Dask client, if there is one yet; `client` creates it."""
        return self._client

    @property
    def cluster(self) -> Cluster | None:
        """The Dask cluster, given or created; None before that, and for an address."""
        return self._cluster

    @cluster.setter
    def cluster(self, cluster: Cluster | None) -> None:
        self._cluster = cluster

    @property
    def exit_stack(self) -> ExitStack:
        """Closes the client and the cluster that the runner created."""
        return self._exit_stack

    @property
    def started(self) -> bool:
        """True between entering and leaving the runner."""
        return bool(self._started)

    @started.setter
    def started(self, started: bool) -> None:
        self._started = started


class DaskFuture(PrefectDaskFuture[R]):
    """The stock future, final as soon as `outcome` is set.

    Why: `prefect.futures.wait` and `as_completed` ask `_final_state` for its truth only. A whole `State` in each of
    ten thousand futures would fill the driver's memory.
    Watch: the uses of `_final_state` in `prefect.futures`.
    Delete when: Prefect asks futures whether they are done by a public method.
    """

    @property
    def outcome(self) -> Any:
        """Anything true once the task run is final; None before."""
        return self._final_state

    @outcome.setter
    def outcome(self, outcome: Any) -> None:
        self._final_state = outcome
