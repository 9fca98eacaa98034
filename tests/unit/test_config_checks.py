"""Checks of prefect.yaml and automations.yaml: invalid files and the message for each, with its line."""

# ruff: noqa: E501 - rows of a table

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tidepool.deploy.config import checks, environments

if TYPE_CHECKING:
    from pathlib import Path

FLOWS = '''"""Flows of the test."""

from typing import Annotated

from prefect import flow
from pydantic import Field


@flow
def sell(count: Annotated[int, Field(ge=1)] = 1, shop: str = "corner", sizes: list[int] | None = None) -> None:
    """Sells."""


@flow
def deliver(address: str) -> None:
    """Needs an address."""


no_flow = 3
'''
TEMPLATE = '{"variables": {"type": "object", "properties": {"image": {"type": "string"}, "env": {"type": "object"}, "deadline_seconds": {"type": "integer", "minimum": 60}, "on_crash": {"type": "string", "enum": ["none", "retry 1"]}, "after_outage": {"type": "string"}, "max_runtime_seconds": {"type": "integer"}, "start_timeout_seconds": {"type": "integer"}, "on_termination": {"type": "string"}}}, "job_configuration": {}}'
SERVER = """\
work_pools:
  - {name: kubernetes, type: kubernetes, base_job_template: template.json}
automations:
  - name: run-failed
    description: Notifies on-call.
    trigger:
      type: event
      posture: Reactive
      expect: [prefect.flow-run.Failed]
      match: {prefect.resource.id: prefect.flow-run.*}
      threshold: 1
      within: 0
    actions:
      - {type: notify, subject: failed, body: look}
"""
GOOD = """\
name: shop
build:
  - tidepool.deploy.steps.validate: {}
pull: []
definitions:
  schedules:
    nightly: &nightly
      slug: nightly
      cron: "15 3 * * *"
      timezone: Europe/Paris
deployments:
  - name: sell
    description: Sells. docs/runbooks/sell.md
    entrypoint: manifest_flows.sell
    tags: [managed-by:tidepool]
    schedules: [*nightly]
    concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}
    parameters: {count: 2}
    work_pool:
      name: kubernetes
      job_variables:
        image: "{{ pin-image.image }}"
        deadline_seconds: 900
        env: {GREETING: hello}
  - name: deliver
    description: Delivers. docs/runbooks/deliver.md
    entrypoint: manifest_flows.deliver
    tags: [managed-by:tidepool]
    work_pool: {name: kubernetes}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "runbooks").mkdir(parents=True)
    for name in ("sell", "deliver", "run-failed"):
        (tmp_path / "docs" / "runbooks" / f"{name}.md").touch()
    (tmp_path / "manifest_flows.py").write_text(FLOWS)
    (tmp_path / "template.json").write_text(TEMPLATE)
    (tmp_path / "automations.yaml").write_text(SERVER)
    (tmp_path / "prefect.yaml").write_text(GOOD)
    return tmp_path


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def problems(repository: Path, environment: str = "production") -> list[str]:
    sys.modules.pop("manifest_flows", None)
    return [str(problem) for problem in checks.check(repository, environment, owner="tidepool")]


def test_a_good_file_has_no_problem(repository: Path) -> None:
    assert problems(repository) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(
            "concurrency_limit: {",
            "concurency_limit: {",
            "prefect.yaml:17: deployments[sell].concurency_limit: unknown key; did you mean concurrency_limit?",
            id="unknown key",
        ),
        pytest.param(
            "      job_variables:\n",
            "      job_varables:\n",
            "prefect.yaml:21: deployments[sell].work_pool.job_varables: unknown key; did you mean job_variables?",
            id="unknown key of the work pool",
        ),
        pytest.param(
            'cron: "15 3 * * *"',
            'cron: "15 25 * * *"',
            "prefect.yaml:9: deployments[sell].schedules[0].cron: '15 25 * * *': invalid cron string: \"15 25 * * *\"",
            id="cron",
        ),
        pytest.param(
            'cron: "15 3 * * *"',
            'cron: "0 0 30 2 *"',
            "prefect.yaml:9: deployments[sell].schedules[0].cron: '0 0 30 2 *': failed to find next date",
            id="cron that never fires",
        ),
        pytest.param(
            "timezone: Europe/Paris",
            "timezone: Europe/Pari",
            "prefect.yaml:10: deployments[sell].schedules[0].timezone: unknown timezone 'Europe/Pari'; "
            "did you mean Europe/Paris?",
            id="timezone",
        ),
        pytest.param(
            "      slug: nightly\n",
            "",
            "prefect.yaml:7: deployments[sell].schedules[0].slug: missing",
            id="no slug",
        ),
        pytest.param(
            "schedules: [*nightly]",
            "schedules: [*nightly, *nightly]",
            "prefect.yaml:8: deployments[sell].schedules[1].slug: duplicate slug 'nightly'",
            id="duplicate slug",
        ),
        pytest.param(
            "      slug: nightly\n",
            "      slug: nightly\n      replaces: nightly\n",
            "prefect.yaml:9: deployments[sell].schedules[0].replaces: schedule 'nightly' still exists",
            id="replaced schedule still exists",
        ),
        pytest.param(
            'cron: "15 3 * * *"',
            "interval: 60",
            "prefect.yaml:7: deployments[sell].schedules[0]: an interval needs an anchor_date: without one each deploy "
            "moves the ticks",
            id="interval without anchor",
        ),
        pytest.param(
            'cron: "15 3 * * *"',
            "interval: 60\n      anchor_date: 2026-01-01",
            "prefect.yaml:10: deployments[sell].schedules[0].anchor_date: input should be a valid string, not "
            "datetime.date(2026, 1, 1)",
            id="a date without quotes",
        ),
        pytest.param(
            "parameters: {count: 2}",
            "parameters: {count: many}",
            "prefect.yaml:18: deployments[sell].parameters.count: input should be a valid integer, unable to parse "
            "string as an integer, not 'many'",
            id="parameter",
        ),
        pytest.param(
            "parameters: {count: 2}",
            "parameters: {cuont: 2}",
            "prefect.yaml:18: deployments[sell].parameters.cuont: the flow has no such parameter; did you mean count?",
            id="unknown parameter",
        ),
        pytest.param(
            "parameters: {count: 2}",
            "parameters:\n      sizes:\n        - 1\n        - big",
            "prefect.yaml:21: deployments[sell].parameters.sizes[1]: input should be a valid integer, unable to parse "
            "string as an integer, not 'big'",
            id="item of a parameter",
        ),
        pytest.param(
            '      cron: "15 3 * * *"\n',
            '      cron: "15 3 * * *"\n      parameters: {count: 0}\n',
            "prefect.yaml:10: deployments[sell].schedules[0].parameters.count: input should be greater than or equal "
            "to 1, not 0",
            id="parameter of a schedule",
        ),
        pytest.param(
            "deadline_seconds: 900",
            "deadline_seconds: soon",
            "prefect.yaml:23: deployments[sell].work_pool.job_variables.deadline_seconds: 'soon' is not of type 'integer'",
            id="job variable",
        ),
        pytest.param(
            "deadline_seconds: 900",
            "dealine_seconds: 900",
            "prefect.yaml:23: deployments[sell].work_pool.job_variables.dealine_seconds: work pool kubernetes has no "
            "such job variable; did you mean deadline_seconds?",
            id="unknown job variable",
        ),
        pytest.param(
            "deadline_seconds: 900",
            "on_crash: retry",
            "prefect.yaml:23: deployments[sell].work_pool.job_variables.on_crash: 'retry' is not one of ['none', 'retry 1']",
            id="policy that is not one",
        ),
        pytest.param(
            "deadline_seconds: 900",
            "deadline_seconds: 900\n        max_runtime_seconds: 900",
            "prefect.yaml:24: deployments[sell].work_pool.job_variables.max_runtime_seconds: 900 is not below "
            "deadline_seconds (900), which would end the run first",
            id="maximum runtime beyond the deadline",
        ),
        pytest.param(
            "deadline_seconds: 900",
            "deadline_seconds: 900\n        start_timeout_seconds: 1200",
            "prefect.yaml:24: deployments[sell].work_pool.job_variables.start_timeout_seconds: 1200 is not below",
            id="start timeout beyond the deadline",
        ),
        pytest.param(
            "deadline_seconds: 900",
            "max_runtime_seconds: 600\n        on_termination: reschedule",
            "prefect.yaml:23: deployments[sell].work_pool.job_variables.max_runtime_seconds: a run that it ends would be "
            "executed again, because of on_termination: reschedule",
            id="maximum runtime of a run that is rescheduled",
        ),
        pytest.param(
            "    work_pool: {name: kubernetes}\n",
            "    work_pool: {name: kubernetes, job_variables: {after_outage: latest}}\n",
            "prefect.yaml:29: deployments[deliver].work_pool.job_variables.after_outage: it chooses among scheduled runs, "
            "and the deployment has no schedules",
            id="outage policy without a schedule",
        ),
        pytest.param(
            "manifest_flows.sell",
            "manifest_flows.sel",
            "prefect.yaml:14: deployments[sell].entrypoint: cannot import flow manifest_flows.sel: MissingFlowError: ",
            id="entrypoint",
        ),
        pytest.param(
            "manifest_flows.sell",
            "manifest_flows.py:sell",
            "prefect.yaml:14: deployments[sell].entrypoint: 'manifest_flows.py:sell' is a file; use the module: "
            "flows.<domain>.flow.<function>",
            id="file entrypoint",
        ),
        pytest.param(
            "    parameters: {count: 2}",
            "    build: null",
            "prefect.yaml:18: deployments[sell].build: not allowed here: a deployment with its own `build` skips the "
            "checks of the top-level one",
            id="own build",
        ),
        pytest.param(
            "    parameters: {count: 2}",
            "    sla: []",
            "prefect.yaml:18: deployments[sell].sla: not allowed here: self-hosted Prefect refuses it after it has "
            "written the deployment; write an automation",
            id="sla",
        ),
        pytest.param(
            "      slug: nightly\n",
            "      slug: nightly\n      active: false\n",
            "prefect.yaml:9: deployments[sell].schedules[0].active: not allowed here: a deploy would undo a pause made "
            "by on-call; use `tidepool pause`",
            id="active",
        ),
        pytest.param(
            "  - name: deliver\n",
            "  - name: sell\n",
            "prefect.yaml:25: deployments[sell].name: duplicate name: the second deployment would overwrite the first",
            id="duplicate name",
        ),
        pytest.param(
            "docs/runbooks/deliver.md",
            "docs/runbooks/delivery.md",
            "prefect.yaml:26: deployments[deliver].description: the runbook docs/runbooks/delivery.md does not exist",
            id="runbook",
        ),
        pytest.param(
            "GREETING: hello",
            "SHOP_PASSWORD: hunter2",
            "prefect.yaml:24: deployments[sell].work_pool.job_variables.env.SHOP_PASSWORD: looks like a secret in plain "
            "text, which would be stored in the deployment's record; move it to the Kubernetes Secret of the flow runs",
            id="secret by name",
        ),
        pytest.param(
            "GREETING: hello",
            'DATABASE: "postgresql://shop:hunter2@db/shop"',
            "prefect.yaml:24: deployments[sell].work_pool.job_variables.env.DATABASE: looks like a secret in plain text",
            id="secret by value",
        ),
        pytest.param(
            "GREETING: hello",
            'TIDEPOOL_STORAGE_ROT: "s3://b"',
            "prefect.yaml:24: deployments[sell].work_pool.job_variables.env: unknown setting TIDEPOOL_STORAGE_ROT; "
            "did you mean TIDEPOOL_STORAGE_ROOT?",
            id="misspelt setting",
        ),
        pytest.param(
            "tags: [managed-by:tidepool]\n    schedules",
            "tags: [tier:1]\n    schedules",
            "prefect.yaml:15: deployments[sell].tags: missing tag managed-by:tidepool, which marks the deployment as managed",
            id="no owner",
        ),
        pytest.param(
            "  - tidepool.deploy.steps.validate: {}\n",
            "  - prefect.deployments.steps.run_shell_script: {script: date}\n",
            "prefect.yaml:2: build: the first step must be tidepool.deploy.steps.validate: it refuses an invalid "
            "file before the first write",
            id="no validation step",
        ),
        pytest.param(
            "pull: []\n",
            "",
            "prefect.yaml:1: pull: missing: without it Prefect writes this machine's folder into each deployment; the "
            "image is the code: `pull: []`",
            id="no pull",
        ),
        pytest.param(
            "    parameters: {count: 2}",
            "    parameters: {count: 2}\n    parameters: {count: 3}",
            "prefect.yaml:19: deployments[sell].parameters: duplicate key (first at line 18)",
            id="duplicate key",
        ),
        pytest.param(
            "    parameters: {count: 2}",
            "   parameters: {count: 2}",
            "prefect.yaml:18: invalid YAML",
            id="invalid YAML",
        ),
        pytest.param(
            "    work_pool: {name: kubernetes}\n",
            "    work_pool: kubernetes\n",
            "prefect.yaml:29: deployments[deliver].work_pool: must be a mapping, not 'kubernetes'",
            id="text instead of a mapping",
        ),
        pytest.param(
            "collision_strategy: CANCEL_NEW",
            "collision_strategy: SKIP",
            "prefect.yaml:17: deployments[sell].concurrency_limit.collision_strategy: input should be 'ENQUEUE' or "
            "'CANCEL_NEW', not 'SKIP'",
            id="collision strategy",
        ),
        pytest.param(
            "    entrypoint: manifest_flows.deliver\n",
            "    entrypoint: manifest_flows.deliver\n    schedules: [*nightly]\n",
            "prefect.yaml:7: deployments[deliver].schedules[0].parameters: missing address, which the flow requires: "
            "each scheduled run would fail",
            id="scheduled without a required parameter",
        ),
    ],
)
def test_a_problem_is_reported_with_its_line(repository: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    (repository / "prefect.yaml").write_text(GOOD.replace(old, new, 1))
    found = problems(repository)
    assert any(problem.startswith(expected) for problem in found), found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("    trigger:\n", "    triger:\n", "automations.yaml:6: automations[run-failed].triger: unknown key; did you mean trigger?"),
        ("threshold: 1", "treshold: 1", "automations.yaml:11: automations[run-failed].trigger.treshold: unknown key; did you mean threshold?"),
        ("posture: Reactive", "posture: Sometimes", "automations.yaml:8: automations[run-failed].trigger.posture: input should be Posture.Reactive or Posture.Proactive"),
        ("name: run-failed", "name: run-fail", "automations.yaml:4: automations[run-fail].name: the runbook docs/runbooks/run-fail.md does not exist"),
        ("{type: notify, subject: failed, body: look}", "{type: run-deployment, deployment: sell/nope}", "automations.yaml:13: automations[run-failed].actions: unknown deployment 'sell/nope'; did you mean sell/sell?"),
        ("template.json", "templat.json", "templat.json:1: template of work pool kubernetes: "),
        ("automations:\n", "concurrency_limits: [{name: downloads, limit: 2}]\nautomations:\n", "automations.yaml:3: concurrency_limits[downloads].name: the name must start with tidepool-, which marks it as managed: a limit has no tags"),
    ],
)  # fmt: skip
def test_a_problem_of_automations_is_reported_with_its_line(
    repository: Path, old: str, new: str, expected: str
) -> None:
    assert old in SERVER
    (repository / "automations.yaml").write_text(SERVER.replace(old, new, 1))
    found = problems(repository)
    assert any(problem.startswith(expected) for problem in found), found


@pytest.mark.parametrize("code", ["import no_such_library", "1 / 0", "raise KeyError('shop')", "def"])
def test_a_flow_that_cannot_be_imported_is_a_problem_whatever_its_module_raises(repository: Path, code: str) -> None:
    (repository / "manifest_flows.py").write_text(f"{code}\n")
    found = problems(repository)
    assert [problem.split(": ")[:3] for problem in found] == [
        ["prefect.yaml:14", "deployments[sell].entrypoint", "cannot import flow manifest_flows.sell"],
        ["prefect.yaml:27", "deployments[deliver].entrypoint", "cannot import flow manifest_flows.deliver"],
    ]


def test_all_problems_are_reported_at_once(repository: Path) -> None:
    broken = GOOD.replace("count: 2", "count: many").replace("Europe/Paris", "Mars").replace("deliver.md", "d.md")
    (repository / "prefect.yaml").write_text(broken)
    assert len(problems(repository)) == 3


def test_a_problem_of_an_overlay_is_reported_with_the_overlays_line(repository: Path) -> None:
    (repository / "environments").mkdir()
    overlay = "deployments:\n  sell:\n    work_pool:\n      job_variables:\n        deadline_seconds: 1\n"
    (repository / "environments" / "staging.yaml").write_text(overlay)
    assert problems(repository) == []
    assert problems(repository, "staging") == [
        (
            "environments/staging.yaml:5: deployments[sell].work_pool.job_variables.deadline_seconds: "
            "1 is less than the minimum of 60"
        )
    ]


def test_lines_stay_right_when_an_overlay_removes_a_deployment(repository: Path) -> None:
    (repository / "environments").mkdir()
    (repository / "environments" / "local.yaml").write_text("deployments:\n  sell: null\n")
    (repository / "prefect.yaml").write_text(GOOD.replace("docs/runbooks/deliver.md", "docs/runbooks/d.md"))
    found = "prefect.yaml:26: deployments[deliver].description: the runbook docs/runbooks/d.md does not exist"
    assert found in problems(repository, "local")


def test_a_secret_is_not_repeated_in_the_message(repository: Path) -> None:
    (repository / "prefect.yaml").write_text(GOOD.replace("GREETING: hello", "API_TOKEN: hunter2"))
    assert "hunter2" not in "\n".join(problems(repository))


def test_a_reference_to_a_secret_is_accepted(repository: Path) -> None:
    text = GOOD.replace("GREETING: hello", 'API_TOKEN: "{{ prefect.blocks.secret.token }}", SHOP_SECRET_NAME: shop')
    (repository / "prefect.yaml").write_text(text)
    assert problems(repository) == []


def test_a_missing_file_is_one_problem(tmp_path: Path) -> None:
    assert [problem.split(": ")[:2] for problem in problems(tmp_path)] == [["prefect.yaml:1", "cannot be read"]]


def test_each_invalid_file_is_a_problem_with_its_line(repository: Path) -> None:
    (repository / "environments").mkdir()
    (repository / "environments" / "staging.yaml").write_text("deployments:\n  sell: ]\n")
    (repository / "automations.yaml").write_text("work_pools: []\nautomations: ]\n")
    assert [problem.split(": ")[:2] for problem in problems(repository, "staging")] == [
        ["automations.yaml:2", "invalid YAML"],
        ["environments/staging.yaml:2", "invalid YAML"],
    ]


def test_the_command_prints_all_problems_and_exits_with_2(repository: Path) -> None:
    (repository / "prefect.yaml").write_text(GOOD.replace("count: 2", "count: many"))
    done = subprocess.run(
        [sys.executable, "-m", "tidepool.cli", "validate"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "1 problem; nothing was written:" in done.stderr
    assert "Traceback" not in done.stderr


def test_this_repository_has_no_problem() -> None:
    from tidepool.settings import repository

    for environment in environments.names(repository()):
        assert checks.check(repository(), environment, owner="tidepool") == []
