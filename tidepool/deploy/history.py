"""Which versions were deployed, and going back to one.

Self-hosted Prefect keeps no history of deployments. Git does: each apply that changed something leaves an annotated tag
`deployed/<environment>/<time>` on its commit, with the image in the message.
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
    """A version that was deployed.

    Attributes:
        tag: Git tag that records it.
        commit: Full hash.
        subject: First line of the commit's message.
        image: As name@sha256:…; empty: the environment runs without one.
        at: When it was deployed.
    """

    tag: str
    commit: str
    subject: str
    image: str
    at: datetime


def record(repository: Path, environment: str, image: str | None, now: datetime) -> str:
    """Notes in Git that the current commit was deployed.

    Returns:
        The tag; empty where there is no Git checkout, or it has changes that no commit holds.
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
    """The folder is a Git checkout, and all that it holds is in its commit."""
    try:
        return not _git(repository, "status", "--porcelain", "--untracked-files=no").strip()
    except (TidepoolError, FileNotFoundError):
        return False


def versions(repository: Path, environment: str) -> list[Version]:
    """The versions of an environment that Git knows, newest first."""
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
    """The version of that commit (or its beginning) or tag.

    Raises:
        UsageError: none of them is it.
    """
    for version in found:
        if wanted == version.tag or wanted == version.tag.rsplit("/", 1)[1] or version.commit.startswith(wanted):
            return version
    known = ", ".join(version.commit[:12] for version in found) or "none: nothing was deployed from here yet"
    raise UsageError(f"version {wanted!r} was not deployed; known: {known}")


@contextmanager
def checked_out(repository: Path, commit: str) -> Iterator[Path]:
    """A folder with the files of a commit, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="tidepool-rollback-") as folder:
        path = Path(folder) / "repository"
        _git(repository, "worktree", "add", "--detach", "--quiet", str(path), commit)
        try:
            yield path
        finally:
            _git(repository, "worktree", "remove", "--force", str(path))


def apply_version(repository: Path, environment: str, version: Version, options: list[str]) -> int:
    """Applies an older version: its own files, its own code, its own image.

    Args:
        repository: The Git checkout.
        environment: Whose it is.
        version: What to go back to.
        options: Further options of `tidepool apply`.

    Returns:
        Exit code of `tidepool apply`.
    """
    with checked_out(repository, version.commit) as path:
        image = ["--image", version.image] if version.image else []
        command = [sys.executable, "-m", "tidepool.cli", "apply", "--environment", environment, *image, *options]
        # Ahead of the installed project: the flows of that commit are imported, and its own commands do the work.
        variables = {**process_environment(), "PYTHONPATH": str(path), **_server()}
        return subprocess.run(command, cwd=path, env=variables, check=False).returncode


def _server() -> dict[str, str]:
    from prefect.settings import PREFECT_API_URL

    return {"PREFECT_API_URL": str(PREFECT_API_URL.value() or "")}


def _git(repository: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TidepoolError(f"git {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
