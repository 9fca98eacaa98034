"""Behaviour of `prefect deploy` and of the server that `tidepool.deploy` relies on."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.integration.deploy_support import HOURLY, NIGHTLY, Shop, prefect_deploy
from tests.polling import until
from tidepool.deploy.client import connect
from tidepool.deploy.reconcile import apply

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def shop(prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """An empty repository without tidepool's veto, with a work pool on the server."""
    del prefect_server
    made = Shop(tmp_path / "shop", monkeypatch)
    made.manifest["build"] = []
    made.create_pool()
    return made


def test_the_command_reports_each_deployment_and_the_reason_of_a_failure(shop: Shop) -> None:
    shop.deployment("one"), shop.deployment("two", entrypoint=f"{shop.module}.nothing"), shop.deployment("three")
    written: list[str] = []
    with pytest.raises(apply.DeployError, match="nothing"):
        written.extend(apply.prefect_deploy(shop.root, shop.manifest))
    assert written == [f"{shop.flow}/one"]
    assert set(shop.deployments()) == {"one"}


def test_the_reason_of_a_step_that_fails_is_what_its_command_says(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = {"id": "commit", "script": "git describe --always", "stream_output": False}
    shop.manifest["build"] = [{"prefect.deployments.steps.run_shell_script": step}]
    shop.deployment("one")
    subprocess.run(["git", "init", "--quiet", str(shop.root)], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(apply.DeployError, match=r"run_shell_script: RuntimeError: .*dubious ownership"):
        list(apply.prefect_deploy(shop.root, shop.manifest))


def test_a_redeploy_resumes_a_paused_deployment_and_leaves_schedules_alone_that_it_does_not_name(shop: Shop) -> None:
    """Therefore an apply writes a pause out, and updates schedules itself."""
    config = shop.deployment("one", NIGHTLY)
    assert prefect_deploy(shop.root, shop.manifest).exit_code == 0
    before = shop.deployments()["one"]
    with connect() as client:
        client.pause_deployment(before["id"])
    del config["schedules"]
    assert prefect_deploy(shop.root, shop.manifest).exit_code == 0
    after = shop.deployments()["one"]
    assert after["paused"] is False
    assert [each["id"] for each in after["schedules"]] == [each["id"] for each in before["schedules"]]


def test_deleting_a_schedule_deletes_its_late_runs_too_as_the_docs_say(shop: Shop) -> None:
    from prefect.client.schemas.objects import StateType
    from prefect.states import State

    shop.deployment("one", HOURLY)
    assert prefect_deploy(shop.root, shop.manifest).exit_code == 0
    deployment = shop.deployments()["one"]
    run = min(until(shop.future_runs))
    with connect() as client:
        client.set_flow_run_state(run, State(type=StateType.SCHEDULED, name="Late"), force=True)  # type: ignore[arg-type]
        client.delete_deployment_schedule(deployment["id"], deployment["schedules"][0]["id"])
    until(lambda: run not in shop.future_runs())
