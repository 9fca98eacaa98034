"""Carries a plan out: only what it says, in its order; what was written is known at every moment.

Deployments are written by `prefect deploy --all` on a file of those that change; all else through the API. Schedules of
a deployment that exists are changed in place, so that their ids, their pauses, and what people added beside them stay.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tidepool.deploy.config import automations, environments
from tidepool.deploy.config.checks import STEP
from tidepool.deploy.reconcile import actual
from tidepool.deploy.reconcile.actual import State
from tidepool.deploy.reconcile.plan import Action, Change, Kind, Plan
from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import environment as process_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.reconcile.desired import Desired

_WRITTEN = re.compile(r"Deployment '([^']+)' successfully created with id")
# The last line of a traceback: it says more than the line after it.
_REASON = re.compile(r"[\w.]+(Error|Exception|Timeout)\b")
_VERBS = {Action.CREATE: "created", Action.UPDATE: "updated", Action.DELETE: "deleted"}
_BLOCK_TYPE = "slack-webhook"


class PartialApplyError(TidepoolError):
    """The server failed half-way; the text says what was written and what was not."""


@dataclass
class _Progress:
    say: Callable[[str], None]
    written: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)

    def done(self, change: Change) -> None:
        """Notes and says that a change is on the server."""
        self.written.append(label(change))
        self.say(f"{_VERBS[change.action]} {label(change)}")


class PrefectDeploy:
    """`prefect deploy --all` on a file, as a command."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository

    def __call__(self, manifest: environments.Manifest, written: Callable[[str], None]) -> str:
        """Writes the deployments of a prefect file.

        Args:
            manifest: The prefect file.
            written: Called with `flow/deployment` for each that is on the server.

        Returns:
            Why it stopped; empty: it did not.
        """
        with tempfile.TemporaryDirectory(prefix="tidepool-") as folder:
            path = Path(folder) / "prefect.yaml"
            path.write_text(environments.to_yaml(manifest), encoding="utf-8")
            command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
            with subprocess.Popen(
                command,
                cwd=self._repository,
                env={**process_environment(), **_server(), "COLUMNS": "1000", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
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
            said = [line for line in reversed(lines) if line]
            return next((line for line in said if _REASON.match(line)), next(iter(said), f"exit {process.returncode}"))


def _server() -> dict[str, str]:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES

    return {
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "PREFECT_CLIENT_MAX_RETRIES": str(PREFECT_CLIENT_MAX_RETRIES.value()),
    }


Deploy = "Callable[[environments.Manifest, Callable[[str], None]], str]"


def label(change: Change) -> str:
    """`schedule csv-etl/csv-etl#nightly`."""
    return f"{change.thing.kind} {change.thing.name}"


def refuse(found: Plan, desired: Desired) -> None:
    """Refuses what must not be applied.

    Raises:
        UsageError: a name is taken by somebody else, the image is not known, or a work pool would change its type.
    """
    conflicts = found.of(Action.CONFLICT)
    if conflicts:
        raise UsageError(
            "not ours, so not touched, and nothing else was written: " + ", ".join(label(each) for each in conflicts)
        )
    for change in found.of(Action.UPDATE):
        if change.thing.kind is Kind.WORK_POOL and any(each.field == "type" for each in change.differences):
            raise UsageError(f"work pool {change.thing.name} has another type on the server, which cannot be changed")
    steps = [*(desired.manifest.get("build") or []), *(desired.manifest.get("push") or [])]
    builds = any(str(name).startswith("prefect_docker.") for step in steps for name in step)
    if builds and any(change.thing.kind is Kind.DEPLOYMENT for change in found.of(Action.CREATE, Action.UPDATE)):
        raise UsageError(
            "this environment runs an image: say which with --image NAME@sha256:… (`make image PUSH=1` prints it)"
        )


def apply(
    client: SyncPrefectClient,
    found: Plan,
    desired: Desired,
    state: State,
    owner: str,
    *,
    deploy: Any,
    say: Callable[[str], None],
) -> list[str]:
    """Carries a plan out.

    Args:
        client: A client of the server.
        found: The plan.
        desired: What Git wants, as the plan was made with.
        state: What was on the server.
        owner: Whose the things are.
        deploy: Writes deployments.
        say: Called with a line for each thing that is written.

    Returns:
        What was written.

    Raises:
        UsageError: it must not be applied; nothing was written.
        PartialApplyError: the server failed half-way.
    """
    import httpx

    refuse(found, desired)
    progress = _Progress(say)
    writer = _Writer(client, desired, state, owner)
    try:
        for kind in Kind:
            changes = [each for each in found.of(Action.CREATE, Action.UPDATE) if each.thing.kind is kind]
            if kind is Kind.DEPLOYMENT:
                schedules = [each for each in found.of(Action.CREATE) if each.thing.kind is Kind.SCHEDULE]
                writer.deployments(changes, schedules, deploy, progress)
                continue
            for change in changes:
                if label(change) not in progress.written:  # a new deployment comes with its schedules
                    progress.doubtful = [label(change)]
                    writer.write(change)
                    progress.done(change)
        for change in found.of(Action.DELETE):
            progress.doubtful = [label(change)]
            writer.delete(change)
            progress.done(change)
    except (httpx.HTTPError, actual.ServerError) as error:
        raise _partial(str(error) or type(error).__name__, found, progress) from error
    except _DeployError as error:
        raise _partial(str(error), found, progress) from None
    return progress.written


def _partial(reason: str, found: Plan, progress: _Progress) -> PartialApplyError:
    rest = [label(each) for each in found.changes if label(each) not in {*progress.written, *progress.doubtful}]
    doubtful = [each for each in progress.doubtful if each not in progress.written]
    return PartialApplyError(
        "\n".join(
            [
                f"stopped half-way: {reason}",
                f"  written ({len(progress.written)}): {', '.join(progress.written) or 'nothing'}",
                f"  in doubt ({len(doubtful)}): {', '.join(doubtful) or 'nothing'}",
                f"  not written ({len(rest)}): {', '.join(rest) or 'nothing'}",
                "  The same command completes it: it writes only what is missing.",
            ]
        )
    )


class _DeployError(Exception):
    """`prefect deploy` stopped."""


@dataclass
class _Writer:
    client: SyncPrefectClient
    desired: Desired
    state: State
    owner: str

    def deployments(
        self,
        changes: Sequence[Change],
        schedules: Sequence[Change],
        deploy: Any,
        progress: _Progress,
    ) -> None:
        """Writes deployments with one `prefect deploy --all`; a new one is written together with its schedules."""
        if not changes:
            return
        by_name = {each.thing.name: each for each in changes}
        build = [step for step in self.desired.manifest.get("build") or [] if STEP not in step]
        manifest = {
            **self.desired.manifest,
            "build": build,
            "deployments": [self._config(change) for change in changes],
        }

        def written(name: str) -> None:
            if name in by_name and label(by_name[name]) not in progress.written:
                progress.done(by_name[name])
                if by_name[name].action is Action.CREATE:
                    for change in schedules:
                        if change.thing.parent == name:
                            progress.done(change)

        reason = deploy(manifest, written)
        left = [each for each in changes if label(each) not in progress.written]
        if reason or left:
            progress.doubtful = [label(left[0])] if left else []
            raise _DeployError(f"prefect deploy: {reason or 'it did not say that all were written'}")
        if any(change.action is Action.CREATE for change in changes):
            tag = automations.owner_tag(self.owner)
            now = actual.read_deployments(self.client, tag, [])
            ids = {**self.state.deployments, **{name: str(each["id"]) for name, each in now.items()}}
            self.state = State(live=self.state.live, deployments=ids, block=self.state.block)

    def _config(self, change: Change) -> dict[str, Any]:
        config = dict(self.desired.configs[change.thing.name])
        if change.live is None:
            return config
        # In place, by the API: Prefect's own update replaces schedules that have no slug, and resumes what is paused.
        config.pop("schedules", None)
        if not change.live.active:
            config.setdefault("paused", True)
        return config

    def write(self, change: Change) -> None:
        """Creates or updates one thing that is no deployment."""
        {
            Kind.WORK_POOL: self._work_pool,
            Kind.VARIABLE: self._variable,
            Kind.CONCURRENCY_LIMIT: self._limit,
            Kind.NOTIFICATION: self._notification,
            Kind.SCHEDULE: self._schedule,
            Kind.AUTOMATION: self._automation,
        }[change.thing.kind](change)

    def delete(self, change: Change) -> None:
        """Deletes one thing; one that is gone already is no failure."""
        from prefect.exceptions import ObjectNotFound

        thing = change.live
        if thing is None:
            return
        try:
            if thing.kind is Kind.DEPLOYMENT:
                self.client.delete_deployment(cast("Any", thing.id))
            elif thing.kind is Kind.SCHEDULE:
                self.client.delete_deployment_schedule(
                    cast("Any", self.state.deployments[thing.parent]), cast("Any", thing.id)
                )
            elif thing.kind is Kind.AUTOMATION:
                self.client.delete_automation(cast("Any", thing.id))
            elif thing.kind is Kind.VARIABLE:
                self.client.delete_variable_by_name(thing.name)
            elif thing.kind is Kind.CONCURRENCY_LIMIT:
                self.client.delete_global_concurrency_limit_by_name(thing.name)
        except ObjectNotFound:
            return

    def _work_pool(self, change: Change) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

        name, template = change.thing.name, self.desired.templates[change.thing.name]
        if change.live is None:
            self.client.create_work_pool(
                WorkPoolCreate(name=name, type=change.thing.fields["type"], base_job_template=template)
            )
            return
        there = self.client.read_work_pool(name).base_job_template
        self.client.update_work_pool(name, WorkPoolUpdate(base_job_template=with_defaults(template, there)))

    def _variable(self, change: Change) -> None:
        from prefect.client.schemas.actions import VariableCreate, VariableUpdate

        fields = {"name": change.thing.name, **change.thing.fields}
        if change.live is None:
            self.client.create_variable(VariableCreate.model_validate(fields))
        else:
            self.client.update_variable(VariableUpdate.model_validate(fields))

    def _limit(self, change: Change) -> None:
        from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate

        fields = change.thing.fields
        if change.live is None:
            self.client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate.model_validate({"name": change.thing.name, **fields})
            )
        else:
            self.client.update_global_concurrency_limit(
                change.thing.name, GlobalConcurrencyLimitUpdate.model_validate(fields)
            )

    def _notification(self, change: Change) -> None:
        from prefect.blocks.notifications import SlackWebhook
        from pydantic import SecretStr

        # Any Apprise URL works in it: of Prefect's blocks it is the one that passes the text on unchanged.
        block = SlackWebhook(url=SecretStr(change.thing.fields["urls"].value))
        identifier = cast("Any", block).save(change.thing.name, overwrite=True, _sync=True)
        self.state = State(live=self.state.live, deployments=self.state.deployments, block=str(identifier))

    def _schedule(self, change: Change) -> None:
        fields, deployment = change.thing.fields, self.state.deployments[change.thing.parent]
        if change.live is None:
            self.client.request(
                "POST", "/deployments/{id}/schedules", path_params={"id": deployment}, json=[{**fields, "active": True}]
            )
            return
        self.client.request(
            "PATCH",
            "/deployments/{id}/schedules/{schedule_id}",
            path_params={"id": deployment, "schedule_id": change.live.id},
            json=dict(fields),  # `active` is not in it
        )

    def _automation(self, change: Change) -> None:
        entry = next(each for each in self.desired.server_file.automations if each.name == change.thing.name)
        ids = {**self.state.deployments, **({automations.NOTIFY: self.state.block} if self.state.block else {})}
        core = automations.model(entry, self.owner, ids)
        if change.live is None:
            self.client.create_automation(core)
        else:
            core = core.model_copy(update={"enabled": change.live.active})
            self.client.update_automation(cast("Any", change.live.id), core)


def with_defaults(template: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """A base job template with the defaults that an installation gave the variables on the server."""
    variables = template.get("variables") or {}
    old = (there.get("variables") or {}).get("properties") or {}
    properties = {
        name: {**each, "default": old[name]["default"]} if "default" in old.get(name, {}) else each
        for name, each in (variables.get("properties") or {}).items()
    }
    return {**template, "variables": {**variables, "properties": properties}}
