"""Commands from Git to the server: validate, plan, apply, prune, drift, pause, resume, rollback."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from tidepool.deploy.client import connect
from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import repository, settings

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from tidepool.deploy.config.yaml_source import Problem
    from tidepool.deploy.reconcile.comparison import Comparison
    from tidepool.deploy.view.plan_view import PlanView

# As Terraform's: the second only with --detailed-exitcode.
ERROR, CHANGES = 1, 2
# Writes wait for a server that is restarting: 2 + 4 + 8 + 16 + 32 s.
_PATIENT = 5

Environment = Annotated[
    str | None,
    typer.Option(
        "--environment", "-e", help="production, or a name in environments/. Default: TIDEPOOL_DEPLOY_ENVIRONMENT."
    ),
]
Image = Annotated[
    str | None,
    typer.Option(metavar="NAME@sha256:…", help="Image to run. A plan without it does not compare the image."),
]
Version = Annotated[
    str | None, typer.Option(help="Version of the deployments. Default: the commit of the Git checkout.")
]
YesDelete = Annotated[
    int | None,
    typer.Option(metavar="N", help="Confirm the deletion of exactly N resources, above TIDEPOOL_DEPLOY_DELETE_SHARE."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull-request comment.")]
DetailedExitCode = Annotated[
    bool, typer.Option("--detailed-exitcode", help="Exit with 2 instead of 0 if there are differences.")
]
Output = Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")]
Name = Annotated[str, typer.Argument(help="Name of the deployment, or flow/deployment.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the main one."""
    for command in (validate, plan, apply, prune, drift, pause, resume, rollback):
        app.command()(command)


def validate(
    environment: Environment = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="First mend in prefect.yaml what has exactly one right answer, line by line.")
    ] = False,
) -> None:
    """Check prefect.yaml, automations.yaml and the environments: report all problems at once, with their lines.

    Without --environment, all of them. Works offline; with PREFECT_API_URL, also against the server's work pools,
    variables and blocks: those of TIDEPOOL_DEPLOY_ENVIRONMENT, or of --environment, must exist. With --environment
    production, a warning if the links to runbooks will lead nowhere.

    With --fix, an entrypoint that names a file becomes one that names its module, a missing `pull: []` and the first
    build step are added, and `active: true` of a schedule is removed. The rest of the file stays as it is.

    Exit code: 0 no problem, 1 problems; with --fix those that are left.
    """
    from prefect.settings import PREFECT_API_URL

    from tidepool.deploy.config import environments, fixes
    from tidepool.deploy.config.yaml_source import is_inside, raise_if_any
    from tidepool.deploy.reconcile import comparison

    root, deploy = repository(), settings().deploy
    names = [environment] if environment else environments.names(root)
    names.sort(key=lambda name: name != environments.PRODUCTION)
    for each in fixes.fix(root) if fix else ():
        typer.echo(f"fixed {each}")
    found: set[Problem] = set()
    with connect() if PREFECT_API_URL.value() else nullcontext() as client:
        for name in names:
            served = name == (environment or deploy.environment)
            new = comparison.check(client, root, name, deploy.owner, served=served)
            found |= {each for each in new if not is_inside(each, found)}
    raise_if_any(found)
    typer.echo(f"no problems: {', '.join(sorted(names))}")
    if environment == environments.PRODUCTION and not settings().repository.url:
        advice = "set it to the web address of the repository's files, https://host/owner/name/blob/main"
        typer.echo(f"warning: TIDEPOOL_REPOSITORY_URL is empty, links to runbooks lead nowhere; {advice}", err=True)


def plan(
    environment: Environment = None,
    image: Image = None,
    version: Version = None,
    json: Json = False,
    markdown: Markdown = False,
    output: Output = None,
    detailed_exitcode: DetailedExitCode = False,
) -> None:
    """Dry run: show what an apply would change, field by field, with the next runs of each schedule before and after.

    Exit code: 0 done, 1 error; with --detailed-exitcode 2 if there are changes.
    """
    from tidepool.deploy.reconcile.actual import read_pauses
    from tidepool.deploy.view import markdown as markdown_view
    from tidepool.deploy.view.plan_view import PlanView

    deploy = settings().deploy
    name = environment or deploy.environment
    with connect() as client:
        found = _compare(client, name, image, version)
        recorded = read_pauses(client, deploy.owner)
    view = PlanView(found.plan, name, datetime.now(UTC), deploy.runs_per_hour, found.notes, recorded)
    _emit(view, output, json=json, markdown=markdown_view.render(view) if markdown else "")
    raise typer.Exit(CHANGES if found.plan and detailed_exitcode else 0)


def apply(
    environment: Environment = None,
    image: Image = None,
    version: Version = None,
    yes_delete: YesDelete = None,
    record: Annotated[
        bool, typer.Option(help="Record the deployed version as a Git tag, for `tidepool rollback`.")
    ] = True,
) -> None:
    """Apply the plan: bring the server to the state in Git. Idempotent.

    Exit code: 0 done or nothing to do, 1 error (if the server failed half-way, it lists what was written).
    """
    from tidepool.deploy import history
    from tidepool.deploy.config import environments

    name = environment or settings().deploy.environment
    with connect(retries=_PATIENT) as client:
        found = _compare(client, name, image, version, deploying=True)
        _guard(found, yes_delete)
        written = _write(client, found)
    typer.echo(f"{name}: {len(written)} written" if written else f"{name}: nothing to do")
    # An environment without an image runs what is in the working folder: there is no version to go back to.
    if written and record and environments.runs_an_image(repository(), name):
        try:
            typer.echo(f"recorded as {history.record(repository(), name, image, datetime.now(UTC))}")
        except TidepoolError as error:
            typer.echo(f"not recorded for `tidepool rollback`: {error}", err=True)


def prune(
    environment: Environment = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
    yes_delete: YesDelete = None,
) -> None:
    """Delete managed resources that are no longer in Git. Unmanaged resources are never deleted.

    Exit code: 0 done or nothing to do, 1 error, or too many deletions without --yes-delete.
    """
    from tidepool.deploy.reconcile.plan import Action, Plan

    name = environment or settings().deploy.environment
    with connect(retries=_PATIENT) as client:
        found = _compare(client, name, None, None)
        deletions = found.plan.of(Action.DELETE)
        if dry_run:
            for change in deletions:
                typer.echo(f"would delete {change.label}")
        else:
            _guard(found, yes_delete)
            _write(client, replace(found, plan=Plan(changes=tuple(deletions))))
    typer.echo(f"{name}: {len(deletions)} {'to delete' if dry_run else 'deleted'}")


def drift(
    environment: Environment = None,
    json: Json = False,
    markdown: Markdown = False,
    output: Output = None,
    end_pauses: Annotated[
        bool, typer.Option("--end-pauses", help="Resume deployments whose pause has expired, as the drift job does.")
    ] = False,
    detailed_exitcode: DetailedExitCode = False,
) -> None:
    """Report differences between Git and the server and since when, and pauses with their author and reason.

    Exit code: 0 done, 1 error; with --detailed-exitcode 2 if there is drift.
    """
    from tidepool.deploy import drift as drift_module

    name = environment or settings().deploy.environment
    with connect() as client:
        try:
            found = drift_module.find(client, name, now=datetime.now(UTC), end_pauses=end_pauses)
        except (LookupError, TypeError, AttributeError, ValueError, OSError):
            # Pauses end whatever the files say. Files that cannot be compared have problems, which are the reason.
            _raise_if_invalid(client, name)
            raise
    _emit(found.view, output, json=json, markdown=found.markdown() if markdown else "")
    for each in found.resumed:
        typer.echo(f"resumed {each.deployment}: paused until {each.until:%Y-%m-%d %H:%M %Z}", err=True)
    raise typer.Exit(CHANGES if found and detailed_exitcode else 0)


def pause(
    name: Name,
    until: Annotated[str, typer.Option(help="4h, 30min, 2d, or a time such as 2026-11-30T09:00+01:00.")],
    reason: Annotated[str, typer.Option(help="Reason, for the next person on call.")],
    by: Annotated[str | None, typer.Option(help="Author. Default: Git's user, or this machine's.")] = None,
) -> None:
    """Pause a deployment's schedules until a time, at which the drift job resumes them. Deploys keep the pause."""
    from tidepool.deploy import pauses
    from tidepool.deploy.reconcile.actual import Pause

    now = datetime.now(UTC)
    if not reason.strip():
        raise UsageError("--reason is empty; state a reason for the next person on call")
    end = pauses.parse_until(until, now)
    with connect(retries=_PATIENT) as client:
        wanted = Pause(deployment=name, by=by or _person(), reason=reason, at=now, until=end)
        pauses.pause(client, wanted, settings().deploy.owner)
    typer.echo(f"paused {name} until {end:%Y-%m-%d %H:%M %Z}; `tidepool resume {name}` ends it earlier")


def resume(name: Name) -> None:
    """Resume a deployment and all its schedules, and delete the record of the pause."""
    from tidepool.deploy import pauses

    with connect(retries=_PATIENT) as client:
        full = pauses.resume(client, name, settings().deploy.owner)
    typer.echo(f"resumed {full}")


def rollback(
    to: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Version to apply. Without it, the versions are listed.")
    ] = None,
    environment: Environment = None,
    yes_delete: YesDelete = None,
) -> None:
    """List the deployed versions, or apply an older one: its image, schedules and everything else.

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
            typer.echo(f"{name}: this checkout has no record of a deploy", err=True)
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


def _compare(
    client: SyncPrefectClient, name: str, image: str | None, version: str | None, *, deploying: bool = False
) -> Comparison:
    from tidepool.deploy.reconcile import comparison

    _raise_if_invalid(client, name, image, deploying=deploying)
    return comparison.compare(client, repository(), name, settings().deploy.owner, image=image, version=version)


def _raise_if_invalid(
    client: SyncPrefectClient, name: str, image: str | None = None, *, deploying: bool = False
) -> None:
    from tidepool.deploy.config.yaml_source import raise_if_any
    from tidepool.deploy.reconcile import comparison

    problems = comparison.check(client, repository(), name, settings().deploy.owner, image=image, deploying=deploying)
    raise_if_any(problems, "nothing was written" if deploying else "")


def _guard(found: Comparison, yes_delete: int | None) -> None:
    """Refuse to delete more than the allowed share.

    Raises:
        UsageError: it is more, and not exactly the confirmed number.
    """
    from tidepool.deploy.reconcile.plan import Action, excessive_deletions

    count, share = len(found.plan.of(Action.DELETE)), settings().deploy.delete_share
    excess = excessive_deletions(found.plan, found.actual, share)
    if yes_delete is not None and yes_delete != count:
        raise UsageError(f"--yes-delete {yes_delete}, but {count} would be deleted; nothing was written")
    if excess and yes_delete is None:
        raise UsageError(
            f"this would delete {', '.join(excess)}, above TIDEPOOL_DEPLOY_DELETE_SHARE={share}; nothing was written. "
            f"To confirm it: --yes-delete {count}"
        )


def _write(client: SyncPrefectClient, found: Comparison) -> list[str]:
    from tidepool.deploy.reconcile import apply as apply_module

    return apply_module.apply(client, found, repository(), settings().deploy.owner, report=typer.echo)


def _emit(view: PlanView, output: Path | None, *, json: bool, markdown: str) -> None:
    """Print a plan, or write it to a file: as JSON, as the given Markdown, or else as a table."""
    from rich.console import Console

    from tidepool.deploy.view import json as json_view
    from tidepool.deploy.view import table

    if json and markdown:
        raise UsageError("--json and --markdown exclude each other; use one of them")
    with _opened(output) if output else nullcontext(sys.stdout) as file:
        if json or markdown:
            file.write(markdown or json_view.render(view) + "\n")
        elif output:
            table.show(view, Console(file=file, highlight=False, width=200))
        else:
            table.show(view, Console(highlight=False, soft_wrap=not sys.stdout.isatty()))


def _opened(output: Path) -> TextIO:
    try:
        return output.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}") from error


def _person() -> str:
    import getpass
    import subprocess

    done = subprocess.run(["git", "config", "user.email"], capture_output=True, text=True, check=False)
    if address := done.stdout.strip():
        return address
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in the password file, as in a container
        raise UsageError("--by is missing: neither Git nor this machine has the name of a user") from None
