"""Applying a plan: its changes in order and nothing else; at every moment it is known what has been written.

Deployments are written by one `prefect deploy --all` on a file of those that change, everything else through the API.
Schedules of an existing deployment are updated in place: they keep their ids and pauses, and unmanaged schedules stay.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tidepool.deploy.config import automations, environments, house_rules
from tidepool.deploy.config.checks import STEP
from tidepool.deploy.reconcile import actual, work_pool
from tidepool.deploy.reconcile.plan import Action, Change, Kind, Plan, Resource, lost_pauses
from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import environment as process_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.reconcile.comparison import Comparison
    from tidepool.deploy.reconcile.desired import DesiredState

Deploy = Callable[[Path, environments.Manifest], Iterator[str]]
"""Writes the deployments of a prefect file in a repository; see `prefect_deploy`."""

_WRITTEN = re.compile(r"Deployment '([^']+)' successfully created with id")
_PLAIN_OUTPUT = {"COLUMNS": "1000", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
# The last line of a traceback: it explains more than the line after it.
_REASON = re.compile(r"[\w.]+(Error|Exception|Timeout)\b")
_OF_A_STEP = "StepExecutionError"
# Of the API, where a resource of each kind is created.
_PATHS = {
    Kind.WORK_POOL: "/work_pools/",
    Kind.VARIABLE: "/variables/",
    Kind.CONCURRENCY_LIMIT: "/v2/concurrency_limits/",
    Kind.DEPLOYMENT: "/deployments/",
    Kind.SCHEDULE: "/deployments/{deployment}/schedules",
    Kind.AUTOMATION: "/automations/",
}


class PartialApplyError(TidepoolError):
    """The server failed half-way; the text lists what was written and what was not."""


class DeployError(TidepoolError):
    """`prefect deploy` failed."""


def prefect_deploy(repository: Path, manifest: environments.Manifest) -> Iterator[str]:
    """Run `prefect deploy --all` on a prefect file, and yield `flow/deployment` as soon as one is on the server.

    Raises:
        DeployError: it failed; with its reason.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES

    with tempfile.TemporaryDirectory(prefix="tidepool-") as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(environments.to_yaml(manifest), encoding="utf-8")
        server = {
            "PREFECT_API_URL": str(PREFECT_API_URL.value()),
            "PREFECT_CLIENT_MAX_RETRIES": str(PREFECT_CLIENT_MAX_RETRIES.value()),
        }
        # Prefect would warn of each placeholder without a value, also where an empty one is right.
        empty = dict.fromkeys(house_rules.load(repository)[0].may_be_empty, "")
        with subprocess.Popen(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)],
            cwd=repository,
            env={**empty, **process_environment(), **server, **_PLAIN_OUTPUT},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            lines = []
            for line in process.stdout or ():
                lines.append(line.strip(" │╭╮╰╯─\n"))
                if match := _WRITTEN.search(line):
                    yield match[1]
    if process.returncode:
        output = [line for line in lines if line] or [f"exit code {process.returncode}"]
        reasons = [line for line in output if _REASON.match(line)] or output[-1:]
        # The error of a step names the step, and the one before it what was wrong.
        told = reasons[-2:] if _OF_A_STEP in reasons[-1] else reasons[-1:]
        raise DeployError(f"prefect deploy: {': '.join(reversed(told))}")


def apply(
    client: SyncPrefectClient,
    comparison: Comparison,
    repository: Path,
    owner: str,
    *,
    report: Callable[[str], None],
    deploy: Deploy = prefect_deploy,
) -> list[str]:
    """Apply the plan of a comparison. Idempotent: the next plan is empty.

    Args:
        client: A client of the server.
        comparison: Desired state, actual state, and the plan.
        repository: The folder that holds prefect.yaml.
        owner: Owner of the managed resources.
        report: Called with a line for each resource that is written.
        deploy: Writes deployments.

    Returns:
        Labels of the resources that were written.

    Raises:
        UsageError: the plan must not be applied; nothing was written.
        PartialApplyError: the server failed half-way.
    """
    import httpx
    from prefect.exceptions import PrefectException

    plan = comparison.plan
    deployments = [each for each in plan.of(Action.CREATE, Action.UPDATE) if each.resource.kind is Kind.DEPLOYMENT]
    _refuse(plan, deployments, comparison.desired.manifest)
    ids, left = actual.ids(comparison.actual), list(plan.changes)
    writer = _Writer(client, comparison.desired, owner, report, ids, left)
    try:
        while left:
            if left[0] in deployments:
                writer.deploy(deployments, deploy, repository)
            else:
                writer.write(left[0])
    except (httpx.HTTPError, PrefectException, DeployError) as error:
        raise writer.partial(str(error) or type(error).__name__) from error
    return writer.written


def _refuse(plan: Plan, deployments: list[Change], manifest: Mapping[str, Any]) -> None:
    """Refuse a plan that must not be applied.

    Raises:
        UsageError: an unmanaged resource has a desired name, a pause would be lost, the image is unknown, or a work
            pool would change its type.
    """
    if conflicts := plan.of(Action.CONFLICT):
        names = ", ".join(each.label for each in conflicts)
        raise UsageError(f"these resources are not managed by tidepool; nothing was written: {names}")
    if lost := lost_pauses(plan):
        raise UsageError(f"{'; '.join(lost)}; nothing was written")
    for change in plan.of(Action.UPDATE):
        if change.resource.kind is Kind.WORK_POOL and any(each.field == "type" for each in change.differences):
            raise UsageError(
                f"the type of work pool {change.resource.name} differs from the server's and cannot be changed: give "
                "the pool another name"
            )
    steps = [*(manifest.get("build") or []), *(manifest.get("push") or [])]
    builds = any(str(name).startswith("prefect_docker.") for step in steps for name in step)
    if builds and deployments:
        raise UsageError(
            "this environment runs an image: choose it with --image NAME@sha256:… (`make image PUSH=1` prints it)"
        )


@dataclass
class _Writer:
    """Progress of an apply.

    Attributes:
        ids: See `actual.ids`; those of new resources are added.
        left: Changes that are not known to be written.
        in_flight: Those of them that may be written; if it is empty, the first may be.
        written: Labels of the others.
    """

    client: SyncPrefectClient
    desired: DesiredState
    owner: str
    report: Callable[[str], None]
    ids: dict[str, str]
    left: list[Change]
    in_flight: list[Change] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def deploy(self, changes: list[Change], deploy: Deploy, repository: Path) -> None:
        """Write all deployments that change with one `prefect deploy --all`."""
        manifest = {
            **self.desired.manifest,
            "build": [step for step in self.desired.manifest.get("build") or [] if STEP not in step],
            "deployments": [self._config(change) for change in changes],
        }
        unreported = {change.resource.name: change for change in changes}
        for name in deploy(repository, manifest):
            if change := unreported.pop(name, None):
                self._deployed(change)
        # Its exit code counts, not the wording of its output.
        self.in_flight = list(unreported.values())
        if any(change.actual is None for change in changes):
            there = actual.read_deployments(self.client, automations.owner_tag(self.owner), [])
            self.ids |= {name: each["id"] for name, each in there.items()}
            if missing := [change for name, change in unreported.items() if name not in self.ids]:
                self.in_flight = missing
                raise DeployError("prefect deploy succeeded, but did not create all deployments")
        for change in unreported.values():
            self._deployed(change)
        self.in_flight = []

    def _config(self, change: Change) -> dict[str, Any]:
        config = dict(self.desired.configs[change.resource.name])
        if change.actual is None:
            return config
        # In place, through the API: Prefect's own update replaces schedules without a slug and resumes paused ones.
        config.pop("schedules", None)
        if not change.actual.active:
            config.setdefault("paused", True)
        return config

    def _deployed(self, deployment: Change) -> None:
        """Record that a deployment is on the server; a new one is written together with its schedules."""
        self._done(deployment)
        if deployment.action is Action.CREATE:
            for change in [each for each in self.left if each.resource.parent == deployment.resource.name]:
                self._done(change)

    def _done(self, change: Change) -> None:
        self.left.remove(change)
        self.written.append(change.label)
        self.report(f"{change.action}d {change.label}")

    def write(self, change: Change) -> None:
        """Create or update a resource that is not a deployment, or delete one; one that is gone counts as deleted."""
        from prefect.exceptions import PrefectHTTPStatusError

        kind, request = change.resource.kind, cast("Any", self.client).request
        if kind is Kind.NOTIFICATION:
            self._notify_through(change.resource)
        else:
            path = _PATHS[kind].format(deployment=self.ids.get(change.resource.parent))
            item = f"{path.rstrip('/')}/{change.actual.id}" if change.actual else ""
            if change.action is Action.CREATE:
                request("POST", path, json=self._body(change))
            elif change.action is Action.UPDATE:
                request("PUT" if kind is Kind.AUTOMATION else "PATCH", item, json=self._body(change))
            else:
                try:
                    request("DELETE", item)
                except PrefectHTTPStatusError as error:
                    if error.response.status_code != HTTPStatus.NOT_FOUND:
                        raise
        self._done(change)

    def _body(self, change: Change) -> Any:
        resource, existing = change.resource, change.actual
        if resource.kind is Kind.WORK_POOL:
            template = self.desired.templates[resource.name]
            if existing is None:
                return {"name": resource.name, "type": resource.fields["type"], "base_job_template": template}
            there = self.client.read_work_pool(resource.name).base_job_template
            return {"base_job_template": work_pool.with_installed(template, there)}
        if resource.kind is Kind.SCHEDULE:  # an update is without `active`, so that a pause survives
            return resource.fields if existing else [{**resource.fields, "active": True}]
        if resource.kind is Kind.AUTOMATION:
            entry = next(each for each in self.desired.server_file.automations if each.name == resource.name)
            model = automations.model(entry, self.owner, self.ids)
            body = model.model_dump(mode="json", exclude={"owner_resource"})  # an update must not have it
            return {**body, "enabled": existing.active} if existing else body
        return {"name": resource.name, **resource.fields}

    def _notify_through(self, resource: Resource) -> None:
        from prefect.blocks.notifications import SlackWebhook

        # It accepts any Apprise URL, and is the only one of Prefect's blocks that passes the text on unchanged.
        block = cast("Any", SlackWebhook(url=resource.fields["urls"]))
        self.ids[automations.NOTIFY] = str(block.save(resource.name, overwrite=True, _sync=True))

    def partial(self, reason: str) -> PartialApplyError:
        """Return the error that lists what was written and what was not."""
        unknown = self.in_flight or self.left[:1]
        groups = {
            "written": self.written,
            "outcome unknown": [each.label for each in unknown],
            "not written": [each.label for each in self.left if each not in unknown],
        }
        lines = [f"  {name} ({len(labels)}): {', '.join(labels) or 'nothing'}" for name, labels in groups.items()]
        end = "  When the cause is removed, run the same command again: it writes only what is missing."
        return PartialApplyError("\n".join([f"stopped half-way: {reason}", *lines, end]))
