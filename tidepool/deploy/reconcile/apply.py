"""Applying a plan: its changes in order and nothing else; at every moment it is known what has been written.

Deployments are written by one `prefect deploy --all` on a file of those that change, everything else through the API.
Schedules of an existing deployment are updated in place: they keep their ids and pauses, and unmanaged schedules stay.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from tidepool.deploy.config import automations, environments
from tidepool.deploy.config.checks import STEP
from tidepool.deploy.reconcile.actual import ActualState, read_deployments
from tidepool.deploy.reconcile.plan import Action, Change, Kind, Plan
from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import environment as process_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.reconcile.comparison import Comparison
    from tidepool.deploy.reconcile.desired import DesiredState

_WRITTEN = re.compile(r"Deployment '([^']+)' successfully created with id")
# The last line of a traceback: it explains more than the line after it.
_REASON = re.compile(r"[\w.]+(Error|Exception|Timeout)\b")
_VERBS = {Action.CREATE: "created", Action.UPDATE: "updated", Action.DELETE: "deleted"}


class PartialApplyError(TidepoolError):
    """The server failed half-way; the text lists what was written and what was not."""


class Deploy(Protocol):
    """Writes the deployments of a prefect file."""

    def __call__(self, repository: Path, manifest: environments.Manifest, written: Callable[[str], None]) -> str:
        """Write the deployments.

        Args:
            repository: The folder that holds prefect.yaml.
            manifest: The prefect file.
            written: Called with `flow/deployment` as soon as one is on the server.

        Returns:
            Reason for which it failed; empty after a success.
        """


def prefect_deploy(repository: Path, manifest: environments.Manifest, written: Callable[[str], None]) -> str:
    """Run `prefect deploy --all` on a prefect file. See `Deploy`."""
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES

    with tempfile.TemporaryDirectory(prefix="tidepool-") as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(environments.to_yaml(manifest), encoding="utf-8")
        server = {
            "PREFECT_API_URL": str(PREFECT_API_URL.value()),
            "PREFECT_CLIENT_MAX_RETRIES": str(PREFECT_CLIENT_MAX_RETRIES.value()),
        }
        with subprocess.Popen(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)],
            cwd=repository,
            env={**process_environment(), **server, "COLUMNS": "1000", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            lines = []
            for line in process.stdout or ():
                lines.append(line.strip(" │╭╮╰╯─\n"))
                if match := _WRITTEN.search(line):
                    written(match[1])
        if process.returncode == 0:
            return ""
        output = [line for line in reversed(lines) if line] or [f"exit code {process.returncode}"]
        return next((line for line in output if _REASON.match(line)), output[0])


def refuse(plan: Plan, desired: DesiredState) -> None:
    """Refuse a plan that must not be applied.

    Raises:
        UsageError: an unmanaged resource has a desired name, the image is unknown, or a work pool would change its
            type.
    """
    if conflicts := plan.of(Action.CONFLICT):
        names = ", ".join(each.label for each in conflicts)
        raise UsageError(f"these resources are not managed by tidepool; nothing was written: {names}")
    for change in plan.of(Action.UPDATE):
        if change.resource.kind is Kind.WORK_POOL and any(each.field == "type" for each in change.differences):
            raise UsageError(
                f"the type of work pool {change.resource.name} differs from the server's and cannot be changed: give "
                "the pool another name"
            )
    steps = [*(desired.manifest.get("build") or []), *(desired.manifest.get("push") or [])]
    builds = any(str(name).startswith("prefect_docker.") for step in steps for name in step)
    if builds and any(each.resource.kind is Kind.DEPLOYMENT for each in plan.of(Action.CREATE, Action.UPDATE)):
        raise UsageError(
            "this environment runs an image: choose it with --image NAME@sha256:… (`make image PUSH=1` prints it)"
        )


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
    refuse(plan, comparison.desired)
    progress = _Progress(report)
    writer = _Writer(client, comparison.desired, comparison.actual, owner)
    try:
        for kind in Kind:
            changes = [each for each in plan.of(Action.CREATE, Action.UPDATE) if each.resource.kind is kind]
            if kind is Kind.DEPLOYMENT:
                schedules = [each for each in plan.of(Action.CREATE) if each.resource.kind is Kind.SCHEDULE]
                if changes:
                    writer.deployments(changes, schedules, progress, partial(deploy, repository))
                continue
            for change in changes:
                if change.label not in progress.written:  # a new deployment is written with its schedules
                    progress.in_flight = [change.label]
                    writer.write(change)
                    progress.done(change)
        for change in plan.of(Action.DELETE):
            progress.in_flight = [change.label]
            writer.delete(change)
            progress.done(change)
    except (httpx.HTTPError, PrefectException) as error:
        raise _partial(str(error) or type(error).__name__, plan, progress) from error
    except _DeployError as error:
        raise _partial(str(error), plan, progress) from None
    return progress.written


@dataclass
class _Progress:
    report: Callable[[str], None]
    written: list[str] = field(default_factory=list)
    in_flight: list[str] = field(default_factory=list)

    def done(self, change: Change) -> None:
        """Record and report that a change is on the server."""
        self.written.append(change.label)
        self.report(f"{_VERBS[change.action]} {change.label}")


def _partial(reason: str, plan: Plan, progress: _Progress) -> PartialApplyError:
    unknown = [each for each in progress.in_flight if each not in progress.written]
    rest = [each.label for each in plan.changes if each.label not in {*progress.written, *unknown}]
    return PartialApplyError(
        "\n".join(
            [
                f"stopped half-way: {reason}",
                f"  written ({len(progress.written)}): {', '.join(progress.written) or 'nothing'}",
                f"  outcome unknown ({len(unknown)}): {', '.join(unknown) or 'nothing'}",
                f"  not written ({len(rest)}): {', '.join(rest) or 'nothing'}",
                "  Run the same command again: it writes only what is missing.",
            ]
        )
    )


class _DeployError(Exception):
    """`prefect deploy` failed."""


@dataclass
class _Writer:
    client: SyncPrefectClient
    desired: DesiredState
    actual: ActualState
    owner: str

    def deployments(
        self,
        changes: Sequence[Change],
        schedules: Sequence[Change],
        progress: _Progress,
        deploy: Callable[[environments.Manifest, Callable[[str], None]], str],
    ) -> None:
        """Write deployments with one `prefect deploy --all`; a new one is written together with its schedules."""
        by_name = {each.resource.name: each for each in changes}
        build = [step for step in self.desired.manifest.get("build") or [] if STEP not in step]
        manifest = {
            **self.desired.manifest,
            "build": build,
            "deployments": [self._config(change) for change in changes],
        }

        def written(name: str) -> None:
            change = by_name.get(name)
            if change is None or change.label in progress.written:
                return
            progress.done(change)
            if change.action is Action.CREATE:
                for schedule in schedules:
                    if schedule.resource.parent == name:
                        progress.done(schedule)

        reason = deploy(manifest, written)
        left = [each for each in changes if each.label not in progress.written]
        if reason:
            # They are written one after another: the first that was not reported may be on the server or not.
            progress.in_flight = [each.label for each in left[:1]]
            raise _DeployError(f"prefect deploy: {reason}")
        progress.in_flight = [each.label for each in left]
        created = [each for each in changes if each.action is Action.CREATE]
        if created:
            there = read_deployments(self.client, automations.owner_tag(self.owner), [])
            ids = {name: str(each["id"]) for name, each in there.items()}
            self.actual = replace(self.actual, deployments={**self.actual.deployments, **ids})
            if missing := [each.label for each in created if each.resource.name not in ids]:
                progress.in_flight = missing
                raise _DeployError("prefect deploy succeeded, but did not create all deployments")
        # Its exit code counts, not the wording of its output.
        for change in left:
            written(change.resource.name)

    def _config(self, change: Change) -> dict[str, Any]:
        config = dict(self.desired.configs[change.resource.name])
        if change.actual is None:
            return config
        # In place, through the API: Prefect's own update replaces schedules without a slug and resumes paused ones.
        config.pop("schedules", None)
        if not change.actual.active:
            config.setdefault("paused", True)
        return config

    def write(self, change: Change) -> None:
        """Create or update a resource that is not a deployment."""
        {
            Kind.WORK_POOL: self._work_pool,
            Kind.VARIABLE: self._variable,
            Kind.CONCURRENCY_LIMIT: self._limit,
            Kind.NOTIFICATION: self._notification,
            Kind.SCHEDULE: self._schedule,
            Kind.AUTOMATION: self._automation,
        }[change.resource.kind](change)

    def delete(self, change: Change) -> None:
        """Delete a resource; one that is gone already counts as deleted."""
        from prefect.exceptions import ObjectNotFound

        resource = change.actual
        if resource is None:
            return
        identity = cast("Any", resource.id)
        try:
            if resource.kind is Kind.DEPLOYMENT:
                self.client.delete_deployment(identity)
            elif resource.kind is Kind.SCHEDULE:
                deployment = cast("Any", self.actual.deployments[resource.parent])
                self.client.delete_deployment_schedule(deployment, identity)
            elif resource.kind is Kind.AUTOMATION:
                self.client.delete_automation(identity)
            elif resource.kind is Kind.VARIABLE:
                self.client.delete_variable_by_name(resource.name)
            elif resource.kind is Kind.CONCURRENCY_LIMIT:
                self.client.delete_global_concurrency_limit_by_name(resource.name)
        except ObjectNotFound:
            return

    def _work_pool(self, change: Change) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

        name, template = change.resource.name, self.desired.templates[change.resource.name]
        if change.actual is None:
            kind = change.resource.fields["type"]
            self.client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
            return
        there = self.client.read_work_pool(name).base_job_template
        self.client.update_work_pool(name, WorkPoolUpdate(base_job_template=with_defaults(template, there)))

    def _variable(self, change: Change) -> None:
        from prefect.client.schemas.actions import VariableCreate, VariableUpdate

        fields = {"name": change.resource.name, **change.resource.fields}
        if change.actual is None:
            self.client.create_variable(VariableCreate.model_validate(fields))
        else:
            self.client.update_variable(VariableUpdate.model_validate(fields))

    def _limit(self, change: Change) -> None:
        from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate

        name, fields = change.resource.name, change.resource.fields
        if change.actual is None:
            limit = GlobalConcurrencyLimitCreate.model_validate({"name": name, **fields})
            self.client.create_global_concurrency_limit(limit)
        else:
            self.client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate.model_validate(fields))

    def _notification(self, change: Change) -> None:
        from prefect.blocks.notifications import SlackWebhook
        from pydantic import SecretStr

        # It accepts any Apprise URL, and is the only one of Prefect's blocks that passes the text on unchanged.
        block = SlackWebhook(url=SecretStr(change.resource.fields["urls"].value))
        identifier = cast("Any", block).save(change.resource.name, overwrite=True, _sync=True)
        self.actual = replace(self.actual, block=str(identifier))

    def _schedule(self, change: Change) -> None:
        from prefect.client.schemas.actions import DeploymentScheduleCreate

        fields = change.resource.fields
        deployment = cast("Any", self.actual.deployments[change.resource.parent])
        if change.actual is None:
            schedule = DeploymentScheduleCreate.model_validate({**fields, "active": True})
            self.client.create_deployment_schedules(deployment, [schedule])
        else:  # without `active`, so that a pause survives
            self.client.update_deployment_schedule(deployment, cast("Any", change.actual.id), **fields)

    def _automation(self, change: Change) -> None:
        entry = next(each for each in self.desired.server_file.automations if each.name == change.resource.name)
        block = {automations.NOTIFY: self.actual.block} if self.actual.block else {}
        core = automations.model(entry, self.owner, {**self.actual.deployments, **block})
        if change.actual is None:
            self.client.create_automation(core)
        else:
            core = core.model_copy(update={"enabled": change.actual.active})
            self.client.update_automation(cast("Any", change.actual.id), core)


def with_defaults(template: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Return a base job template with the defaults that an installation gave the variables on the server."""
    variables = template.get("variables") or {}
    old = (there.get("variables") or {}).get("properties") or {}
    properties = {
        name: {**each, "default": old[name]["default"]} if "default" in old.get(name, {}) else each
        for name, each in (variables.get("properties") or {}).items()
    }
    return {**template, "variables": {**variables, "properties": properties}}
