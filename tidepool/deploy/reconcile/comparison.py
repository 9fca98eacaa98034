"""Comparison of Git with the server: the check of the files, both states, and the plan between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidepool.deploy.client import pages
from tidepool.deploy.config import automations, checks, environments, placeholders
from tidepool.deploy.reconcile import actual, desired
from tidepool.deploy.reconcile.plan import UNKNOWN, Kind, Resource, lost_pauses, make_plan
from tidepool.deploy.reconcile.work_pool import with_installed
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.config.yaml_source import Problem
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
    images = (each.fields["job_variables"].get("image") for each in wanted.resources if each.kind is Kind.DEPLOYMENT)
    if any(image is UNKNOWN for image in images):
        yield "the image is not compared: only the build knows it; use --image NAME@sha256:… to compare it"
    if wanted.unset:
        yield f"not compared, as these variables are not set: {', '.join(wanted.unset)}"
    if wanted.server_file.automations and not notified:
        yield "automations send no notifications: TIDEPOOL_NOTIFY_URLS is empty"
    for lost in lost_pauses(plan):
        yield f"an apply refuses this plan: {lost}"
    for each in plan.unmanaged:
        yield f"schedule {each.name} was added on the server and is unmanaged: a deploy leaves it alone"


def check(
    client: SyncPrefectClient | None,
    repository: Path,
    environment: str,
    owner: str,
    *,
    image: str | None = None,
    deploying: bool = False,
    served: bool = True,
) -> list[Problem]:
    """Return the problems of the files in Git, against what the server has too if there is a client.

    Args:
        client: A client of the server.
        repository: The folder that holds prefect.yaml.
        environment: production, or the name of an overlay.
        owner: Owner of the managed resources.
        image: As for `environments.load`.
        deploying: A deploy follows: environment variables must have their values now.
        served: The server is that of the environment, so that it must have its work pools, variables and blocks.
    """
    try:
        manifest = environments.load(repository, environment, image)
        in_git = {pool.name: automations.template(repository, pool) for pool in automations.load(repository).work_pools}
    except (UsageError, ValueError, OSError):
        manifest, in_git = {}, {}  # files of another shape: the check reports it
    known = None if client is None else server(client, manifest, in_git)
    if known and not served:
        known = checks.Server({name: each for name, each in known.templates.items() if each is not None})
    return checks.check(repository, environment, owner=owner, server=known, deploying=deploying, image=image)


def server(client: SyncPrefectClient, manifest: Any, in_git: Mapping[str, Any]) -> checks.Server:
    """Read what the checks of a prefect file need to know of the server.

    Args:
        client: A client of the server.
        manifest: The prefect file.
        in_git: Base job templates that an apply will write, by work pool.
    """
    pools = sorted(checks.pools(manifest))
    found = pages(client, "/work_pools/filter", {"work_pools": {"name": {"any_": pools}}})
    existing = {each["name"]: each["base_job_template"] for each in found}
    templates = {
        name: with_installed(in_git[name], existing[name])
        if name in in_git and name in existing
        # A pool that is in Git only will be created.
        else existing.get(name, in_git.get(name))
        for name in pools
    }
    variables = {each["name"] for each in pages(client, "/variables/filter", {})}
    return checks.Server(templates, frozenset(variables), frozenset(_existing_blocks(client, manifest)))


def _existing_blocks(client: SyncPrefectClient, manifest: Any) -> Iterator[str]:
    """Yield the blocks that a prefect file names and the server has, as `type/name`."""
    from prefect.exceptions import ObjectNotFound

    names = {name for name in placeholders.find(manifest) if name.startswith(placeholders.BLOCK)}
    for kind, block in {(*name.removeprefix(placeholders.BLOCK).split("."), "")[:2] for name in names}:
        try:
            client.read_block_document_by_name(block, kind, include_secrets=False)
        except ObjectNotFound:
            continue
        yield f"{kind}/{block}"
