"""Task runs as they are sent to Dask: the context, the task and the arguments, each pickled once.

The Prefect context and the task are published on the scheduler once per flow run and map. Each task run then carries
only what is its own.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from prefect.context import (
    AssetContext,
    FlowRunContext,
    SettingsContext,
    TagsContext,
    TaskRunContext,
    serialize_context,
)
from prefect.futures import PrefectFuture, PrefectWrappedFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.annotations import unmapped
from prefect.utilities.collections import isiterable, visit_collection
from prefect.utilities.engine import collect_task_run_inputs_sync

from tidepool.compute.limits import (
    TOGETHER_BYTES,
    pickle_argument,
    pickle_arguments,
    pickle_context,
    refuse_arguments,
    refuse_hooks,
)
from tidepool.compute.progress import sketched
from tidepool.compute.runner.futures import Submission, TidepoolFuture
from tidepool.compute.worker import engine, entry
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from uuid import UUID

    from prefect import Task
    from prefect.client.schemas.objects import RunInput
    from prefect_dask.client import PrefectDaskClient

    from tidepool.compute.runner.tracker import Tracker

# A graph of about this size goes to the scheduler at a time: workers begin while the rest is made, memory stays flat.
_GRAPH_TASKS = 500
_GRAPH_BYTES = TOGETHER_BYTES


class Publisher:
    """Pickled contexts and tasks of one flow run, published on a Dask scheduler."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._published: dict[Any, tuple[list[str], Any]] = {}

    def call(self, client: PrefectDaskClient, task: Task[..., Any], shared: dict[str, bytes]) -> list[str]:
        """Publish a task with the arguments that its task runs share; return the metadata path."""
        # Pickled for each submit, as by the stock runner: what a task's function closes over may have changed.
        what = f"task `{task.name}`, with what its function and hooks refer to,"
        # A batch limits each item's result and their sum by itself: refused as a whole, its items would run again.
        limit = sys.maxsize if hasattr(task, "items_per_run") else size_limit(task)
        call = pickle_context(what, engine.Call(task, shared, limit))
        return self._publish(client, hashlib.sha256(call).digest(), call, None)

    def context(self, client: PrefectDaskClient) -> list[str]:
        """Publish the current Prefect context; return the metadata path."""
        flow_run, task_run, active = FlowRunContext.get(), TaskRunContext.get(), SettingsContext.get()
        tags = frozenset(TagsContext.get().current_tags)
        key = (id(flow_run), id(task_run), id(active), tags)
        if key in self._published:
            return self._published[key][0]
        # The objects are kept, so that no other gets their id.
        name = flow_run.flow.name if flow_run and flow_run.flow else "none"
        what = f"the context of flow `{name}`, with its parameters and what its function refers to,"
        with _server_of(flow_run):
            pickled = pickle_context(what, serialize_context())
        return self._publish(client, key, pickled, (flow_run, task_run, active))

    def forget(self, client: PrefectDaskClient) -> None:
        """Remove what was published."""
        if client.status == "running":
            client.run_on_scheduler(entry.forget, f"tidepool-{client.id}")

    def _publish(self, client: PrefectDaskClient, key: Any, data: bytes, keep: Any) -> list[str]:
        with self._lock:
            if key not in self._published:
                path = [f"tidepool-{client.id}", str(len(self._published))]
                client.set_metadata(path, data)
                self._published[key] = (path, keep)
            return self._published[key][0]


@contextmanager
def _server_of(flow_run: FlowRunContext | None) -> Iterator[None]:
    """Make the server that Prefect has started for a flow run without an API URL its API URL.

    Each Dask worker would start one of its own, on the same database: on a busy machine not within Prefect's time.
    """
    if PREFECT_API_URL.value() or flow_run is None:
        yield
        return
    with temporary_settings({PREFECT_API_URL: str(flow_run.client.api_url)}):
        yield


class Mapping:
    """The task runs of one map, or of one submit.

    Args:
        tracker: Sends and settles them.
        task: The task.
        call: Metadata path of its pickled `worker.engine.Call`.
        shared: The arguments in it, unpickled, by parameter.
    """

    def __init__(self, tracker: Tracker, task: Task[..., Any], call: list[str], shared: dict[str, Any]) -> None:
        self.task = task
        self._tracker = tracker
        self._call = call
        self._shared = shared
        self._no_inputs: dict[str, set[RunInput]] = {}
        self._futures: list[TidepoolFuture[Any]] = []
        self._bytes = 0

    def send(self) -> None:
        """Send all task runs that were added."""
        futures, self._futures, self._bytes = self._futures, [], 0
        if futures:
            self._tracker.submit(futures)

    def add(
        self,
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None,
        dependencies: dict[str, set[RunInput]] | None,
        context: list[str],
    ) -> TidepoolFuture[Any]:
        """Return the future of a new task run, which is sent with the next graph.

        Args:
            parameters: Its arguments by parameter; futures among them are its dependencies.
            wait_for: Futures that have to be completed before.
            dependencies: Task runs that each parameter comes from, beyond those found in `parameters`.
            context: Metadata path of the pickled Prefect context.

        Raises:
            ArgumentRefusedError: an argument is too large to travel, or cannot be pickled.
            UsageError: the task has hooks of a transaction, inside of one.
        """
        refuse_hooks(self.task)
        task, task_run_id = self.task, uuid4()
        inputs = {
            name: collect_task_run_inputs_sync(value) | (dependencies or {}).get(name, set())
            for name, value in parameters.items()
        }
        if not any(inputs.values()):
            # As in most maps: one dictionary serves all of them.
            inputs = self._no_inputs = self._no_inputs or inputs
        upstreams: list[TidepoolFuture[Any]] = []

        def placeholder(part: Any) -> Any:
            if isinstance(part, TidepoolFuture) and part.changed is self._tracker.changed:
                if part not in upstreams:
                    upstreams.append(part)
                return engine.Upstream(upstreams.index(part))
            if isinstance(part, PrefectWrappedFuture):
                # A future of another runner in this process cannot travel, its final state can.
                part.wait()
                return part.state
            return part

        def sendable(value: Any) -> Any:
            return visit_collection(value, visit_fn=placeholder, return_data=True)

        sent = engine.Payload(
            task_run_id=task_run_id,
            parameters={
                name: engine.Shared() if name in self._shared and self._shared[name] is value else sendable(value)
                for name, value in parameters.items()
            },
            wait_for=sendable(list(wait_for)) if wait_for else None,
            dependencies=inputs,
            assets=_assets(task, task_run_id, inputs),
        )
        try:
            payload = pickle_argument(sent)
        except Exception:
            pickle_arguments(task.name, sent.parameters)  # it names the argument
            raise
        limit = size_limit(task)
        if len(payload) > limit:
            pickled = pickle_arguments(task.name, {name: sendable(value) for name, value in parameters.items()})
            refuse_arguments(task.name, {name: len(data) for name, data in pickled.items()}, limit)
        own = {name: value for name, value in sent.parameters.items() if not isinstance(value, engine.Shared)}
        item = "" if hasattr(task, "items_per_run") else sketched(own)
        submission = Submission(task, self._call, context, payload, inputs, upstreams, item)
        future: TidepoolFuture[Any] = TidepoolFuture(task_run_id, submission, self._tracker.changed)
        self._futures.append(future)
        self._bytes += len(payload)
        if len(self._futures) >= _GRAPH_TASKS or self._bytes >= _GRAPH_BYTES:
            self.send()
        return future


def shared_arguments(task: Task[..., Any], parameters: dict[str, Any]) -> dict[str, tuple[Any, bytes]]:
    """Return the arguments that are the same for all task runs of a map, each with its pickle.

    Raises:
        ArgumentRefusedError: one of them is too large to travel, or cannot be pickled.
    """
    shared = {
        name: value.unwrap() if isinstance(value, unmapped) else value
        for name, value in parameters.items()
        if isinstance(value, unmapped) or not (isiterable(value) or isinstance(value, (PrefectFuture, tuple)))
    }
    pickled = pickle_arguments(task.name, {name: value for name, value in shared.items() if not _has_futures(value)})
    refuse_arguments(task.name, {name: len(data) for name, data in pickled.items()}, size_limit(task))
    return {name: (shared[name], data) for name, data in pickled.items()}


def size_limit(task: Task[..., Any]) -> int:
    """Return the bytes that an argument or a result of the task may have; the argument of a batch has many items."""
    each = settings().compute.argument_limit_bytes
    return max(each, min(each * getattr(task, "items_per_run", 1), _GRAPH_BYTES))


def _assets(task: Task[..., Any], task_run_id: UUID, inputs: dict[str, set[RunInput]]) -> dict[str, Any] | None:
    context = AssetContext.from_task_and_inputs(task, task_run_id, inputs, copy_to_child_ctx=True)
    if context.direct_asset_dependencies or context.downstream_assets or context.upstream_assets:
        return context.serialize()
    if flow_run_context := FlowRunContext.get():
        # Prefect notes an empty set for each task run: 2.5 MB for ten thousand.
        flow_run_context.task_run_assets.pop(task_run_id, None)
    return None


def _has_futures(value: Any) -> bool:
    found = []

    def look(part: Any) -> None:
        if isinstance(part, PrefectFuture):
            found.append(part)

    visit_collection(value, visit_fn=look, return_data=False)
    return bool(found)
