"""Git beside the server: the strict check, both sides, and the plan between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidepool.deploy.config import automations, checks, environments
from tidepool.deploy.reconcile import actual, desired, plan
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from prefect.client.orchestration import SyncPrefectClient


@dataclass(frozen=True)
class Situation:
    """Git, the server, and what would change."""

    desired: desired.Desired
    state: actual.State
    plan: plan.Plan

    @property
    def notes(self) -> list[str]:
        """What a person should know besides the changes."""
        notes = []
        if any(_has_unknown(thing.fields) for thing in self.desired.things):
            notes.append("what only the build knows (the image) is not compared; --image NAME@sha256:… compares it")
        if self.desired.unset:
            notes.append(f"not set, and so not compared: {', '.join(self.desired.unset)}")
        told = self.state.block or any(thing.kind is plan.Kind.NOTIFICATION for thing in self.desired.things)
        if self.desired.server_file.automations and not told:
            notes.append("automations tell nobody: TIDEPOOL_NOTIFY_URLS is empty")
        notes += [
            f"schedule {thing.name} was added on the server by somebody: a deploy leaves it alone"
            for thing in self.plan.foreign
        ]
        return notes


def look(
    client: SyncPrefectClient,
    repository: Path,
    environment: str,
    owner: str,
    *,
    image: str | None = None,
    version: str | None = None,
    checked: bool = False,
) -> Situation:
    """Compares Git with the server.

    Args:
        client: A client of the server.
        repository: The folder that holds prefect.yaml.
        environment: production, or the name of an overlay.
        owner: Whose the things are.
        image: As for `environments.load`.
        version: As for `environments.load`.
        checked: The manifest has been checked, when the image was built.

    Raises:
        UsageError: the manifest has problems; all of them, with their lines.
    """
    if not checked:
        check(client, repository, environment, owner)
    wanted = desired.load(repository, environment, owner, image=image, version=version)
    state = actual.read(client, owner, wanted)
    things = wanted.with_automations(owner, block=bool(state.block))
    return Situation(desired=wanted, state=state, plan=plan.plan(things, state.live))


def check(client: SyncPrefectClient | None, repository: Path, environment: str, owner: str) -> None:
    """Checks the manifest, with the server's work pools where there is a server.

    Raises:
        UsageError: it has problems; all of them, with their lines.
    """
    found: dict[str, Mapping[str, Any] | None] = {}
    if client is not None:
        try:
            wanted = checks.pools(environments.load(repository, environment))
            in_git = {pool.name for pool in automations.load(repository).work_pools}
        except (UsageError, ValueError, KeyError, TypeError, AttributeError):
            wanted, in_git = set(), set()  # files of another shape: the check says so
        found = templates(client, wanted - in_git)
    problems = checks.check(repository, environment, owner=owner, templates=found)
    if problems:
        raise UsageError(checks.sentence(problems))


def templates(client: SyncPrefectClient, names: Iterable[str]) -> dict[str, Mapping[str, Any] | None]:
    """Base job templates of the server's work pools; None for a pool that it does not have."""
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
    return value is plan.UNKNOWN
