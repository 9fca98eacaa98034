"""`tidepool init`: a repository that uses tidepool as a package. `tidepool update`: a newer template for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wheel import build
from tidepool.author import init as subject
from tidepool.errors import UsageError

BIN = Path(sys.executable).parent
# Words of the flows of this repository.
OURS = (
    "csv-etl",
    "csv_etl",
    "taxi",
    "tickets",
    "ticket-model",
    "forecast",
    "image-etl",
    "most-generous",
    "drift-report",
)


def run(folder: Path, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TIDEPOOL_", "PREFECT_"))}
    line, env = [str(each) for each in command], {**kept, **variables}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, str]:
    left_out = {".git", "wheels", "__pycache__", ".ruff_cache", ".pytest_cache"}
    files = (each for each in folder.rglob("*") if each.is_file() and not left_out & {*each.parts})
    return {str(each.relative_to(folder)): each.read_text() for each in files}


def commit(folder: Path) -> None:
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for arguments in (["add", "--all"], [*author, "commit", "--quiet", "--allow-empty", "--message", "all"]):
        assert run(folder, "git", *arguments).returncode == 0


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new repository, which gets tidepool from the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("init")
    wheel = build(folder / "built")
    done = run(
        folder, BIN / "tidepool", "init", "shop", "--flow", "daily-means", "--owner", "data", "--tidepool", wheel
    )
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in folder.iterdir()) == ["built", "shop"]
    return folder / "shop"


def test_it_is_valid_and_names_no_flow_of_this_repository(shop: Path) -> None:
    done = run(shop, BIN / "tidepool", "validate")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(name, word) for name, text in contents(shop).items() for word in OURS if word in text or word in name}
    assert found == set()
    assert (shop / "requirements.in").read_text().splitlines()[-1].startswith("./wheels/tidepool-")
    assert list((shop / "wheels").glob("tidepool-*.whl"))


def test_its_checks_and_its_unit_tests_pass(shop: Path) -> None:
    for check in (["check"], ["format", "--check"]):
        done = run(shop, BIN / "ruff", *check, ".")
        assert done.returncode == 0, done.stdout
    done = run(shop, BIN / "python", "-m", "pytest", "-q", "tests/unit")
    assert done.returncode == 0, done.stdout
    # The fixtures of the flow's test are found: nothing runs.
    done = run(shop, BIN / "python", "-m", "pytest", "-q", "--setup-plan", "tests/integration")
    assert done.returncode == 0, done.stdout
    assert "prefect_server" in done.stdout


def test_make_lists_its_commands(shop: Path) -> None:
    done = run(shop, "make")
    assert {"setup", "demo", "test", "validate", "deploy"} <= {line.split()[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["full"], "exists and is not an empty folder; choose another one, nothing was written"),
        (["full/file"], "exists and is not an empty folder; choose another one, nothing was written"),
        (["Shop"], "folder: invalid name 'Shop': lower-case letters, digits and single hyphens"),
        (["new", "--flow", "a_b"], "--flow: invalid name 'a_b': lower-case letters, digits and single hyphens"),
        (["new", "--flow", "report"], "invalid name 'report': the flow's module uses report for something else"),
        (["new", "--flow", "class"], "invalid name 'class': it is a word of Python"),
        (["new", "--owner", "A team"], "--owner: invalid name 'A team': lower-case letters"),
        (
            ["new", "--tidepool", "x==1"],
            "--tidepool: 'x==1' is not accepted: tidepool==VERSION, tidepool @ git+https://…",
        ),
        (["new", "--tidepool", "no.whl"], "--tidepool: no.whl is not the file of a wheel of tidepool"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    done = run(tmp_path, BIN / "tidepool", "init", *arguments)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert contents(tmp_path) == {"full/file": "x"}
    assert [each.name for each in tmp_path.iterdir()] == ["full"]


def test_it_is_committed_also_without_an_identity(shop: Path, tmp_path: Path) -> None:
    assert run(shop, "git", "log", "--format=%s").stdout.splitlines()[-1].startswith("tidepool init, version ")
    home = {"HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1", "XDG_CONFIG_HOME": str(tmp_path)}
    done = run(tmp_path, BIN / "tidepool", "init", "new", **home)
    assert done.returncode == 0, done.stderr
    new = tmp_path / "new"
    assert run(new, "git", "log", "--format=%an %s").stdout.startswith("tidepool init tidepool init, version ")
    assert run(new, "git", "status", "--short").stdout == ""


def test_without_git_nothing_is_written(tmp_path: Path) -> None:
    done = run(tmp_path, BIN / "tidepool", "init", "new", PATH="/nowhere")
    assert done.returncode == 1
    assert done.stderr == "tidepool: git is not installed, and a repository needs it; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def older(tmp_path: Path, shop: Path) -> Path:
    """A copy of the repository as an older template had written it."""
    folder = tmp_path / "older"
    assert run(tmp_path, "cp", "-r", shop, folder).returncode == 0
    record = json.loads((folder / subject.RECORD).read_text())
    files = record["files"]
    files["Makefile"] = files["Makefile"].replace("Run the tests", "Run all tests")
    files["gone.txt"] = files["changed-and-gone.txt"] = "of the former template\n"
    for name in (".gitignore", "automations.yaml"):
        del files[name]
    files["environments/staging.yaml"] += "# former\n"
    files["README.md"] = files["README.md"].replace("make test       # run", "make test       # execute")
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / ".gitignore").unlink()
    (folder / subject.RECORD).write_text(json.dumps(record))
    return folder


def test_an_update_brings_the_newer_template_and_keeps_local_changes(older: Path, shop: Path) -> None:
    makefile, flow = older / "Makefile", older / "flows" / "daily_means" / "flow.py"
    makefile.write_text(f"{makefile.read_text()}\nours: ## A command of our own\n\t@true\n")
    flow.write_text(f"{flow.read_text()}\n# ours\n")
    (older / "changed-and-gone.txt").write_text("ours\n")
    (older / "automations.yaml").write_text("automations: []\n")
    (older / "environments" / "staging.yaml").unlink()
    commit(older)
    assert subject.update(older) == {
        ".gitignore": "created",
        "Makefile": "updated",
        "README.md": "updated",
        "automations.yaml": "kept; the template has a new file of this name",
        "changed-and-gone.txt": "kept; the template has it no longer",
        "environments/staging.yaml": "kept deleted; the template has changed it",
        "gone.txt": "deleted",
    }
    assert makefile.read_text() == f"{(shop / 'Makefile').read_text()}\nours: ## A command of our own\n\t@true\n"
    assert flow.read_text().endswith("# ours\n")
    assert (older / "README.md").read_text() == (shop / "README.md").read_text()
    commit(older)
    assert subject.update(older) == {}


def test_a_conflict_is_marked_and_is_exit_code_1(older: Path) -> None:
    readme = older / "README.md"
    readme.write_text(readme.read_text().replace("make test       # execute", "make test       # try"))
    commit(older)
    done = run(older, BIN / "tidepool", "update")
    assert done.returncode == 1
    assert "README.md: conflict" in done.stdout.splitlines()
    assert "<<<<<<< this repository" in readme.read_text()
    assert ">>>>>>> template, now" in readme.read_text()


def test_an_update_needs_committed_changes_and_a_record(older: Path) -> None:
    before = contents(older)
    with pytest.raises(UsageError, match="changes that are not committed; commit them first, nothing was written"):
        subject.update(older)
    assert contents(older) == before
    (older / subject.RECORD).write_text("{}")
    with pytest.raises(UsageError, match=r"\.tidepool-init\.json is not as `tidepool init` writes it"):
        subject.update(older)
    (older / subject.RECORD).unlink()
    with pytest.raises(UsageError, match=r"this repository was not made by `tidepool init`"):
        subject.update(older)
