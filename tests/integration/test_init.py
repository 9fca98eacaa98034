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
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert {"setup", "demo", "test", "validate", "deploy", "cluster-objects", "install-chart"} <= listed


@pytest.fixture
def programs(shop: Path, tmp_path: Path) -> Path:
    """A copy of the repository, where programs for a cluster only print their command lines; `tidepool` is real."""
    folder, bin_ = tmp_path / "shop", tmp_path / "bin"
    assert run(tmp_path, "cp", "-r", shop, folder).returncode == 0
    bin_.mkdir()
    for name in ("docker", "helm", "kubectl"):
        (bin_ / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
        (bin_ / name).chmod(0o755)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(BIN)
    for name in ("requirements.txt", "requirements-dev.txt", ".venv/.ready"):
        (folder / name).touch()
    return folder


def make(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, command lines and errors of `make` in that copy."""
    path = f"{folder.parent / 'bin'}:{os.environ['PATH']}"
    done = run(folder, "make", *arguments, PATH=path)
    return done.returncode, done.stdout.splitlines(), done.stderr


IMAGE = f"localhost:5000/shop@sha256:{'a' * 64}"


@pytest.mark.parametrize(
    ("environment", "namespace"), [("dev", "shop-dev"), ("staging", "shop-staging"), ("production", "shop")]
)
def test_its_commands_install_the_platform(programs: Path, environment: str, namespace: str) -> None:
    code, printed, errors = make(programs, "cluster-objects", "namespaces", f"ENVIRONMENT={environment}")
    assert code == 0, errors
    assert printed == [
        "wrote build/platform/chart and build/platform/cluster",
        "kubectl apply --server-side -k build/platform/cluster",
        f"kubectl apply -k k8s/overlays/{environment}",
    ]
    code, printed, errors = make(programs, "install-chart", f"ENVIRONMENT={environment}", f"IMAGE={IMAGE}")
    assert code == 0, errors
    (command,) = printed[1:]
    assert command == (
        f"helm upgrade --install tidepool build/platform/chart --namespace {namespace} "
        f"--values helm/{environment}-values.yaml --set image.repository=localhost:5000/shop "
        f"--set image.digest=sha256:{'a' * 64} --wait --timeout 15m"
    )
    assert make(programs, "test-chart", f"ENVIRONMENT={environment}")[1] == [
        f"helm test tidepool --namespace {namespace} --logs"
    ]
    for each in ("build/platform/chart/Chart.yaml", f"k8s/overlays/{environment}", f"helm/{environment}-values.yaml"):
        assert (programs / each).exists()
    assert run(programs, "git", "status", "--short", "build").stdout == ""


@pytest.mark.parametrize("image", [[], ["IMAGE=localhost:5000/shop:1"]])
def test_the_chart_is_installed_with_a_digest_only(programs: Path, image: list[str]) -> None:
    code, printed, _ = make(programs, "install-chart", "ENVIRONMENT=dev", *image)
    assert code == 2
    assert printed[1:] == ["missing IMAGE=name@sha256:…, as `make image PUSH=1` prints it"]


def test_its_image_is_built_on_the_given_base_and_pushed(programs: Path) -> None:
    tag = run(programs, "git", "describe", "--always", "--dirty", "--abbrev=12").stdout.strip()
    code, printed, errors = make(programs, "image", "PUSH=1", "IMAGE_NAME=r:5000/shop", "TIDEPOOL_IMAGE_BASE=b:1")
    assert code == 0, errors
    assert printed == [
        f"docker buildx build --tag r:5000/shop:{tag} --build-arg REVISION={tag} --build-arg BASE_IMAGE=b:1 --push .",
        f"docker buildx imagetools inspect r:5000/shop:{tag} --format r:5000/shop@{{{{.Manifest.Digest}}}}",
    ]


def test_the_image_gets_what_its_build_copies(shop: Path) -> None:
    sent = {line[1:] for line in (shop / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in (shop / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    names = {name.replace("yam[l]", "yaml") for names in copied for name in names}
    assert names - {"requirements.txt"} <= {each.name for each in shop.iterdir()}
    assert names == sent


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
            "--tidepool: 'x==1' is not accepted: tidepool==VERSION, or the path of a wheel",
        ),
        (
            ["new", "--tidepool", "tidepool @ git+https://t.invalid/t"],
            "--tidepool: a Git address cannot be locked by hash; pip wheel --no-deps 'git+https://t.invalid/t' makes",
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


def test_its_branch_is_that_of_the_workflows(shop: Path) -> None:
    assert run(shop, "git", "branch", "--show-current").stdout == "main\n"


@pytest.fixture
def older(tmp_path: Path, shop: Path) -> Path:
    """A copy of the repository as an older template had written it."""
    folder = tmp_path / "older"
    assert run(tmp_path, "cp", "-r", shop, folder).returncode == 0
    record = json.loads((folder / subject.RECORD).read_text())
    files = record["files"]
    files["Makefile"] = files["Makefile"].replace("Run the tests", "Run all tests")
    files["gone.txt"] = files["changed-and-gone.txt"] = "of the former template\n"
    for name in list(files):
        # Of the first version, which had nothing for Kubernetes.
        if name in {".gitignore", "automations.yaml"} or name.startswith(("helm/", "k8s/")):
            del files[name]
            (folder / name).unlink()
    files["environments/staging.yaml"] += "# former\n"
    files["README.md"] = files["README.md"].replace("make test       # run", "make test       # execute")
    for name, text in files.items():
        (folder / name).write_text(text)
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
    done = subject.update(older)
    kubernetes = {name: done.pop(name) for name in list(done) if name.startswith(("helm/", "k8s/"))}
    assert set(kubernetes.values()) == {"created"}
    assert {"helm/dev-values.yaml", "k8s/overlays/dev/kustomization.yaml"} <= kubernetes.keys()
    assert [name for name in kubernetes if (older / name).read_text() != (shop / name).read_text()] == []
    assert done == {
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
    assert done.stdout.splitlines()[-1] == (
        "in conflict: 1. Edit what is between <<<<<<< and >>>>>>>, then commit all files; "
        "`git stash --include-untracked` undoes the update"
    )
    assert "<<<<<<< this repository" in readme.read_text()
    assert ">>>>>>> template, now" in readme.read_text()
    commit(older)
    line = readme.read_text().splitlines().index("<<<<<<< this repository") + 1
    with pytest.raises(UsageError, match=rf"^README\.md:{line}: a conflict of an earlier update; edit it and commit"):
        subject.update(older)


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
