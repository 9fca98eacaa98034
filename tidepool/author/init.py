"""`tidepool init` and `tidepool update`: a repository that uses tidepool as a package, and a newer template for it.

A new repository is made beside its place, validated there, and moved. Its file `.tidepool-init.json` keeps the answers
and each file as the template gave it. So an update is a merge of three texts, by `git merge-file`: as it was given, as
it is now, as the newer template gives it (docs/decisions/0111-*.md).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tidepool.author.chart import packed
from tidepool.author.new import flow_files, refusal, render
from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable

RECORD = ".tidepool-init.json"
_HERE = "this repository"
_HEADINGS = ["Meaning", "Impact", "Diagnosis", "Mitigation", "How to know it is fixed"]
# Names of namespaces in k8s/.
_NAMESPACE = re.compile(r"^((?:namespace|  name): )tidepool(?=-|$)", re.MULTILINE)
# The first flow is the author's from the beginning: an update does not touch it.
_FILES = {
    ".dockerignore": "dockerignore",
    ".gitattributes": "gitattributes",
    ".github/CODEOWNERS": "CODEOWNERS",
    ".github/dependabot.yml": "dependabot.yml",
    ".github/workflows/ci.yml": "ci.yml",
    ".github/workflows/deploy.yml": "deploy.yml",
    ".github/workflows/drift.yml": "drift.yml",
    ".github/workflows/image.yml": "image.yml",
    ".gitignore": "gitignore",
    "Dockerfile": "Dockerfile",
    "Makefile": "Makefile",
    "README.md": "README.md",
    "automations.yaml": "automations.yaml",
    "docs/runbooks/work-pool-not-ready.md": "work-pool-not-ready.md",
    "environments/dev.yaml": "dev.yaml",
    "environments/local.yaml": "local.yaml",
    "environments/staging.yaml": "staging.yaml",
    "helm/dev-values.yaml": "dev-values.yaml",
    "helm/production-values.yaml": "production-values.yaml",
    "helm/staging-values.yaml": "staging-values.yaml",
    "prefect.yaml": "prefect.yaml",
    "pyproject.toml": "pyproject.toml",
    "requirements-dev.in": "requirements-dev.in",
    "requirements.in": "requirements.in",
}


@dataclass(frozen=True)
class Answers:
    """The answers that a repository was made from.

    Attributes:
        repository: Its name.
        flow: Name of its first flow.
        owner: Team that owns the flow.
        requirement: The line of requirements.in that installs tidepool.
    """

    repository: str
    flow: str
    owner: str
    requirement: str


def init(folder: Path, flow: str, owner: str, tidepool: str) -> None:
    """Create a repository.

    Args:
        folder: Its place: it does not exist, or is empty.
        flow: Name of its first flow.
        owner: Team that owns the flow.
        tidepool: Requirement, as `tidepool==0.1.0`, or the path of a wheel, which is copied to the repository; empty
            for the version that runs.

    Raises:
        UsageError: something is wrong with an argument; nothing was written.
        TidepoolError: the folder cannot be written; nothing was written.
    """
    folder = folder.absolute()
    _check(folder, flow, owner)
    wheel, requirement = _requirement(tidepool)
    answers = Answers(folder.name, flow, owner, requirement)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            given = texts(answers)
            for path, text in {**given, **_flow(answers)}.items():
                _write(made / path, text)
            _record(made, answers, given)
            if wheel:
                (made / "wheels").mkdir()
                shutil.copy2(wheel, made / "wheels")
            _validate(made)
            for cache in list(made.rglob("__pycache__")):
                shutil.rmtree(cache)
            _git("init", "--quiet", "--initial-branch=main", str(made))  # the branch of the workflows
            _commit(made)
            if folder.exists():  # it may be the current folder, so it stays
                for each in list(made.iterdir()):
                    each.rename(folder / each.name)
            else:
                made.rename(folder)
    except OSError as error:
        raise TidepoolError(f"{error.filename or folder}: {error.strerror}; nothing was written") from error


def update(repository: Path) -> dict[str, str]:
    """Merge the template of this version into a repository that `init` made.

    Returns:
        For each file that the template has changed: `updated`, `created`, `deleted`, `conflict`, or why it is kept.

    Raises:
        UsageError: the repository has no record of the template, a conflict of an earlier update, or changes that are
            not committed.
    """
    record = repository / RECORD
    try:
        given = json.loads(record.read_text(encoding="utf-8"))
        answers, old = Answers(**given["answers"]), dict(given["files"])
    except FileNotFoundError:
        raise UsageError(f"{RECORD} does not exist: this repository was not made by `tidepool init`") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{RECORD} is not as `tidepool init` writes it; restore it from Git") from None
    _refuse_conflicts(repository, old)
    if _git("status", "--porcelain", folder=repository).stdout.strip():
        raise UsageError("the repository has changes that are not committed; commit them first, nothing was written")
    new, done = texts(answers), {}
    for path in sorted({*old, *new}):
        if old.get(path) != new.get(path) and (word := _merge(repository / path, old.get(path), new.get(path))):
            done[path] = word
    _record(repository, answers, new)
    return done


def _refuse_conflicts(repository: Path, paths: Iterable[str]) -> None:
    for path in paths:
        file = repository / path
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if marked := next((at for at, line in enumerate(lines, 1) if line.startswith(f"<<<<<<< {_HERE}")), 0):
            raise UsageError(
                f"{path}:{marked}: a conflict of an earlier update; edit it and commit, nothing was written"
            )


def _merge(path: Path, old: str | None, new: str | None) -> str:
    """Bring one file from what the template gave to what it gives now; return the word for what was done."""
    here = path.read_text(encoding="utf-8") if path.is_file() else None
    if here == new:
        return ""
    if old is None or new is None or here is None:
        return _one_sided(path, here, old, new)
    with TemporaryDirectory() as temporary:
        names = [Path(temporary) / name for name in ("here", "given", "new")]
        for name, text in zip(names, (here, old, new), strict=True):
            _write(name, text)
        labels = [word for label in (_HERE, "template, before", "template, now") for word in ("-L", label)]
        merged = _git("merge-file", "--stdout", *labels, *map(str, names), accepted=range(128))
    _write(path, merged.stdout)
    return "conflict" if merged.returncode else "updated"


def _validate(repository: Path) -> None:
    """Run `tidepool validate` there, in a process of its own: this one may have imported another package `flows`."""
    command = [sys.executable, "-m", "tidepool.cli", "validate"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if done.returncode:
        found = f"{done.stdout}{done.stderr}".strip().removeprefix("tidepool: ")
        raise TidepoolError(f"the new repository is not valid, nothing was written: {found}")


def _one_sided(path: Path, here: str | None, old: str | None, new: str | None) -> str:
    """Bring a file that is missing here, in the former template or in this one; return the word for what was done."""
    if here is None and old is None:
        _write(path, new or "")
        return "created"
    if here is None:
        return "kept deleted; the template has changed it"
    if new is None and here == old:
        path.unlink()
        return "deleted"
    return "kept; the template has it no longer" if new is None else "kept; the template has a new file of this name"


def _check(folder: Path, flow: str, owner: str) -> None:
    for what, name in (("folder", folder.name), ("--flow", flow), ("--owner", owner)):
        if accepted := refusal(name):
            raise UsageError(f"{what}: invalid name {name!r}: {accepted}; for example daily-orders")
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; choose another one, nothing was written")
    if shutil.which("git") is None:
        raise UsageError("git is not installed, and a repository needs it; nothing was written")


def _requirement(given: str) -> tuple[Path | None, str]:
    """Return the wheel to copy, if any, and the line of requirements.in."""
    from packaging.requirements import InvalidRequirement, Requirement

    if given.endswith(".whl"):
        wheel = Path(given)
        if not wheel.is_file() or not wheel.name.startswith("tidepool-"):
            raise UsageError(f"--tidepool: {given} is not the file of a wheel of tidepool; nothing was written")
        return wheel, f"./wheels/{wheel.name}"
    text = given or f"tidepool=={version('tidepool')}"
    try:
        requirement = Requirement(text)
        fits = requirement.name == "tidepool"
    except InvalidRequirement:
        fits = False
    if not fits:
        accepted = "tidepool==VERSION, or the path of a wheel"
        raise UsageError(f"--tidepool: {text!r} is not accepted: {accepted}; nothing was written")
    if (requirement.url or "").startswith("git+"):
        # pip and uv install nothing without a hash where the other packages have one.
        advice = f"pip wheel --no-deps '{requirement.url}' makes a wheel: give its path"
        raise UsageError(f"--tidepool: a Git address cannot be locked by hash; {advice}; nothing was written")
    return None, text


def _values(answers: Answers) -> dict[str, object]:
    module = answers.flow.replace("-", "_")
    return {
        **asdict(answers),
        "name": answers.flow,
        "module": module,
        "kind": "plain",
        "sample": f"samples/{answers.flow}.csv",
        "runbook": f"docs/runbooks/{answers.flow}.md",
        "wheel": answers.requirement.startswith("./"),
        "prefect": version("prefect"),
        "manager": settings().deploy.owner,
    }


def texts(answers: Answers) -> dict[str, str]:
    """Return the files that a repository gets and `update` merges, by their paths: all but its first flow.

    Raises:
        TidepoolError: this installation does not have the files of k8s/.
    """
    values = _values(answers)
    return {**{path: render(template, values) for path, template in _FILES.items()}, **_namespaces(answers)}


def _namespaces(answers: Answers) -> dict[str, str]:
    """Return the files of k8s/: those of tidepool's own repository, with namespaces of this repository's name."""
    found = {}
    for folder in ("base", "overlays"):
        top = packed(folder)
        for path in sorted(top.rglob("*.yaml")):
            # The S3 server for development needs an image that only tidepool's own repository builds.
            if "store" not in (name := path.relative_to(top)).parts:
                text = path.read_text(encoding="utf-8")
                found[f"k8s/{folder}/{name}"] = _NAMESPACE.sub(rf"\1{answers.repository}", text)
    return found


def _flow(answers: Answers) -> dict[str, str]:
    first = {"flows/__init__.py": '"""The flows, a package for each domain."""\n'}
    return {**first, **flow_files(_values(answers), "On request", _HEADINGS)}


def _record(repository: Path, answers: Answers, files: dict[str, str]) -> None:
    content = {"version": version("tidepool"), "answers": asdict(answers), "files": files}
    _write(repository / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def _commit(made: Path) -> None:
    """Commit the new repository: a deployment's version is the commit, and an update needs one to compare with."""
    # A name and an address that are configured; Git would make them up otherwise, or refuse.
    asked = ("-c", "user.useConfigOnly=true", "var", "GIT_AUTHOR_IDENT")
    named = _git(*asked, folder=made, accepted=range(129)).returncode == 0
    author = () if named else ("-c", "user.name=tidepool init", "-c", "user.email=tidepool-init@localhost")
    _git("add", "--all", folder=made)
    message = f"tidepool init, version {version('tidepool')}"
    _git(*author, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", message, folder=made)


def _git(*arguments: str, folder: Path | None = None, accepted: range = range(1)) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError("git is not installed; nothing was written") from None
    if done.returncode not in accepted:
        raise TidepoolError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done
