"""Models of Prefect that `tidepool.deploy` mirrors. A failure after an upgrade names the model to look at again.

`tests/integration/test_deploy_prefect.py` pins what `prefect deploy` and the server do.
"""

from __future__ import annotations

from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, RawScheduleConfig, WorkPoolConfig
from prefect.events.schemas.automations import AutomationCore, EventTrigger

from tidepool.deploy.config import automations, models


def test_prefect_ignores_unknown_keys_which_is_why_tidepool_refuses_them() -> None:
    assert DeploymentConfig.model_validate({"name": "a", "concurency_limit": 1}).name == "a"
    assert WorkPoolConfig.model_validate({"name": "a", "job_variable": {}}).name == "a"
    assert PrefectYamlModel.model_validate({"name": "a", "deploymens": []}).name == "a"


def test_each_key_of_prefect_is_either_allowed_or_refused_with_a_reason() -> None:
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


def test_the_normal_form_of_automations_knows_the_fields_and_the_sets_of_prefects() -> None:
    core, sets = automations._NOT_COMPARED, automations._SETS
    assert core <= set(AutomationCore.model_fields)
    assert {name for name, field in EventTrigger.model_fields.items() if "Set" in str(field.annotation)} == set(sets)
