"""Comparison of Git with the server: the check of the files, both states, and the plan between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidepool.deploy.config import automations, checks, environments
from tidepool.deploy.config.yaml_source import raise_if_any
from tidepool.deploy.reconcile import actual, desired
from tidepool.deploy.reconcile.plan import UNKNOWN, make_plan
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.reconcile.actual import ActualState
    from tidepool.deploy.reconcile.desired import DesiredState
    from tidepool.deploy.reconcile.plan import Plan


@dataclass(frozen=True)
class Comparison:
    """Desired state, actual state, and the plan that makes the second the first."""

    desired: DesiredState
    actual: ActualState
    plan: Plan

    @property
    def notes(self) -> list[str]:
        """Remarks that a reviewer should read with the plan."""
        notes = []
        if any(_has_unknown(each.fields) for each in self.desired.resources):
            notes.append("the image is not compared: only the build knows it; use --image NAME@sha256:… to compare it")
        if self.desired.unset:
            notes.append(f"not compared, as these variables are not set: {', '.join(self.desired.unset)}")
        notified = self.actual.block or self.desired.has_notification_targets
        if self.desired.server_file.automations and not notified:
            notes.append("automations send no notifications: TIDEPOOL_NOTIFY_URLS is empty")
        notes += [
            f"schedule {each.name} was added on the server and is unmanaged: a deploy leaves it alone"
            for each in self.plan.unmanaged
        ]
        return notes


def compare(
    client: SyncPrefectClient,
    repository: Path,
    environment: str,
    owner: str,
    *,
    image: str | None = None,
    version: str | None = None,
    checked: bool = False,
) -> Comparison:
    """Compare Git with the server.

    Args:
        client: A client of the server.
        repository: The folder that holds prefect.yaml.
        environment: production, or the name of an overlay.
        owner: Owner of the managed resources.
        image: As for `environments.load`.
        version: As for `environments.load`.
        checked: Skip the check of the files, which has been made when the image was built.

    Raises:
        UsageError: the files have problems; all of them, with their lines.
    """
    if not checked:
        check(client, repository, environment, owner)
    wanted = desired.load(repository, environment, owner, image=image, version=version)
    there = actual.read(client, owner, wanted)
    resources = wanted.with_automations(owner, block=bool(there.block))
    return Comparison(desired=wanted, actual=there, plan=make_plan(resources, there.resources))


def check(client: SyncPrefectClient | None, repository: Path, environment: str, owner: str) -> None:
    """Check the files in Git, against the server's work pools too if there is a client.

    Raises:
        UsageError: they have problems; all of them, with their lines.
    """
    found: dict[str, Mapping[str, Any] | None] = {}
    if client is not None:
        try:
            wanted = checks.pools(environments.load(repository, environment))
            in_git = {pool.name for pool in automations.load(repository).work_pools}
        except (UsageError, ValueError, KeyError, TypeError, AttributeError):
            wanted, in_git = set(), set()  # files of another shape: the check reports it
        found = templates(client, wanted - in_git)
    raise_if_any(checks.check(repository, environment, owner=owner, templates=found))


def templates(client: SyncPrefectClient, names: Iterable[str]) -> dict[str, Mapping[str, Any] | None]:
    """Return base job templates of the server's work pools; None for a missing pool."""
    from prefect.exceptions import ObjectNotFound

    found: dict[str, Mapping[str, Any] | None] = {}
    for name in sorted(names):
        try:
            found[name] = client.read_work_pool(name).base_job_template
        except ObjectNotFound:
            found[name] = None
    return found


def _has_unknown(value: object) -> bool:
    if isinstance(value, dict):
        return any(_has_unknown(item) for item in value.values())
    return value is UNKNOWN
