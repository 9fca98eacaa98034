"""History of deployed versions, and rollback to one.

Self-hosted Prefect keeps no history of deployments. Git does: each apply that changes the server adds an annotated tag
`deployed/<environment>/<time>` to its commit, with the image in the message.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import environment as process_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

_TIME = "%Y%m%dT%H%M%SZ"
_FIELDS = "%(refname:strip=2)%00%(*objectname)%00%(contents:body)%00%(*subject)%01"
_IMAGE = re.compile(r"^image: (\S+)$", re.MULTILINE)


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
        The tag; empty without a Git checkout, or if it has uncommitted changes.
    """
    if not is_clean(repository):
        return ""
    tag = f"deployed/{environment}/{now.astimezone(UTC).strftime(_TIME)}"
    message = f"Deployed to {environment}\n\nimage: {image or '-'}\n"
    _git(
        repository,
        *("-c", "user.name=tidepool", "-c", "user.email=tidepool@localhost", "-c", "tag.gpgSign=false"),
        *("tag", "--annotate", "--force", "--message", message, tag),
    )
    return tag


def is_clean(repository: Path) -> bool:
    """Return True if the folder is a Git checkout without uncommitted changes."""
    try:
        return not _git(repository, "status", "--porcelain", "--untracked-files=no").strip()
    except (TidepoolError, FileNotFoundError):
        return False


def versions(repository: Path, environment: str) -> list[Version]:
    """Return the recorded versions of an environment, newest first."""
    text = _git(repository, "for-each-ref", f"--format={_FIELDS}", f"refs/tags/deployed/{environment}/")
    found = []
    for entry in filter(None, (part.strip("\n") for part in text.split("\x01"))):
        tag, commit, body, subject = entry.split("\x00")
        image = _IMAGE.search(body)
        at = datetime.strptime(tag.rsplit("/", 1)[1], _TIME).replace(tzinfo=UTC)
        name = image[1] if image and image[1] != "-" else ""
        found.append(Version(tag=tag, commit=commit, subject=subject, image=name, at=at))
    return sorted(found, key=lambda version: version.at, reverse=True)


def choose(found: list[Version], wanted: str) -> Version:
    """Return the version of a commit (or its first characters) or tag.

    Raises:
        UsageError: it was not deployed.
    """
    for version in found:
        if wanted == version.tag or wanted == version.tag.rsplit("/", 1)[1] or version.commit.startswith(wanted):
            return version
    known = (
        ", ".join(version.commit[:12] for version in found) or "none: this checkout has no record of a deploy"
    )
    raise UsageError(f"version {wanted!r} was not deployed; known: {known}")


@contextmanager
def checked_out(repository: Path, commit: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tidepool-rollback-") as folder:
        path = Path(folder) / "repository"
        _git(repository, "worktree", "add", "--detach", "--quiet", str(path), commit)
        try:
            yield path
        finally:
            _git(repository, "worktree", "remove", "--force", str(path))


def apply_version(repository: Path, environment: str, version: Version, options: list[str]) -> int:
    """Apply an older version: its own files, code and image.

    Args:
        repository: The Git checkout.
        environment: Environment of the version.
        version: The version.
        options: Further options of `tidepool apply`.

    Returns:
        Exit code of `tidepool apply`.
    """
    from prefect.settings import PREFECT_API_URL

    with checked_out(repository, version.commit) as path:
        image = ["--image", version.image] if version.image else []
        command = [sys.executable, "-m", "tidepool.cli", "apply", "--environment", environment, *image, *options]
        # Ahead of the installed project: the flows of that commit are imported, and its own commands do the work.
        url = str(PREFECT_API_URL.value() or "")
        variables = {**process_environment(), "PYTHONPATH": str(path), "PREFECT_API_URL": url}
        return subprocess.run(command, cwd=path, env=variables, check=False).returncode


def _git(repository: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TidepoolError(f"git {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
