"""Private parts of distributed's `Cluster`, the base class of cluster managers."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import dask.config
from distributed.core import rpc
from distributed.deploy.cluster import Cluster
from distributed.security import Security

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from concurrent.futures import Future

T = TypeVar("T")

# By the address of their schedulers.
_connected: weakref.WeakValueDictionary[str, RemoteCluster] = weakref.WeakValueDictionary()


def security_of(connection: Mapping[str, str]) -> Security | None:
    """Return how `Client(address)` connects to a cluster that this process is connected to.

    `prefect_dask.get_dask_client` knows the address only. Dask's setting `client.security-loader` names this function.
    """
    cluster = _connected.get(connection["address"])
    return cluster.security if cluster else None


class RemoteCluster(Cluster):
    """A Dask cluster whose scheduler runs elsewhere: `connect` and `disconnect` run on the event loop of `start_soon`.

    Why: distributed documents `Cluster` as the base class of cluster managers, but the two methods that follow a
    scheduler (`_start`, `_close`) and the owner of the event loop (`_loop_runner`) have private names.
    Watch: `distributed.deploy.cluster.Cluster` and its subclass `SpecCluster`, which uses the same names.
    Delete when: distributed has a public class of clusters that are connected to, and not started.

    Attributes:
        security: Key and certificate for its connections and those of `Client(cluster)`; None for Dask's settings.
    """

    security: Security | None = None

    def __init__(self, name: str) -> None:
        super().__init__(name=name, quiet=True)  # type: ignore[no-untyped-call]
        self._loop_runner.start()

    def start_soon(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the cluster's event loop, without waiting for it."""
        loop: Any = self.loop
        return asyncio.run_coroutine_threadsafe(coroutine, loop.asyncio_loop)

    def caller(self, address: str) -> rpc:
        """Return a caller of the cluster's process at that address."""
        security = self.security or Security()
        return rpc(address, connection_args=security.get_connection_args("client"))

    async def connect(self, address: str) -> None:
        """Connect to the scheduler; from now on `scheduler_info` follows it."""
        self.scheduler_comm = self.caller(address)
        _connected[address] = self
        if not dask.config.get("distributed.client.security-loader", None):
            dask.config.set({"distributed.client.security-loader": f"{__name__}.{security_of.__name__}"})
        await super()._start()  # type: ignore[no-untyped-call]

    async def disconnect(self) -> None:
        """Close the connections to the scheduler, which goes on running; the cluster's status is then closed."""
        await super()._close()  # type: ignore[no-untyped-call]

    def stop_loop(self) -> None:
        """Stop the event loop and its thread."""
        self._loop_runner.stop()
