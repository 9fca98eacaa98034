"""`tidepool new`: each kind of flow, with the real tools, in a copy of this repository."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest
import yaml

from tests.integration.repository_copy import copy
from tests.integration.small_repository import command, variables
from tidepool.author import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.timeout(900)

# The longest name, the shortest, and what ordinary ones look like: the lines of the templates must fit.
NAMES = {"plain": "a", "mapped": "station-means", "batched": "b" * 20 + "-" + "c" * 19, "dataframe": "taxi-2"}


def run(repository: Path, line: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, cwd=repository, env=variables(**more), capture_output=True, text=True, check=False, timeout=600
    )


def new(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(repository, command("new", *arguments))


def changed(repository: Path) -> list[str]:
    """Files that are not as they were committed."""
    line = ["git", "status", "--porcelain", "--untracked-files=all"]
    return [each[3:] for each in run(repository, line).stdout.splitlines()]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Path:
    """A repository with a flow of each kind."""
    repository = copy(tmp_path_factory.mktemp("new") / "repository", migrated_database)
    for kind, name in NAMES.items():
        schedule = [] if kind == "plain" else ["--cron", "30 6 * * MON-FRI", "--timezone", "Europe/Paris"]
        done = new(repository, name, "--kind", kind, "--owner", "platform", "--tier", "3", *schedule)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(rf"no problems; next: (\S*/)?tidepool run {name}", done.stdout.splitlines()[-1])
    return repository


def test_every_kind_is_made() -> None:
    assert set(NAMES) == set(get_args(Kind))


def test_only_lines_are_added_to_files_that_exist(four: Path) -> None:
    """Each comment, each anchor and each line of prefect.yaml and of README.md is where it was."""
    counted = run(four, ["git", "diff", "--numstat"]).stdout.splitlines()
    assert sorted(line.split("\t")[1:] for line in counted) == [["0", "README.md"], ["0", "prefect.yaml"]]
    names = [each["name"] for each in yaml.safe_load((four / "prefect.yaml").read_text())["deployments"]]
    assert names == sorted(names)


def test_the_linter_accepts_each_kind(four: Path) -> None:
    made = [name for name in changed(four) if name.endswith(".py")]
    assert len(made) == 5 * len(NAMES)
    for check in (["check"], ["format", "--check"]):
        done = run(four, [sys.executable, "-m", "ruff", *check, *made])
        assert done.returncode == 0, done.stdout


def test_the_type_checker_accepts_each_kind(four: Path) -> None:
    packages = [f"--package=flows.{name.replace('-', '_')}" for name in NAMES.values()]
    # The cache of `make check` has what the four packages import: a minute without it.
    cache = f"--cache-dir={Path(__file__).parents[2] / '.mypy_cache'}"
    done = run(four, [sys.executable, "-m", "mypy", cache, *packages])
    assert done.returncode == 0, done.stdout


def test_the_tests_of_each_kind_pass(four: Path) -> None:
    made = [name for name in changed(four) if name.startswith("tests/")]
    assert len(made) == 2 * len(NAMES)
    done = run(four, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *made])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", NAMES)
def test_each_kind_runs_on_dask_workers(four: Path, prefect_server: str, kind: str) -> None:
    more = {"PREFECT_API_URL": prefect_server, "TIDEPOOL_COMPUTE_PROVIDER": "local"}
    done = run(four, command("run", NAMES[kind], "--json"), **more)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["result"]["groups"] == 3
    written = Path(outcome["outputs"][0].removeprefix("file://"))
    assert written.read_text() == "group,mean\neast,2.5\nnorth,3.5\nsouth,6.25\n"
    assert ("Dask cluster" in done.stderr) == (kind != "plain")


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, migrated_database: Path) -> None:
    repository = copy(tmp_path / "repository", migrated_database)
    arguments = ("orders", "--owner", "platform", "--tier", "3")

    # A folder that cannot be made: there is a file of its name.
    samples = repository / "samples"
    samples.rename(repository / "kept")
    samples.symlink_to(repository / "nowhere" / "else")
    before = changed(repository)
    done = new(repository, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("tidepool: samples cannot be written: ")
    assert done.stderr.endswith("; nothing was written\n")
    assert changed(repository) == before
    samples.unlink()
    (repository / "kept").rename(samples)

    # A rule of the repository that the new flow breaks.
    rules = repository / "pyproject.toml"
    rules.write_text(rules.read_text().replace("late_imports = [", 'late_imports = [ "statistics",'))
    done = new(repository, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "tidepool: 1 problem; nothing was written:\n  flows/orders/transform.py:8: each run of"
    )
    assert changed(repository) == ["pyproject.toml"]
