"""Steps of the deploy workflow, in its order, against a real server and a process worker; and the drift report."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.integration.deploy_support import NIGHTLY, Shop
from tidepool.deploy.client import connect
from tidepool.deploy.reconcile.actual import read_deployments

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(290)


@pytest.fixture
def pool(prefect_server: str) -> None:
    """Create the pool that the environment `local` uses."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    del prefect_server
    with connect() as client, suppress(ObjectAlreadyExists):
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name="local", type="process", base_job_template=template))


@pytest.fixture
def worker(pool: None, prefect_server: str, storage_root: str, tmp_path: Path) -> Iterator[None]:
    """Run a process worker of that pool."""
    del pool, storage_root
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local", "--type", "process"]
    log = (tmp_path / "worker.log").open("wb")
    variables = {**os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


@pytest.fixture
def _leave_nothing(prefect_server: str) -> Iterator[None]:
    del prefect_server
    yield
    with connect() as client:
        for each in read_deployments(client, "managed-by:tidepool", []).values():
            client.delete_deployment(each["id"])
        for automation in client.read_automations():
            if "managed-by:tidepool" in automation.tags:
                client.delete_automation(automation.id)


@pytest.mark.usefixtures("worker", "_leave_nothing")
def test_the_steps_of_the_workflow_deploy_this_repository_and_run_the_canary(prefect_server: str) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "deploy.yml").read_text())
    calls = [step["run"] for step in workflow["jobs"]["staging"]["steps"] if "run" in step]
    assert calls == ["make plan", "make deploy", "make prune", "make canary"]
    outputs = []
    for call in [*calls, "make drift"]:
        # This machine's environment instead of staging: processes, no image.
        variables = {**os.environ, "PREFECT_API_URL": prefect_server, "ENVIRONMENT": "local", "IMAGE": ""}
        # `-o setup`: the environment that runs the tests is ready.
        command = [*call.split(), "-o", "setup", f"BIN={Path(sys.executable).parent}"]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{call}: {done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    plan, deploy, prune, canary, drift = outputs
    assert "to create" in plan
    assert "created deployment csv-etl/csv-etl" in deploy
    assert "created automation runs-late" in deploy
    assert prune.strip() == "local: 0 deleted"
    assert "Completed" in canary
    assert "local: as in Git" in drift


@pytest.mark.usefixtures("pool")
def test_the_plan_becomes_a_comment_of_the_pull_request(prefect_server: str, tmp_path: Path) -> None:
    """GitHub cannot run here: a program of its client's name keeps what it is given."""
    gh = tmp_path / "gh"
    gh.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\ncp "$5" {tmp_path}/comment.md\n')
    gh.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    variables = {**os.environ, "PREFECT_API_URL": prefect_server, "ENVIRONMENT": "local", "IMAGE": "", "PATH": path}
    command = ["make", "plan-comment", "PR=7", "-o", "setup", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    arguments = (tmp_path / "arguments").read_text().strip()
    assert arguments == "pr comment 7 --body-file build/plan.md --edit-last --create-if-none"
    comment = (tmp_path / "comment.md").read_text()
    assert "#### `+` create deployment `csv-etl/csv-etl`" in comment, "Markdown"


def test_the_record_of_a_deploy_is_pushed(tmp_path: Path) -> None:
    def git(*arguments: str, folder: Path) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments],
            cwd=folder, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    origin, clone = tmp_path / "origin", tmp_path / "clone"
    git("init", "--bare", "--quiet", str(origin), folder=tmp_path)
    git("clone", "--quiet", str(origin), str(clone), folder=tmp_path)
    git("commit", "--allow-empty", "--message=one", folder=clone)
    git("tag", "deployed/production/2026-11-21T10-00-00Z", folder=clone)
    git("tag", "mine", folder=clone)
    subprocess.run(["make", "-f", str(ROOT / "make" / "deploy.mk"), "record"], cwd=clone, check=True)
    assert git("tag", folder=origin).split() == ["deployed/production/2026-11-21T10-00-00Z"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:prefect.*")
def test_the_drift_report_publishes_and_returns_what_it_finds(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.operations.flow import drift_report

    del prefect_server
    shop = Shop(tmp_path / "shop", monkeypatch)
    shop.create_pool()
    shop.deployment("one", NIGHTLY)
    shop.apply()
    monkeypatch.chdir(shop.root)
    assert drift_report() == {"differences": 0, "paused": 0, "resumed": 0}
    with connect() as client:
        identity = shop.deployments()["one"]["id"]
        client.request("PATCH", "/deployments/{id}", path_params={"id": identity}, json={"description": "Mine."})
        client.pause_deployment(identity)
        assert drift_report() == {"differences": 1, "paused": 1, "resumed": 0}
        artifact = client.request("POST", "/artifacts/filter", json={"artifacts": {"key": {"any_": ["drift-report"]}}, "sort": "CREATED_DESC", "limit": 1}).json()[0]  # fmt: skip  # noqa: E501
    assert artifact["description"] == "production: 1 differ from Git, 1 paused"
    assert "| description | `Mine.` | `Sells. docs/runbooks/one.md` |" in artifact["data"]
