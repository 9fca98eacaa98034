"""The GitHub workflows: they call existing make targets, with pinned actions and least privilege."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.conftest import need

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(name: str) -> dict[Any, Any]:
    content = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    assert isinstance(content, dict)
    return content


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("name", NAMES)
def test_workflows_call_make_targets_that_exist_and_nothing_else(name: str) -> None:
    makefiles = [ROOT / "Makefile", *(ROOT / "make").glob("*.mk")]
    targets = {match for path in makefiles for match in re.findall(r"^([a-z][a-z-]*):", path.read_text(), re.MULTILINE)}
    for step in steps(name):
        if "run" in step:
            call = re.fullmatch(r"make ([a-z-]+)", step["run"])
            assert call, f"{name}: {step['run']!r} is not a call of one make target"
            assert call[1] in targets, f"{name}: unknown make target {call[1]}"


@pytest.mark.parametrize("name", NAMES)
def test_actions_are_pinned_by_commit_with_the_version_beside(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    for uses in re.findall(r"uses: (\S+.*)", text):
        assert uses.startswith("./") or re.fullmatch(r"\S+@[0-9a-f]{40} # v\d+\.\d+\.\d+", uses), uses


@pytest.mark.parametrize("name", NAMES)
def test_no_workflow_has_rights_as_a_whole_and_every_job_has_a_timeout(name: str) -> None:
    content = workflow(name)
    assert content["permissions"] == {}
    for job in content["jobs"].values():
        assert job["permissions"]
        assert "uses" in job or job["timeout-minutes"] <= 60


def test_deploys_queue_up() -> None:
    assert workflow("deploy")["concurrency"]["cancel-in-progress"] is False


def test_production_comes_after_staging_behind_its_gate() -> None:
    jobs = workflow("deploy")["jobs"]
    assert "staging" in jobs["production"]["needs"]
    assert (jobs["staging"]["environment"], jobs["production"]["environment"]) == ("staging", "production")


def test_zizmor_finds_nothing() -> None:
    command = [str(Path(sys.executable).parent / "zizmor"), "--offline", "--quiet", "--no-exit-codes", "--format", "plain", str(ROOT / ".github" / "workflows")]  # fmt: skip  # noqa: E501
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "error[" not in done.stdout, done.stdout
    assert "warning[" not in done.stdout, done.stdout


def test_actionlint_finds_nothing() -> None:
    need("actionlint")
    done = subprocess.run(["actionlint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
