"""The commands from Git to the server: validate, plan, apply, prune, drift, pause, resume, rollback."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import repository, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.reconcile import comparison
    from tidepool.deploy.reconcile import plan as plan_module
    from tidepool.deploy.view import table

CHANGES, ERROR = 2, 1

Environment = Annotated[
    str | None,
    typer.Option(
        "--environment", "-e", help="production, or a name in environments/. Default: TIDEPOOL_DEPLOY_ENVIRONMENT."
    ),
]
Image = Annotated[
    str | None,
    typer.Option(metavar="NAME@sha256:…", help="The image to run. A plan without it leaves the image out."),
]
Version = Annotated[str | None, typer.Option(help="Version of the deployments, where there is no Git checkout to ask.")]
YesDelete = Annotated[
    int | None, typer.Option(metavar="N", help="Yes, delete exactly N things, more than the allowed share.")
]


class Format(StrEnum):
    """How something is shown."""

    TABLE = "table"
    JSON = "json"
    MARKDOWN = "markdown"


def register(app: typer.Typer) -> None:
    """Adds the commands to the main one."""
    for command in (validate, plan, apply, prune, drift, pause, resume, rollback):
        app.command()(command)


def validate(environment: Environment = None) -> None:
    """Check prefect.yaml, automations.yaml and an environment: every problem at once, with its line.

    Without PREFECT_API_URL it works offline; with it, job variables are checked against the server's work pools too.

    Exit code: 0 no problem, 2 problems.
    """
    from prefect.settings import PREFECT_API_URL

    from tidepool.deploy.config import environments
    from tidepool.deploy.reconcile import actual, comparison

    root, owner = repository(), settings().deploy.owner
    names = [environment] if environment else environments.names(root)
    if PREFECT_API_URL.value():
        with actual.connect() as client:
            for name in names:
                comparison.check(client if environment else None, root, name, owner)
    else:
        for name in names:
            comparison.check(None, root, name, owner)
    typer.echo(f"no problems: {', '.join(names)}")


def plan(
    environment: Environment = None,
    image: Image = None,
    version: Version = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull-request comment.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write it to this file in the place of printing.")] = None,
) -> None:
    """Show what an apply would change: field by field, with the next runs of each schedule before and after.

    Exit code: 0 nothing to do, 2 changes, 1 error.
    """

    def run() -> bool:
        from tidepool.deploy.reconcile import actual

        name = environment or settings().deploy.environment
        with actual.connect() as client:
            found = _look(client, name, image, version)
            shown = _view(client, found, name)
        _emit(shown, _format(json=json, markdown=markdown), output)
        return bool(found.plan)

    _exit(run)


def apply(
    environment: Environment = None,
    image: Image = None,
    version: Version = None,
    yes_delete: YesDelete = None,
    record: Annotated[
        bool, typer.Option(help="Note the deployed version as a Git tag, for `tidepool rollback`.")
    ] = True,
) -> None:
    """Make the server as Git wants it: only what the plan says. A second apply writes nothing.

    Exit code: 0 done, 1 the server failed half-way (what was written is said; run it again), 2 bad usage.
    """
    from tidepool.deploy import history
    from tidepool.deploy.reconcile import actual

    name = environment or settings().deploy.environment
    with actual.connect(retries=5) as client:
        found = _look(client, name, image, version)
        _guard(found, yes_delete)
        written = _write(client, found, lambda _: True)
    typer.echo(f"{name}: {len(written)} written" if written else f"{name}: nothing to do")
    if written and record and (tag := history.record(repository(), name, image, datetime.now(UTC))):
        typer.echo(f"recorded as {tag}")


def prune(
    environment: Environment = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    yes_delete: YesDelete = None,
) -> None:
    """Delete what Git no longer has. Only what carries this repository's ownership tag, never anything else.

    Exit code: 0 done, 1 the server failed half-way, 2 bad usage, or too much to delete without --yes-delete.
    """
    from tidepool.deploy.reconcile import actual
    from tidepool.deploy.reconcile.plan import Action

    name = environment or settings().deploy.environment
    with actual.connect(retries=5) as client:
        found = _look(client, name, None, None)
        deletions = found.plan.of(Action.DELETE)
        if dry_run:
            for change in deletions:
                typer.echo(f"would delete {change.thing.kind} {change.thing.name}")
        else:
            _guard(found, yes_delete)
            _write(client, found, lambda change: change.action is Action.DELETE)
    typer.echo(f"{name}: {len(deletions)} {'to delete' if dry_run else 'deleted'}")


def drift(
    environment: Environment = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write it to this file in the place of printing.")] = None,
    end_pauses: Annotated[
        bool, typer.Option("--end-pauses", help="Resume what was paused until now, as the drift job does.")
    ] = False,
) -> None:
    """Report what differs between Git and the server and since when, and what is paused by whom.

    Exit code: 0 no drift, 2 drift, 1 error.
    """

    def run() -> bool:
        from tidepool.deploy import drift as drift_module
        from tidepool.deploy.reconcile import actual

        name, deploy = environment or settings().deploy.environment, settings().deploy
        with actual.connect() as client:
            found = drift_module.find(
                client,
                repository(),
                name,
                deploy.owner,
                now=datetime.now(UTC),
                runs_per_hour=deploy.runs_per_hour,
                end_pauses=end_pauses,
            )
        shape = _format(json=json, markdown=markdown)
        if shape is Format.MARKDOWN:
            _print(drift_module.markdown(found), output)
        else:
            _emit(found.view, shape, output)
        for each in found.resumed:
            typer.echo(f"resumed {each.deployment}: paused until {each.until:%Y-%m-%d %H:%M %Z}", err=True)
        return bool(found)

    _exit(run)


def pause(
    name: Annotated[str, typer.Argument(help="Name of the deployment, or flow/deployment.")],
    until: Annotated[str, typer.Option(help="4h, 30min, 2d, or a time such as 2026-11-30T09:00+01:00.")],
    reason: Annotated[str, typer.Option(help="Why, for whoever is on call next.")],
    by: Annotated[str | None, typer.Option(help="Who; default: Git's user, or this machine's.")] = None,
) -> None:
    """Pause a deployment's schedules until a time. The drift job resumes it then; deploys leave it alone."""
    from tidepool.deploy import pauses
    from tidepool.deploy.reconcile import actual

    now = datetime.now(UTC)
    if not reason.strip():
        raise UsageError("--reason is empty: say why, for whoever is on call next")
    end = pauses.parse_until(until, now)
    with actual.connect(retries=5) as client:
        wanted = pauses.Pause(deployment=name, by=by or _person(), reason=reason, at=now, until=end)
        pauses.pause(client, wanted, settings().deploy.owner)
    typer.echo(f"paused {name} until {end:%Y-%m-%d %H:%M %Z}; `tidepool resume {name}` ends it earlier")


def resume(name: Annotated[str, typer.Argument(help="Name of the deployment, or flow/deployment.")]) -> None:
    """Resume a deployment and all its schedules, and forget the pause."""
    from tidepool.deploy import pauses
    from tidepool.deploy.reconcile import actual

    with actual.connect(retries=5) as client:
        full = pauses.resume(client, name, settings().deploy.owner)
    typer.echo(f"resumed {full}")


def rollback(
    to: Annotated[str | None, typer.Option(metavar="COMMIT", help="Apply this version. Without it: list them.")] = None,
    environment: Environment = None,
    yes_delete: YesDelete = None,
) -> None:
    """List the versions that were deployed, or apply an older one: its image, schedules, all.

    Exit code: 0 listed or applied, else as for `tidepool apply`.
    """
    from tidepool.deploy import history

    name = environment or settings().deploy.environment
    found = history.versions(repository(), name)
    if to is None:
        for version in found:
            image = version.image or "no image"
            typer.echo(f"{version.at:%Y-%m-%d %H:%M}Z  {version.commit[:12]}  {image}  {version.subject}")
        if not found:
            typer.echo(f"{name}: nothing was deployed from here yet", err=True)
        return
    version = history.choose(found, to)
    options = [] if yes_delete is None else ["--yes-delete", str(yes_delete)]
    code = history.apply_version(repository(), name, version, options)
    if code == 0:
        typer.echo(
            f"{name} is at {version.commit[:12]} ({version.subject}). Git's main branch is not: revert it there, or "
            "the next deploy rolls forward."
        )
    raise typer.Exit(code)


def _look(client: SyncPrefectClient, name: str, image: str | None, version: str | None) -> comparison.Situation:
    from tidepool.deploy.reconcile import comparison

    return comparison.look(client, repository(), name, settings().deploy.owner, image=image, version=version)


def _view(client: SyncPrefectClient, found: comparison.Situation, name: str) -> table.View:
    from tidepool.deploy import pauses
    from tidepool.deploy.view import table

    deploy = settings().deploy
    recorded = pauses.recorded(client, deploy.owner)
    return table.view(found.plan, name, datetime.now(UTC), deploy.runs_per_hour, notes=found.notes, pauses=recorded)


def _guard(found: comparison.Situation, yes_delete: int | None) -> None:
    """Refuses to delete too much.

    Raises:
        UsageError: it is more than the allowed share, and not exactly what was said yes to.
    """
    from tidepool.deploy.reconcile.plan import Action, excess

    count, share = len(found.plan.of(Action.DELETE)), settings().deploy.delete_share
    too_much = excess(found.plan, found.state.live, share)
    if yes_delete is not None and yes_delete != count:
        raise UsageError(f"--yes-delete {yes_delete}, but {count} would be deleted; nothing was written")
    if too_much and yes_delete is None:
        raise UsageError(
            f"it would delete {', '.join(too_much)}, more than {share:.0%}; nothing was written. If that is meant: "
            f"--yes-delete {count}"
        )


def _write(
    client: SyncPrefectClient,
    found: comparison.Situation,
    wanted: Callable[[plan_module.Change], bool],
) -> list[str]:
    from dataclasses import replace

    from tidepool.deploy.reconcile import apply as apply_module

    root, owner = repository(), settings().deploy.owner
    some = replace(found.plan, changes=tuple(change for change in found.plan.changes if wanted(change)))
    try:
        return apply_module.apply(
            client, some, found.desired, found.state, owner, deploy=apply_module.PrefectDeploy(root), say=typer.echo
        )
    except apply_module.PartialApplyError as error:
        typer.echo(f"tidepool: {error}", err=True)
        raise typer.Exit(ERROR) from None


def _exit(run: Callable[[], bool]) -> None:
    """Exit code 0 or 2 by what `run` says, 1 for an error: 2 means changes here."""
    try:
        found = run()
    except TidepoolError as error:
        typer.echo(f"tidepool: {error}", err=True)
        raise typer.Exit(ERROR) from None
    raise typer.Exit(CHANGES if found else 0)


def _format(*, json: bool, markdown: bool) -> Format:
    if json and markdown:
        raise UsageError("give --json or --markdown, not both")
    return Format.JSON if json else Format.MARKDOWN if markdown else Format.TABLE


def _emit(shown: table.View, shape: Format, output: Path | None) -> None:
    from tidepool.deploy.view import table

    if shape is Format.JSON:
        _print(table.as_json(shown) + "\n", output)
    elif shape is Format.MARKDOWN:
        _print(table.markdown(shown), output)
    elif output is None:
        from rich.console import Console

        table.table(shown, Console(highlight=False, soft_wrap=not sys.stdout.isatty()))
    else:
        from rich.console import Console

        with output.open("w", encoding="utf-8") as file:
            table.table(shown, Console(file=file, highlight=False, width=200))


def _print(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


def _person() -> str:
    import getpass
    import subprocess

    done = subprocess.run(["git", "config", "user.email"], capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.strip()
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in the password file, as in a container
        raise UsageError("--by is needed: neither Git nor this machine says who you are") from None
