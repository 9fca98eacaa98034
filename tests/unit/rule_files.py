"""A good repository for the tests of the checks, and a way to break it."""

# ruff: noqa: E501 - one line of JSON

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tidepool.deploy.config import checks
from tidepool.deploy.config.yaml_source import once

if TYPE_CHECKING:
    from pathlib import Path

FLOWS = '''"""Flows of the test."""

from datetime import date
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow
from pydantic import Field

if TYPE_CHECKING:
    from decimal import Decimal


class Frame:
    """A class that pydantic does not know."""


@flow
def sell(
    count: Annotated[int, Field(ge=1)] = 1,
    shop: str = "corner",
    sizes: list[int] | None = None,
    open: bool = True,
    day: date | None = None,
    kinds: set[str] | None = None,
    rate: float = 0.5,
    frame: Frame | None = None,
    anything: Any = None,
) -> "Decimal":
    """Sells."""


@flow
def deliver(address: str) -> None:
    """Needs an address."""


@flow
def pack(box: int, *items: int, **labels: str) -> None:
    """Takes any number of items and labels."""


no_flow = 3
'''
STEPS = '''"""Steps of the test."""

from typing import Any, TypedDict


class Sum(TypedDict):
    text: str
    number: int


def add(left: int, right: int = 0) -> Sum:
    return {"text": "", "number": left + right}


def undeclared(**inputs: Any) -> dict[str, Any]:
    return inputs


no_step = 3
'''
TEMPLATE = '{"variables": {"type": "object", "properties": {"image": {"type": "string"}, "env": {"type": "object"}, "deadline_seconds": {"type": "integer", "minimum": 60}, "on_crash": {"type": "string", "enum": ["none", "retry 1"]}, "after_outage": {"type": "string"}, "max_runtime_seconds": {"type": "integer"}, "start_timeout_seconds": {"type": "integer"}, "on_termination": {"type": "string"}, "early_cluster": {"type": "string"}}}, "job_configuration": {"image": "{{ image }}"}}'
AUTOMATIONS = """\
work_pools:
  - {name: kubernetes, type: kubernetes, base_job_template: template.json}
variables:
  - {name: shop_owner, value: ann}
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
PREFECT = """\
name: shop
build:
  - tidepool.deploy.steps.validate: {}
  - prefect.deployments.steps.run_shell_script:
      id: commit
      script: git describe
push:
  - tidepool.deploy.steps.pin_image: {id: pin-image, image: "a/b:c"}
  - rule_steps.add: {id: add, left: 1}
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
    entrypoint: rule_flows.sell
    version: "{{ commit.stdout }}"
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
    entrypoint: rule_flows.deliver
    tags: [managed-by:tidepool]
    work_pool: {name: kubernetes, job_variables: {image: "{{ pin-image.image }}"}}
"""
STAGING = """\
every_deployment:
  work_pool: {job_variables: {deadline_seconds: 600}}
deployments:
  deliver:
    paused: true
"""
PYPROJECT = """\
[tool.tidepool]
may_be_empty = ["SHOP_SUFFIX"]
variables = ["SHOP_NAME"]
runbooks = true
"""
RUNBOOK = "# A page\n\n## Meaning\n\n## Impact\n"
FILES = {
    "prefect.yaml": PREFECT,
    "automations.yaml": AUTOMATIONS,
    "environments/staging.yaml": STAGING,
    "pyproject.toml": PYPROJECT,
    "rule_flows.py": FLOWS,
    "rule_steps.py": STEPS,
    "template.json": TEMPLATE,
    **{f"docs/runbooks/{name}.md": RUNBOOK for name in ("sell", "deliver", "run-failed")},
}


def write(folder: Path, file: str = "", old: str = "", new: str = "") -> Path:
    """Write the good files; in one of them, replace a text, or everything if there is no `old`."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if file:
        assert old in FILES[file], f"{file}: {old!r}"
        (folder / file).write_text(FILES[file].replace(old, new, 1) if old else new)
    return folder


def problems(repository: Path, environment: str = "production", **more: Any) -> list[str]:
    """Check a repository of these files."""
    for module in ("rule_flows", "rule_steps"):
        sys.modules.pop(module, None)
    return [str(problem) for problem in once(checks.check(repository, environment, owner="tidepool", **more))]
