"""Comparison of Git with the server: the check of the files, both states, and the plan between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidepool.deploy.client import pages
from tidepool.deploy.config import automations, checks, environments
from tidepool.deploy.config.yaml_source import raise_if_any
from tidepool.deploy.reconcile import actual, desired
from tidepool.deploy.reconcile.plan import UNKNOWN, Kind, Resource, make_plan
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.reconcile.desired import DesiredState
    from tidepool.deploy.reconcile.plan import ActualResource, Plan


@dataclass(frozen=True)
class Comparison:
    """Desired state, actual state, the plan that makes the second the first, and remarks for its reviewer."""

    desired: DesiredState
    actual: list[ActualResource]
    plan: Plan
    notes: list[str]


def compare(
    client: SyncPrefectClient,
    repository: Path,
    environment: str,
    owner: str,
    *,
    image: str | None = None,
    version: str | None = None,
) -> Comparison:
    """Compare Git with the server. The files have been checked.

    Args:
        client: A client of the server.
        repository: The folder that holds prefect.yaml.
        environment: production, or the name of an overlay.
        owner: Owner of the managed resources.
        image: As for `environments.load`. Without it, an image that has yet to be built is not compared.
        version: As for `environments.load`.

    Raises:
        UsageError: a file cannot be read, or an entrypoint cannot be imported.
    """
    wanted = desired.load(repository, environments.load(repository, environment, image, version), owner)
    found = actual.read(client, owner, wanted)
    notified = any(each.kind is Kind.NOTIFICATION for each in [*wanted.resources, *found])
    listed = wanted.server_file.automations
    rest = [Resource(Kind.AUTOMATION, each.name, automations.fields(each, owner, notified=notified)) for each in listed]
    plan = make_plan([*wanted.resources, *rest], found)
    return Comparison(wanted, found, plan, list(_notes(wanted, plan, notified=notified)))


def _notes(wanted: DesiredState, plan: Plan, *, notified: bool) -> Iterator[str]:
    if any(_has_unknown(each.fields) for each in wanted.resources):
        yield "the image is not compared: only the build knows it; use --image NAME@sha256:… to compare it"
    if wanted.unset:
        yield f"not compared, as these variables are not set: {', '.join(wanted.unset)}"
    if wanted.server_file.automations and not notified:
        yield "automations send no notifications: TIDEPOOL_NOTIFY_URLS is empty"
    for each in plan.unmanaged:
        yield f"schedule {each.name} was added on the server and is unmanaged: a deploy leaves it alone"


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
    wanted = sorted(names)
    found = pages(client, "/work_pools/filter", {"work_pools": {"name": {"any_": wanted}}})
    return {**dict.fromkeys(wanted), **{each["name"]: each["base_job_template"] for each in found}}


def _has_unknown(value: object) -> bool:
    if isinstance(value, dict):
        return any(_has_unknown(item) for item in value.values())
    return value is UNKNOWN
