"""Private parts of distributed's `Cluster`, the base class of cluster managers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from distributed.core import rpc
from distributed.deploy.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

T = TypeVar("T")


class RemoteCluster(Cluster):
    """A Dask cluster whose scheduler runs elsewhere: `connect` and `disconnect` run on the event loop of `start_soon`.

    Why: distributed documents `Cluster` as the base class of cluster managers, but the two methods that follow a
    scheduler (`_start`, `_close`) and the owner of the event loop (`_loop_runner`) have private names.
    Watch: `distributed.deploy.cluster.Cluster` and its subclass `SpecCluster`, which uses the same names.
    Delete when: distributed has a public class of clusters that are connected to, and not started.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, quiet=True)  # type: ignore[no-untyped-call]
        self._loop_runner.start()

    def start_soon(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the cluster's event loop, without waiting for it."""
        loop: Any = self.loop
        return asyncio.run_coroutine_threadsafe(coroutine, loop.asyncio_loop)

    async def connect(self, address: str) -> None:
        """Connect to the scheduler; from now on `scheduler_info` follows it."""
        self.scheduler_comm = rpc(address)
        await super()._start()  # type: ignore[no-untyped-call]

    async def disconnect(self) -> None:
        """Close the connections to the scheduler, which goes on running; the cluster's status is then closed."""
        await super()._close()  # type: ignore[no-untyped-call]

    def stop_loop(self) -> None:
        """Stop the event loop and its thread."""
        self._loop_runner.stop()
