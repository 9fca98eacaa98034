"""History of deployed versions, and rollback to one.

Self-hosted Prefect keeps no history of deployments. Git does: each apply that changes the server adds an annotated tag
`deployed/<environment>/<time>` to its commit, with the image in the message.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import environment as process_environment

if TYPE_CHECKING:
    from pathlib import Path

# What Git says, and the sentence for it.
_REFUSALS = {
    "dubious ownership": (
        "Git does not read this folder, because it belongs to another user; to trust it: "
        'git config --global --add safe.directory "$PWD"'
    ),
    "not a git repository": "this is not a Git checkout",
}
_TIME = "%Y%m%dT%H%M%SZ"
_IMAGE = "%(contents:trailers:key=image,valueonly,separator=)"
_FIELDS = f"%(refname:strip=2)%00%(*objectname)%00{_IMAGE}%00%(*subject)"


@dataclass(frozen=True)
class Version:
    """A deployed version.

    Attributes:
        tag: Git tag that records it.
        commit: Full hash.
        subject: First line of the commit's message.
        image: As name@sha256:…; empty if the environment runs without one.
        at: Time of the deploy.
    """

    tag: str
    commit: str
    subject: str
    image: str
    at: datetime


def record(repository: Path, environment: str, image: str | None, now: datetime) -> str:
    """Record in Git that the current commit was deployed.

    Returns:
        The tag.

    Raises:
        TidepoolError: the folder is not a Git checkout that this user can read, or has uncommitted changes.
    """
    if _git(repository, "status", "--porcelain", "--untracked-files=no"):
        raise TidepoolError("the Git checkout has uncommitted changes")
    tag = f"deployed/{environment}/{now.astimezone(UTC).strftime(_TIME)}"
    message = f"Deployed to {environment}\n\nimage: {image or '-'}\n"
    _git(
        repository,
        *("-c", "user.name=tidepool", "-c", "user.email=tidepool@localhost", "-c", "tag.gpgSign=false"),
        *("tag", "--annotate", "--force", "--message", message, tag),
    )
    return tag


def versions(repository: Path, environment: str) -> list[Version]:
    """Return the recorded versions of an environment, newest first."""
    tags = f"refs/tags/deployed/{environment}/"
    text = _git(repository, "for-each-ref", "--sort=-refname", f"--format={_FIELDS}", tags)
    found = []
    for line in filter(None, text.split("\n")):
        tag, commit, image, subject = line.split("\x00")
        at = datetime.strptime(tag.rsplit("/", 1)[1], _TIME).replace(tzinfo=UTC)
        found.append(Version(tag, commit, subject, "" if image == "-" else image, at))
    return found


def choose(found: list[Version], wanted: str) -> Version:
    """Return the version of a commit (or its first characters) or tag.

    Raises:
        UsageError: it was not deployed.
    """
    for version in found:
        if (
            wanted == version.tag
            or wanted == version.tag.rsplit("/", 1)[1]
            or (wanted and version.commit.startswith(wanted))
        ):
            return version
    known = ", ".join(version.commit[:12] for version in found) or "none: this checkout has no record of a deploy"
    raise UsageError(f"version {wanted!r} was not deployed; known: {known}")


def apply_version(repository: Path, environment: str, version: Version, options: list[str]) -> int:
    """Apply an older version: its own files, code and image, from a temporary checkout of its commit.

    Args:
        repository: The Git checkout.
        environment: Environment of the version.
        version: The version.
        options: Further options of `tidepool apply`.

    Returns:
        Exit code of `tidepool apply`.
    """
    from prefect.settings import PREFECT_API_URL

    image = ["--image", version.image] if version.image else []
    command = [sys.executable, "-m", "tidepool.cli", "apply", "--environment", environment, *image, *options]
    with tempfile.TemporaryDirectory(prefix="tidepool-rollback-") as folder:
        path = f"{folder}/repository"
        _git(repository, "worktree", "add", "--detach", "--quiet", path, version.commit)
        # Ahead of the installed project: the flows of that commit are imported, and its own commands do the work.
        url = str(PREFECT_API_URL.value() or "")
        variables = {**process_environment(), "PYTHONPATH": path, "PREFECT_API_URL": url}
        try:
            return subprocess.run(command, cwd=path, env=variables, check=False).returncode
        finally:
            _git(repository, "worktree", "remove", "--force", path)


def _git(repository: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=repository,
            env={**process_environment(), "LC_ALL": "C"},  # Git's words in English
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise TidepoolError("Git is not installed") from None
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip() or done.stdout.strip()
    for words, sentence in _REFUSALS.items():
        if words in said:
            raise TidepoolError(sentence)
    raise TidepoolError(f"git {arguments[0]}: {' '.join(said.split())}")
