"""Private parts of dask-kubernetes' operator. Importing it registers the controller's handlers with kopf."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import kopf
from dask_kubernetes.operator.controller import controller

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# The controller's timer for idle clusters.
# Why: tidepool deletes idle clusters by a loop of its own, without the finalizer that kopf adds for a timer.
# Watch: `daskcluster_autoshutdown` in dask_kubernetes/operator/controller/controller.py.
# Delete when: dask-kubernetes can run without it.
IDLE_TIMER = controller.daskcluster_autoshutdown

# The controller's handlers of the pods of DaskJobs.
# Why: flow runs may not have DaskJobs, and for these three the operator gets every change of every pod.
# Watch: `handle_runner_status_change_*` in the same file.
# Delete when: dask-kubernetes watches only pods with the label of a job's runner.
JOB_PODS = (
    controller.handle_runner_status_change_running,
    controller.handle_runner_status_change_succeeded,
    controller.handle_runner_status_change_failed,
)

# The controller's handler of a changed number of workers.
# Why: `daskworkergroup_create` calls it, and kopf does a second time, which reads all Deployments only to count them.
# Watch: `daskworkergroup_create` and `daskworkergroup_replica_update` in the same file.
# Delete when: the handler of the field has `old=kopf.PRESENT`.
SCALE_WORKERS = controller.daskworkergroup_replica_update

# What the controller expects of `ask_schedulers_by`, and catches.
SchedulerCommError = controller.SchedulerCommError


def ask_schedulers_by(
    desired_workers: Callable[..., Awaitable[int]], retire_workers: Callable[..., Awaitable[list[str]]]
) -> None:
    """Have the controller ask schedulers by these functions.

    Why: its own read answers of any size, and it deletes the Deployment of any name, or path, that a scheduler answers.
    Watch: `get_desired_workers` and `retire_workers`, of which it calls its module's.
    Delete when: it bounds the answers and deletes only Deployments of the worker group.
    """
    controller.get_desired_workers = desired_workers
    controller.retire_workers = retire_workers


def own_worker_groups() -> None:
    """Have the controller create a cluster's worker group with its owner reference.

    Why: the controller adds the reference later, when it handles the group. The group of a cluster that was deleted by
    then is orphaned forever.
    Watch: `build_default_worker_group_spec` and its use in `daskcluster_create_components`.
    Delete when: the controller adopts the group before it creates it, as it does with scheduler and Service.
    """
    build = controller.build_default_worker_group_spec

    def owned(*args: Any, **kwargs: Any) -> dict[str, Any]:
        group: dict[str, Any] = build(*args, **kwargs)
        kopf.adopt(group)
        return group

    controller.build_default_worker_group_spec = owned
