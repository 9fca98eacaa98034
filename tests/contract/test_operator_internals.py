"""What tidepool.operate.dask_operator relies on inside dask-kubernetes 2026.3 and kopf 1.45.

If one fails: read the new controller and kopf's registries, change `dask_operator`, and run `make test-cluster`.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import kopf
from dask_kubernetes.operator.controller import controller

from tidepool.operate import dask_operator


def _timers(registry: kopf.OperatorRegistry) -> set[str]:
    return {each.fn.__name__ for each in registry._spawning.get_all_handlers()}


def test_no_handler_asks_for_a_finalizer_on_a_cluster() -> None:
    here = kopf.get_default_registry()
    registry: Any = SimpleNamespace(_spawning=SimpleNamespace(_handlers=list(here._spawning._handlers)))

    assert _timers(here) == {"daskcluster_autoshutdown", "daskautoscaler_adapt"}
    dask_operator.remove_idle_timers(registry)

    assert [each.fn for each in registry._spawning._handlers] == [controller.daskautoscaler_adapt]
    removers = [each for each in here._changing.get_all_handlers() if each.requires_finalizer]
    assert removers == [], "a handler of removals"


def test_the_controller_makes_its_worker_group_by_the_function_that_is_replaced() -> None:
    source = inspect.getsource(controller.daskcluster_create_components)
    assert "build_default_worker_group_spec(" in source
    assert "kopf.adopt(data)\n    worker_group" not in source, "upstream adopts it now: remove _owned_worker_group"
