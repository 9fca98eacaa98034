"""What `tidepool.deploy` relies on in Prefect. A failure here after an upgrade says which promise to look at again."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest


def test_prefect_ignores_unknown_keys_which_is_why_we_do_not() -> None:
    from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, WorkPoolConfig

    for model in (DeploymentConfig, PrefectYamlModel, WorkPoolConfig):
        assert model.model_config["extra"] == "ignore"


def test_each_key_of_prefect_is_either_allowed_or_refused_with_a_reason() -> None:
    from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, RawScheduleConfig, WorkPoolConfig

    from tidepool.deploy.config import models

    pairs = [
        (DeploymentConfig, models.Deployment),
        (RawScheduleConfig, models.Schedule),
        (WorkPoolConfig, models.DeploymentWorkPool),
        (PrefectYamlModel, models.PrefectFile),
    ]
    # `version_type` chooses between ways to guess a version from Git; ours is written out.
    known = {*models.NOT_ALLOWED, "version_type"}
    for theirs, ours in pairs:
        assert set(theirs.model_fields) <= {*ours.model_fields, *known}, theirs.__name__
        assert set(ours.model_fields) <= {*theirs.model_fields, "definitions"}, ours.__name__


def test_build_steps_run_before_the_first_write() -> None:
    from prefect.cli.deploy import _core

    source = inspect.getsource(_core._run_single_deploy)
    assert source.index("await run_steps(build_steps") < source.index("deployment.apply(")


def test_prefect_says_what_it_has_written() -> None:
    from prefect.cli.deploy import _core

    from tidepool.deploy.reconcile.apply import _WRITTEN

    source = inspect.getsource(_core._run_single_deploy)
    assert "successfully created with id '{deployment_id}'" in source
    assert _WRITTEN.search("│ Deployment 'flow/name' successfully created with id '1'. │")


def test_prefect_resumes_a_paused_deployment_which_is_why_a_pause_is_written_out() -> None:
    from prefect.deployments.runner import RunnerDeployment

    assert RunnerDeployment(name="a", flow_name="b", paused=None).paused is False


def test_an_update_without_schedules_leaves_them_alone() -> None:
    from prefect.deployments.runner import RunnerDeployment

    source = inspect.getsource(RunnerDeployment._update)
    assert re.search(r"if self\.schedules:\s+update_payload\[\"schedules\"\]", source)


def test_a_schedule_update_without_active_leaves_it_alone() -> None:
    from prefect.server.schemas.actions import DeploymentScheduleUpdate

    assert DeploymentScheduleUpdate.model_fields["active"].default is None


def test_deleting_a_schedule_deletes_late_runs_too_as_the_docs_say() -> None:
    from prefect.server.api import deployments

    source = inspect.getsource(deployments.delete_deployment_schedule)
    assert "future_only" not in source


def test_prefect_looks_at_a_thousand_ticks() -> None:
    from prefect.server.schemas import schedules

    assert schedules.MAX_ITERATIONS == 1000


def test_prefect_computes_dates_without_awaiting_anything() -> None:
    from prefect.server.schemas import schedules

    for model in (schedules.CronSchedule, schedules.IntervalSchedule, schedules.RRuleSchedule):
        assert "await" not in inspect.getsource(model.get_dates)


def test_automations_carry_our_tag_and_sets_have_no_order() -> None:
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

    from tidepool.deploy.config.automations import _LATER, _SETS

    assert set(_LATER) <= set(AutomationCore.model_fields)
    sets = {name for name, field in EventTrigger.model_fields.items() if "Set" in str(field.annotation)}
    assert sets == set(_SETS)


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated")  # by a plugin of Apprise
def test_the_notification_block_takes_any_apprise_url() -> None:
    from prefect.blocks.notifications import SlackWebhook
    from pydantic import SecretStr

    block = SlackWebhook(url=SecretStr("json://localhost:1/ mailto://user:pass@example.com"))
    assert [type(each).__name__ for each in block._apprise_client] == ["NotifyJSON", "NotifyEmail"]


def test_the_options_of_the_command_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for option in ("--all", "--prefect-file"):
        assert option in done.stdout
