"""The workflows of a repository that `tidepool init` writes: as ours are, they call make targets that are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.conftest import need
from tidepool.author import init

TOP = Path(__file__).parents[2]
FOLDER = ".github/workflows/"
TEXTS = init.texts(init.Answers("shop", "daily-means", "data", "tidepool==0.1.0"))
NAMES = sorted(path.removeprefix(FOLDER) for path in TEXTS if path.startswith(FOLDER))


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)  # actionlint looks for the top of the repository
    return tmp_path


def steps(name: str) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(TEXTS[f"{FOLDER}{name}"])["jobs"]
    return [step for job in jobs.values() for step in job.get("steps", [])]


def test_they_check_plan_deploy_and_look_for_drift() -> None:
    assert NAMES == ["ci.yml", "deploy.yml", "drift.yml", "image.yml"]
    called = {name: [step["run"].removeprefix("make ") for step in steps(name) if "run" in step] for name in NAMES}
    assert {"check", "check-workflows", "validate", "test"} == set(called["ci.yml"])
    assert called["image.yml"] == ["publish"]
    assert called["drift.yml"] == ["drift"]
    assert called["deploy.yml"][0] == "plan-comment"
    assert {"plan", "deploy", "prune", "canary", "record"} < set(called["deploy.yml"])


@pytest.mark.parametrize("name", NAMES)
def test_they_call_make_targets_that_exist_and_nothing_else(name: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", TEXTS["Makefile"], re.MULTILINE))
    called = [step["run"] for step in steps(name) if "run" in step]
    assert [each for each in called if each.removeprefix("make ") not in targets] == []


def test_what_they_do_is_what_ours_do() -> None:
    """The copies follow ours: a pinned action, a permission, an environment that changes here changes there."""
    for name in ("deploy.yml", "drift.yml", "image.yml"):
        ours = yaml.safe_load((TOP / FOLDER / name).read_text())
        theirs = yaml.safe_load(TEXTS[f"{FOLDER}{name}"])
        if name == "deploy.yml":  # the paths that a plan is made for are those of each repository
            del ours[True]["pull_request"], theirs[True]["pull_request"]  # YAML 1.1 reads `on` as true
        assert theirs == ours, name


@pytest.mark.parametrize("name", NAMES)
def test_their_actions_are_ours(name: str) -> None:
    ours = "".join(path.read_text() for path in (TOP / FOLDER).glob("*.yml"))
    used = re.findall(r"uses: (.+)", TEXTS[f"{FOLDER}{name}"])
    assert used
    assert [each for each in used if f"uses: {each}\n" not in ours] == []


def test_zizmor_finds_nothing(shop: Path) -> None:
    command = [str(Path(sys.executable).parent / "zizmor"), "--offline", "--quiet", str(shop / ".github")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint_finds_nothing(shop: Path) -> None:
    need("actionlint")
    done = subprocess.run(["actionlint"], cwd=shop, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
