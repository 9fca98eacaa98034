"""The rules of `tidepool validate` as a table: for each, a bad example, and its message with file and line."""

# ruff: noqa: E501 - rows of a table

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.unit.rule_files import AUTOMATIONS, FLOWS, PREFECT, PYPROJECT, problems, write
from tidepool.deploy.config import (
    automations,
    checks,
    deployments,
    environments,
    form,
    house_rules,
    models,
    schedules,
    scope,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


# A whole deployment at the top of the file.
TOP = """\
build: [{tidepool.deploy.steps.validate: {}}]
pull: []
name: sell
entrypoint: rule_flows.sell
tags: [managed-by:tidepool]
schedules: [{slug: nightly, cron: "15 3 * * *"}]
work_pool: {name: kubernetes}
"""


class Row(NamedTuple):
    """A rule: its name, the change of a good file that breaks it (all of it without `old`), and the whole messages."""

    rule: str
    old: str
    new: str
    messages: tuple[str, ...]
    file: str = "prefect.yaml"
    environment: str = "production"
    house_rule: str = ""
    server: checks.Server | None = None
    deploying: bool = False


FORMS = '''"""Flows of the test."""

from typing import Annotated

from prefect import flow
from pydantic import Field


# Whatever is above the decorator is not counted.
@flow
def sell(
    count: Annotated[int, Field(description="How many {run_id}.")] = 1,
    shop: Annotated[str, Field(description="The same.")] = "",
    day: Annotated[str, Field(description="ISO 8601: 2026-01-31.")] = "",
) -> None:
    """Sells.

    Args:
        count: Number of pieces.
        shop: The same.
    """

@flow
def deliver(address: str) -> None:
    """Delivers."""
'''

ROWS = [
    Row("unknown key", "concurrency_limit: {", "concurency_limit: {", ("prefect.yaml:24: deployments[sell].concurency_limit: unknown key; did you mean concurrency_limit?",)),
    Row("unknown key of the work pool", "      job_variables:\n", "      job_varables:\n", ("prefect.yaml:28: deployments[sell].work_pool.job_varables: unknown key; did you mean job_variables?",)),
    Row("job variable in the wrong place", "    parameters: {count: 2}\n", "    parameters: {count: 2}\n    env: {GREETING: hello}\n", ("prefect.yaml:26: deployments[sell].env: unknown key; job variables belong into `work_pool: {job_variables: {…}}`",)),
    Row("job variables in the wrong place", "    parameters: {count: 2}\n", "    parameters: {count: 2}\n    job_variables: {}\n", ("prefect.yaml:26: deployments[sell].job_variables: unknown key; these keys belong into `work_pool`",)),
    Row("job variable in the work pool", "    work_pool:\n", "    work_pool:\n      command: sh\n", ("prefect.yaml:27: deployments[sell].work_pool.command: unknown key; job variables belong into `job_variables`",)),
    Row("version of the file", "name: shop\n", "version: 2\nname: shop\n", ("prefect.yaml:1: version: unknown key; remove it: only a deployment has a version, in its item of `deployments`",)),
    Row("steps as a mapping", "    parameters: {count: 2}\n", "    pull: {}\n", ("prefect.yaml:25: deployments[sell].pull: must be a list, not a mapping",)),
    Row("name of the run in a placeholder", "    parameters: {count: 2}\n", "    parameters: {count: 2, shop: '{{ flow_run.name }}'}\n", ("prefect.yaml:25: deployments[sell].parameters.shop: {{ flow_run.name }}: unknown step 'flow_run'; of the run that is it is {{ ctx.flow_run.name }}",)),
    Row("own build hides no step's name falsely", "    parameters: {count: 2}\n", "    build: [{prefect.deployments.steps.run_shell_script: {id: tell, script: x}}]\n    parameters: {shop: '{{ tell.stdout }}'}\n", ("prefect.yaml:25: deployments[sell].build: not allowed here: a deployment with its own `build` skips the checks of the top-level one",)),
    Row("missing key", "    entrypoint: rule_flows.deliver\n", "", ("prefect.yaml:32: deployments[deliver].entrypoint: missing",)),
    Row("no name does not hide what is next to it", "  - name: sell\n    description: Sells. docs/runbooks/sell.md\n", "  - description: Sells.\n", ("prefect.yaml:18: deployments[0].description: no link to a runbook, such as docs/runbooks/<name>.md", "prefect.yaml:18: deployments[0].name: missing")),
    Row("own build", "    parameters: {count: 2}\n", "    build: null\n", ("prefect.yaml:25: deployments[sell].build: not allowed here: a deployment with its own `build` skips the checks of the top-level one",)),
    Row("sla", "    parameters: {count: 2}\n", "    sla: []\n", ("prefect.yaml:25: deployments[sell].sla: not allowed here: self-hosted Prefect refuses it after it has written the deployment; write an automation",)),
    Row("active", "      slug: nightly\n", "      slug: nightly\n      active: false\n", ("prefect.yaml:15: deployments[sell].schedules[0].active: not allowed here: a deploy would undo what on-call does; without it the schedule runs: remove the schedule, or write `paused: true` into the deployment",)),
    Row("name that Prefect refuses", "  - name: sell\n", "  - name: sell/it\n", ("prefect.yaml:18: deployments[sell/it].name: 'sell/it' must be without / % & < >, and not empty",)),
    Row("name without a value", "  - name: sell\n", "  - name:\n", ("prefect.yaml:18: deployments[0].name: missing: it has no value",)),
    Row("names", "", "", ("prefect.yaml:14: deployments[sell].schedules[0].slug: 'nightly' does not match [a-m]+, `names` of [tool.tidepool]", "prefect.yaml:18: deployments[sell].name: 'sell' does not match [a-m]+, `names` of [tool.tidepool]", "prefect.yaml:32: deployments[deliver].name: 'deliver' does not match [a-m]+, `names` of [tool.tidepool]"), house_rule='names = "[a-m]+"'),
    Row("names that are not a pattern", "variables =", 'names = "["\nvariables =', ("pyproject.toml:3: tool.tidepool.names: '[' is not a regular expression: unterminated character set at position 0",), file="pyproject.toml"),
    Row("timezones", "      timezone: Europe/Paris\n", "", ("prefect.yaml:13: deployments[sell].schedules[0].timezone: missing: `timezones` of [tool.tidepool] asks for it",), house_rule="timezones = true"),
    Row("schedule of Prefect 2", "    parameters: {count: 2}\n", "    schedule: {cron: '0 1 * * *'}\n", ("prefect.yaml:25: deployments[sell].schedule: not allowed here: write `schedules`, a list, each with a slug",)),
    Row("work queue in the wrong place", "    parameters: {count: 2}\n", "    work_queue_name: default\n", ("prefect.yaml:25: deployments[sell].work_queue_name: unknown key; these keys belong into `work_pool`",)),
    Row("pull without a value", "pull: []\n", "pull:\n", ("prefect.yaml:10: pull: missing: without it Prefect writes this machine's folder into each deployment; the image is the code: `pull: []`",)),
    Row("step of an installed package that lacks it", "prefect.deployments.steps.run_shell_script:\n      id: commit\n", "prefect.deployments.steps.run_shel_script:\n      id: commit\n      requires: prefect\n", ("prefect.yaml:4: build[1].prefect.deployments.steps.run_shel_script: unknown step prefect.deployments.steps.run_shel_script; did you mean run_shell_script?",)),
    Row("pull step of a deployment", "    parameters: {count: 2}\n", "    parameters: {count: 2}\n    pull: [{prefect.deployments.steps.git_clone: {repositry: x, branch: '{{ nowhere.stdout }}'}}]\n", ("prefect.yaml:26: deployments[sell].pull[0].prefect.deployments.steps.git_clone.branch: {{ nowhere.stdout }}: unknown step 'nowhere'; known: add, commit, pin-image", "prefect.yaml:26: deployments[sell].pull[0].prefect.deployments.steps.git_clone.repositry: unknown input of this step; did you mean repository?")),
    Row("pull of a deployment without a value", "    parameters: {count: 2}\n", "    parameters: {count: 2}\n    pull:\n", ("prefect.yaml:26: deployments[sell].pull: missing: without it Prefect writes this machine's folder into each deployment; the image is the code: `pull: []`",)),
    Row("key of a schedule in the wrong place", "    parameters: {count: 2}\n", "    parameters: {count: 2}\n    timezone: Europe/Paris\n", ("prefect.yaml:26: deployments[sell].timezone: unknown key; the keys of a schedule belong into an item of `schedules`",)),
    Row("keys of a schedule in the wrong place", "    parameters: {count: 2}\n", "    parameters: {count: 2}\n    timezone: Europe/Paris\n    active: true\n", ("prefect.yaml:26: deployments[sell].timezone: unknown keys timezone, active; the keys of a schedule belong into an item of `schedules`",)),
    Row("keys of a concurrency limit in the wrong place", "concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}", "limit: 1\n    collision_strategy: CANCEL_NEW", ("prefect.yaml:24: deployments[sell].limit: unknown keys limit, collision_strategy; these keys belong into `concurrency_limit`",)),
    Row("a deployment at the top", "", TOP, ("prefect.yaml:4: entrypoint: unknown keys entrypoint, tags, schedules, work_pool; the keys of a deployment belong into an item of `deployments`",)),
    Row("keys of the last deployment at the top", """    entrypoint: rule_flows.deliver
    tags: [managed-by:tidepool]
    work_pool: {name""", """entrypoint: rule_flows.deliver
tags: [managed-by:tidepool]
work_pool: {name""", ("prefect.yaml:34: entrypoint: unknown keys entrypoint, tags, work_pool; the keys of a deployment belong into an item of `deployments`",)),
    Row("a mistake at an anchor", "  - name: deliver\n", "  - name: late\n    description: docs/runbooks/sell.md\n    entrypoint: rule_flows.sell\n    tags: [managed-by:tidepool]\n    schedules: [{<<: *nightly, timezone: Mars}, {<<: *nightly, slug: b, cron: '0 1 * * 9'}]\n    work_pool: &pool {name: kubernetes, job_variables: {image: a/b:c, dealine_seconds: 9}}\n  - name: later\n    description: docs/runbooks/sell.md\n    entrypoint: rule_flows.sell\n    tags: [managed-by:tidepool]\n    work_pool: *pool\n  - name: deliver\n", ("prefect.yaml:36: deployments[late].schedules[0].timezone: unknown timezone 'Mars'; an example is Europe/Paris", "prefect.yaml:36: deployments[late].schedules[1].cron: '0 1 * * 9': day of week '9' is not accepted: 0 to 7, or SUN to SAT", "prefect.yaml:37: deployments[late].work_pool.job_variables.dealine_seconds: work pool kubernetes has no such job variable; did you mean deadline_seconds? (also in deployments[later])")),
    Row("entrypoint with backslashes", "entrypoint: rule_flows.deliver", "entrypoint: flows\\m.py:a", ("prefect.yaml:34: deployments[deliver].entrypoint: 'flows\\\\m.py:a' is a file that does not exist; name the function by its module, with dots, as Dask workers import it: flows.m.a",)),
    Row("secret of an environment variable under another name", "GREETING: hello", 'GREETING: "{{ $SHOP_PASSWORD }}"', ("prefect.yaml:31: deployments[sell].work_pool.job_variables.env.GREETING: the value of $SHOP_PASSWORD would be stored in the deployment's record; move it to the Kubernetes Secret of the flow runs",)),
    Row("secret under a name of its own", "GREETING: hello", "TS_AUTHKEY: abc", ("prefect.yaml:31: deployments[sell].work_pool.job_variables.env.TS_AUTHKEY: looks like a secret in plain text, which would be stored in the deployment's record; move it to the Kubernetes Secret of the flow runs",)),
    Row("step of Prefect 2", "prefect.deployments.steps.run_shell_script", "prefect.projects.steps.run_shell_script", ("prefect.yaml:4: build[1].prefect.projects.steps.run_shell_script: cannot import step prefect.projects.steps.run_shell_script: ModuleNotFoundError: No module named 'prefect.projects'; in Prefect 3 it is prefect.deployments.steps.run_shell_script",)),
    Row("secret of an environment variable", "GREETING: hello", 'SHOP_PASSWORD: "{{ $SHOP_PASSWORD }}"', ("prefect.yaml:31: deployments[sell].work_pool.job_variables.env.SHOP_PASSWORD: the value of $SHOP_PASSWORD would be stored in the deployment's record; move it to the Kubernetes Secret of the flow runs",)),
    Row("duplicate name", "  - name: deliver\n", "  - name: sell\n", ("prefect.yaml:32: deployments[sell].name: duplicate name (first at line 18): overlays and commands find a deployment by it, so each is unique",)),
    Row("duplicate name by an anchor", PREFECT[PREFECT.index("definitions:") :], "definitions:\n  base: &base {name: sell, tags: [managed-by:tidepool]}\ndeployments:\n" + PREFECT[PREFECT.index("  - name: sell") :].replace("  - name: sell", "  - <<: *base").replace("  - name: deliver", "  - <<: *base").replace("    tags: [managed-by:tidepool]\n", "").replace("    schedules: [*nightly]\n", ""), ("prefect.yaml:26: deployments[sell].name: duplicate name (first at line 14): overlays and commands find a deployment by it, so each is unique",)),
    Row("duplicate key", "    parameters: {count: 2}\n", "    parameters: {count: 2}\n    parameters: {count: 2}\n", ("prefect.yaml:26: deployments[sell].parameters: duplicate key (first at line 25)",)),
    Row("no pull", "pull: []\n", "", ("prefect.yaml:1: pull: missing: without it Prefect writes this machine's folder into each deployment; the image is the code: `pull: []`",)),
    Row("no validation step", "  - tidepool.deploy.steps.validate: {}\n", "", ("prefect.yaml:2: build: the first step must be tidepool.deploy.steps.validate: it refuses an invalid file before the first write",)),
    Row("build that is a text hides no step's name", PREFECT[PREFECT.index("build:") : PREFECT.index("push:")], "build: tidepool.deploy.steps.validate\n", ("prefect.yaml:2: build: input should be a valid list, not 'tidepool.deploy.steps.validate'",)),
    Row("step that is a text", "  - tidepool.deploy.steps.validate: {}\n", "  - tidepool.deploy.steps.validate\n", ("prefect.yaml:3: build[0]: must be a mapping, not 'tidepool.deploy.steps.validate'",)),
    Row("misspelt build", "build:\n", "biuld:\n", ("prefect.yaml:2: biuld: unknown key; did you mean build?",)),
    Row("no deployments", "", "build: [{tidepool.deploy.steps.validate: {}}]\npull: []\ndeployments: []\n", ("prefect.yaml:3: deployments: list should have at least 1 item after validation, not 0, not []",)),
    Row("text instead of a mapping", '    work_pool: {name: kubernetes, job_variables: {image: "{{ pin-image.image }}"}}\n', "    work_pool: kubernetes\n", ("prefect.yaml:36: deployments[deliver].work_pool: must be a mapping, not 'kubernetes'",)),
    Row("text instead of a deployment", "deployments:\n", "deployments:\n  - sell\n", ("prefect.yaml:18: deployments[0]: must be a mapping, not 'sell'",)),
    Row("collision strategy", "collision_strategy: CANCEL_NEW", "collision_strategy: SKIP", ("prefect.yaml:24: deployments[sell].concurrency_limit.collision_strategy: input should be 'ENQUEUE' or 'CANCEL_NEW', not 'SKIP'",)),
    Row("concurrency limit of another type", "concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}", "concurrency_limit: one", ("prefect.yaml:24: deployments[sell].concurrency_limit: input should be a valid integer, not 'one'",)),
    Row("the whole file is a list", "", "- a\n", ("prefect.yaml:1: the file: it must be a mapping, not list",)),
    Row("cron field out of its range", '      cron: "15 3 * * *"\n', '      cron: "15 25 * * *"\n', ("prefect.yaml:15: deployments[sell].schedules[0].cron: '15 25 * * *': hour '25' is not accepted: 0 to 23",)),
    Row("six-field cron", '      cron: "15 3 * * *"\n', '      cron: "0 0 7 * * 1-5"\n', ("prefect.yaml:15: deployments[sell].schedules[0].cron: '0 0 7 * * 1-5': a cron expression has five fields, not 6: minute, hour, day of month, month, day of week",)),
    Row("unknown name of a cron", '      cron: "15 3 * * *"\n', '      cron: "@every 5m"\n', ("prefect.yaml:15: deployments[sell].schedules[0].cron: '@every 5m': a cron expression has five fields, not 2: minute, hour, day of month, month, day of week",)),
    Row("unknown one-word cron", '      cron: "15 3 * * *"\n', '      cron: "@often"\n', ("prefect.yaml:15: deployments[sell].schedules[0].cron: '@often': unknown name; use five fields (minute, hour, day of month, month, day of week) or one of @hourly, @daily, @midnight, @weekly, @monthly, @yearly, @annually",)),
    Row("cron that never fires", '      cron: "15 3 * * *"\n', '      cron: "0 0 30 2 *"\n', ("prefect.yaml:15: deployments[sell].schedules[0].cron: '0 0 30 2 *': failed to find next date",)),
    Row("random cron", '      cron: "15 3 * * *"\n', '      cron: "R R * * *"\n', ("prefect.yaml:15: deployments[sell].schedules[0].cron: 'R R * * *': minute 'R' is not accepted: 0 to 59; hour 'R' is not accepted: 0 to 23",)),
    Row("timezone", "timezone: Europe/Paris", "timezone: Europe/Pari", ("prefect.yaml:16: deployments[sell].schedules[0].timezone: unknown timezone 'Europe/Pari'; did you mean Europe/Paris?",)),
    Row("no slug", "      slug: nightly\n", "", ("prefect.yaml:13: deployments[sell].schedules[0].slug: missing: by its slug a schedule keeps its pause when it is changed; write for example `slug: daily`",)),
    Row("duplicate slug", "schedules: [*nightly]", "schedules: [*nightly, *nightly]", ("prefect.yaml:23: deployments[sell].schedules[1].slug: duplicate slug 'nightly'",)),
    Row("replaced schedule still exists", "      slug: nightly\n", "      slug: nightly\n      replaces: nightly\n", ("prefect.yaml:15: deployments[sell].schedules[0].replaces: schedule 'nightly' still exists",)),
    Row("replaced twice", "    schedules: [*nightly]\n", "    schedules:\n      - {slug: a, cron: '0 1 * * *', timezone: UTC, replaces: old}\n      - {slug: b, cron: '0 2 * * *', timezone: UTC, replaces: old}\n", ("prefect.yaml:25: deployments[sell].schedules[1].replaces: schedule 'old' is replaced more than once",)),
    Row("two kinds in one schedule", '      cron: "15 3 * * *"\n', '      cron: "15 3 * * *"\n      interval: 60\n', ("prefect.yaml:16: deployments[sell].schedules[0].interval: exactly one of cron, interval and rrule is needed, not cron and interval",)),
    Row("interval without anchor", '      cron: "15 3 * * *"\n', "      interval: 60\n", ("prefect.yaml:13: deployments[sell].schedules[0].anchor_date: missing: an interval needs one, because without it each deploy moves the ticks",)),
    Row("several mistakes of an interval", '      slug: nightly\n      cron: "15 3 * * *"\n      timezone: Europe/Paris\n', "      interval: 1h\n      timezone: Mars\n      parameters: {count: 0}\n", ("prefect.yaml:13: deployments[sell].schedules[0].anchor_date: missing: an interval needs one, because without it each deploy moves the ticks", "prefect.yaml:13: deployments[sell].schedules[0].slug: missing: by its slug a schedule keeps its pause when it is changed; write for example `slug: daily`", "prefect.yaml:14: deployments[sell].schedules[0].interval: '1h': not a duration; use seconds (3600) or ISO 8601 (PT1H, P1D)", "prefect.yaml:15: deployments[sell].schedules[0].timezone: unknown timezone 'Mars'; an example is Europe/Paris", "prefect.yaml:16: deployments[sell].schedules[0].parameters.count: input should be greater than or equal to 1, not 0")),
    Row("several mistakes of a cron", '      cron: "15 3 * * *"\n      timezone: Europe/Paris\n', "      cron: 99 99 * * *\n      timezone: 5\n      anchor_date: soon\n      replaces: nightly\n", ("prefect.yaml:15: deployments[sell].schedules[0].cron: '99 99 * * *': minute '99' is not accepted: 0 to 59; hour '99' is not accepted: 0 to 23", "prefect.yaml:16: deployments[sell].schedules[0].timezone: input should be a valid string, not 5", "prefect.yaml:17: deployments[sell].schedules[0].anchor_date: 'soon' is not a time; write it in ISO 8601: 2026-01-01T00:00:00+00:00", "prefect.yaml:18: deployments[sell].schedules[0].replaces: schedule 'nightly' still exists")),
    Row("several mistakes of an rrule", '      cron: "15 3 * * *"\n      timezone: Europe/Paris\n', "      rrule: FREQ=DAILY;INTERVAL=0;BYHOUR=77\n      timezone: '{{ $SHOP_NAME }}'\n", ("prefect.yaml:15: deployments[sell].schedules[0].rrule: 'FREQ=DAILY;INTERVAL=0;BYHOUR=77': INTERVAL '0' is not accepted: 1 to 1000000; BYHOUR '77' is not accepted: 0 to 23", "prefect.yaml:16: deployments[sell].schedules[0].timezone: a schedule cannot contain {{ }}: its reviewers must see the value")),
    Row("no kind of schedule", '      cron: "15 3 * * *"\n', "", ("prefect.yaml:13: deployments[sell].schedules[0].cron: exactly one of cron, interval and rrule is needed, not none",)),
    Row("misspelt kind of schedule", '      cron: "15 3 * * *"\n', "      corn: '15 3 * * *'\n", ("prefect.yaml:15: deployments[sell].schedules[0].corn: unknown key; did you mean cron?",)),
    Row("misspelt other kind of schedule", '      cron: "15 3 * * *"\n', "      intervall: 60\n", ("prefect.yaml:15: deployments[sell].schedules[0].intervall: unknown key; did you mean interval?",)),
    Row("interval that is not a duration", '      cron: "15 3 * * *"\n', "      interval: 1h\n      anchor_date: '2026-01-01T00:00:00+00:00'\n", ("prefect.yaml:15: deployments[sell].schedules[0].interval: '1h': not a duration; use seconds (3600) or ISO 8601 (PT1H, P1D)",)),
    Row("interval below a second", '      cron: "15 3 * * *"\n', "      interval: 0.1\n      anchor_date: '2026-01-01T00:00:00+00:00'\n", ("prefect.yaml:15: deployments[sell].schedules[0].interval: 0.1: the shortest interval is one second",)),
    Row("date without quotes", '      cron: "15 3 * * *"\n', "      interval: 60\n      anchor_date: 2026-01-01\n", ("prefect.yaml:16: deployments[sell].schedules[0].anchor_date: must be a text, which YAML reads as a date without quotes: '2026-01-01'",)),
    Row("anchor that is not a time", '      cron: "15 3 * * *"\n', "      interval: 60\n      anchor_date: soon\n", ("prefect.yaml:16: deployments[sell].schedules[0].anchor_date: 'soon' is not a time; write it in ISO 8601: 2026-01-01T00:00:00+00:00",)),
    Row("rrule", '      cron: "15 3 * * *"\n', "      rrule: FREQ=OFTEN\n", ('prefect.yaml:15: deployments[sell].schedules[0].rrule: \'FREQ=OFTEN\': invalid RRule string "FREQ=OFTEN": invalid \'FREQ\': OFTEN',)),
    Row("rrule without a rule", '      cron: "15 3 * * *"\n', "      rrule: BYDAY=MO\n", ("prefect.yaml:15: deployments[sell].schedules[0].rrule: 'BYDAY=MO': FREQ is missing; an example is FREQ=DAILY;BYHOUR=7",)),
    Row("rrule that looks for its next tick without end", '      cron: "15 3 * * *"\n', "      rrule: FREQ=DAILY;INTERVAL=0\n", ("prefect.yaml:15: deployments[sell].schedules[0].rrule: 'FREQ=DAILY;INTERVAL=0': INTERVAL '0' is not accepted: 1 to 1000000",)),
    Row("rrule of a day that never is", '      cron: "15 3 * * *"\n', "      rrule: FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30\n", ("prefect.yaml:15: deployments[sell].schedules[0].rrule: 'FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30': it never fires: BYMONTHDAY is a day that no month of BYMONTH has",)),
    Row("rrule that has ended", '      cron: "15 3 * * *"\n', '      rrule: "DTSTART:20200101T000000\\nRRULE:FREQ=DAILY;COUNT=3"\n', ("prefect.yaml:15: deployments[sell].schedules[0].rrule: 'DTSTART:20200101T000000\\nRRULE:FREQ=DAILY;COUNT=3': it never fires",)),
    Row("rrule by the minute without a start", '      cron: "15 3 * * *"\n', "      rrule: FREQ=MINUTELY;INTERVAL=10\n", ('prefect.yaml:15: deployments[sell].schedules[0].rrule: \'FREQ=MINUTELY;INTERVAL=10\': no DTSTART, so that each deploy would move the ticks; write "DTSTART:20260101T000000\\nRRULE:FREQ=MINUTELY;INTERVAL=10"',)),
    Row("placeholder in a schedule", '      cron: "15 3 * * *"\n', '      cron: "{{ $SHOP_NAME }}"\n', ("prefect.yaml:15: deployments[sell].schedules[0].cron: a schedule cannot contain {{ }}: its reviewers must see the value",)),
    Row("unknown step in a placeholder", "{{ pin-image.image }}", "{{ pin-imgae.image }}", ("prefect.yaml:29: deployments[sell].work_pool.job_variables.image: {{ pin-imgae.image }}: unknown step 'pin-imgae'; did you mean pin-image?",)),
    Row("unknown step in a text", 'version: "{{ commit.stdout }}"', 'version: "v-{{ comit.stdout }}"', ("prefect.yaml:21: deployments[sell].version: {{ comit.stdout }}: unknown step 'comit'; did you mean commit?",)),
    Row("unknown output of a step", "{{ commit.stdout }}", "{{ commit.stdot }}", ("prefect.yaml:21: deployments[sell].version: {{ commit.stdot }}: step 'commit' has no output 'stdot'; did you mean stdout?",)),
    Row("unknown environment variable", "{{ commit.stdout }}", "{{ $SHOP_NAM }}", ("prefect.yaml:21: deployments[sell].version: unknown environment variable SHOP_NAM; did you mean SHOP_NAME?",)),
    Row("unknown setting in a placeholder", "{{ commit.stdout }}", "{{ $TIDEPOOL_REPO_URL }}", ("prefect.yaml:21: deployments[sell].version: unknown setting TIDEPOOL_REPO_URL; did you mean TIDEPOOL_REPOSITORY_URL?",)),
    Row("filter in a placeholder", "{{ commit.stdout }}", "{{ $SHOP_NAME | default('y') }}", ("prefect.yaml:21: deployments[sell].version: {{ $SHOP_NAME | default('y') }} is not a name, so Prefect leaves it as text: filters and expressions are not possible",)),
    Row("expression in a parameter", "    parameters: {count: 2}\n", '    parameters: {shop: "{{ commit.stdout[:7] }}"}\n', ("prefect.yaml:25: deployments[sell].parameters.shop: {{ commit.stdout[:7] }} is not a name, so Prefect leaves it as text: filters and expressions are not possible",)),
    Row("placeholder of a later step", "script: git describe", 'script: "echo {{ pin-image.image }}"', ("prefect.yaml:6: build[1].prefect.deployments.steps.run_shell_script.script: {{ pin-image.image }}: step 'pin-image' runs later",)),
    Row("tag that may vanish", "tags: [managed-by:tidepool]\n    schedules", 'tags: [managed-by:tidepool, "{{ $SHOP_SUFFIX }}"]\n    schedules', ("prefect.yaml:22: deployments[sell].tags[1]: $SHOP_SUFFIX may be empty, and the tag would be dropped; write text before it",)),
    Row("placeholder in a schedule's parameters", '      cron: "15 3 * * *"\n', '      cron: "15 3 * * *"\n      parameters: {shop: "{{ comit.stdout }}"}\n', ("prefect.yaml:16: deployments[sell].schedules[0].parameters.shop: {{ comit.stdout }}: unknown step 'comit'; did you mean commit?",)),
    Row("unknown step function", "prefect.deployments.steps.run_shell_script", "prefect.deployments.steps.run_shel_script", ("prefect.yaml:4: build[1].prefect.deployments.steps.run_shel_script: unknown step prefect.deployments.steps.run_shel_script; did you mean run_shell_script?",)),
    Row("step of an unknown module", "rule_steps.add", "rule_step.add", ("prefect.yaml:9: push[1].rule_step.add: cannot import step rule_step.add: ModuleNotFoundError: No module named 'rule_step'",)),
    Row("step that is not a function", "rule_steps.add", "rule_steps.no_step", ("prefect.yaml:9: push[1].rule_steps.no_step: unknown step rule_steps.no_step; rule_steps has no such function",)),
    Row("unknown input of a step", "script: git describe", "scrpt: git describe", ("prefect.yaml:6: build[1].prefect.deployments.steps.run_shell_script.scrpt: unknown input of this step; did you mean script?",)),
    Row("step without inputs", "validate: {}", "validate:", ("prefect.yaml:3: build[0].tidepool.deploy.steps.validate: inputs must be a mapping; write {} for none",)),
    Row("two steps in one", "validate: {}", "validate: {}\n    rule_steps.undeclared: {}", ("prefect.yaml:3: build[0].tidepool.deploy.steps.validate: a step is one key with its inputs below it, not also rule_steps.undeclared",)),
    Row("flow that is not there", "rule_flows.sell", "rule_flows.sel", ("prefect.yaml:20: deployments[sell].entrypoint: cannot import flow rule_flows.sel: rule_flows has no sel; did you mean sell?",)),
    Row("entrypoint of a file", "rule_flows.sell", "./shop/rule_flows.py:sell", ("prefect.yaml:20: deployments[sell].entrypoint: './shop/rule_flows.py:sell' is a file that does not exist; name the function by its module, with dots, as Dask workers import it: shop.rule_flows.sell",)),
    Row("name of a limit", "automations:\n", "concurrency_limits: [{name: tidepool-Down_loads, limit: 2}]\nautomations:\n", ("automations.yaml:5: concurrency_limits[tidepool-Down_loads].name: 'tidepool-Down_loads' must be lower-case words joined by hyphens",), file="automations.yaml"),
    Row("key at the top that belongs into a deployment", "name: shop\n", "variables: {a: b}\nname: shop\n", ("prefect.yaml:1: variables: unknown key; known: build, definitions, deployments, name, prefect-version, pull, push",)),
    Row("entrypoint of a file outside of the repository", "rule_flows.sell", "lib/python3.11/shop.py:sell", ("prefect.yaml:20: deployments[sell].entrypoint: 'lib/python3.11/shop.py:sell' is a file that does not exist; name the function by its module, with dots, as Dask workers import it: flows.<domain>.flow.<function>",)),
    Row("entrypoint of a file hides nothing", PREFECT[PREFECT.index("    entrypoint: rule_flows.sell") : PREFECT.index("count: 2")], PREFECT[PREFECT.index("    entrypoint: rule_flows.sell") : PREFECT.index("count: 2")].replace("rule_flows.sell", "rule_flows.py:sell") + "cuont: 1, ", ("prefect.yaml:20: deployments[sell].entrypoint: 'rule_flows.py:sell' is a file; name the function by its module, with dots, as Dask workers import it: rule_flows.sell", "prefect.yaml:25: deployments[sell].parameters.cuont: the flow has no such parameter; did you mean count?")),
    Row("entrypoint that is one word", "rule_flows.sell", "sell", ("prefect.yaml:20: deployments[sell].entrypoint: 'sell' is not a module's function; name the function by its module, with dots, as Dask workers import it: flows.<domain>.flow.<function>",)),
    Row("entrypoint without a module", "rule_flows.sell", '":sell"', ("prefect.yaml:20: deployments[sell].entrypoint: ':sell' has a colon; name the function by its module, with dots, as Dask workers import it: flows.<domain>.flow.<function>",)),
    Row("entrypoint of a file with a mistake", "rule_flows.sell", "rule_flows.py:sel", ("prefect.yaml:20: deployments[sell].entrypoint: 'rule_flows.py:sel' is a file; name the function by its module, with dots, as Dask workers import it: rule_flows.sel, which cannot be imported: rule_flows has no sel; did you mean sell?",)),
    Row("entrypoint with a colon", "rule_flows.sell", "rule_flows:sell", ("prefect.yaml:20: deployments[sell].entrypoint: 'rule_flows:sell' has a colon; name the function by its module, with dots, as Dask workers import it: rule_flows.sell",)),
    Row("parameter of another type", "count: 2", "count: many", ("prefect.yaml:25: deployments[sell].parameters.count: input should be a valid integer, unable to parse string as an integer, not 'many'",)),
    Row("parameter that the flow would convert and the server does not", "count: 2", "count: '2'", ("prefect.yaml:25: deployments[sell].parameters.count: '2' is not of type 'integer'; the server converts nothing",)),
    Row("yes as a text", "count: 2", "open: 'yes'", ("prefect.yaml:25: deployments[sell].parameters.open: 'yes' is not of type 'boolean'; the server converts nothing",)),
    Row("parameter that a step fills with a text", "count: 2", 'count: "{{ commit.stdout }}"', ("prefect.yaml:25: deployments[sell].parameters.count: '{{ commit.stdout }}' is not of type 'integer'; the server converts nothing",)),
    Row("values of a set twice", "count: 2", "kinds: [a, a]", ("prefect.yaml:25: deployments[sell].parameters.kinds: ['a', 'a'] has non-unique elements",)),
    Row("not a number", "count: 2", "rate: .nan", ("prefect.yaml:25: deployments[sell].parameters.rate: nan is not a value of JSON",)),
    Row("parameter of a class", "count: 2", "frame: {a: 1}", ("prefect.yaml:25: deployments[sell].parameters.frame: input should be an instance of Frame",)),
    Row("item of another type", "    entrypoint: rule_flows.deliver\n", "    entrypoint: rule_flows.pack\n    parameters: {box: 1, items: [1, two]}\n", ("prefect.yaml:35: deployments[deliver].parameters.items[1]: input should be a valid integer, unable to parse string as an integer, not 'two'",)),
    Row("one item that is not a list", "    entrypoint: rule_flows.deliver\n", "    entrypoint: rule_flows.pack\n    parameters: {box: 1, items: 2}\n", ("prefect.yaml:35: deployments[deliver].parameters.items: input should be a valid list, not 2",)),
    Row("label of another type", "    entrypoint: rule_flows.deliver\n", "    entrypoint: rule_flows.pack\n    parameters: {box: 1, labels: {to: [1]}}\n", ("prefect.yaml:35: deployments[deliver].parameters.labels.to: input should be a valid string, not [1]",)),
    Row("parameter among the others", "    entrypoint: rule_flows.deliver\n", "    entrypoint: rule_flows.pack\n    parameters: {box: 1, labels: {box: a}}\n", ("prefect.yaml:35: deployments[deliver].parameters.labels.box: is a parameter of its own: write it beside `labels`",)),
    Row("parameter outside of the others", "    entrypoint: rule_flows.deliver\n", "    entrypoint: rule_flows.pack\n    parameters: {box: 1, colour: red}\n", ("prefect.yaml:35: deployments[deliver].parameters.colour: the flow has no such parameter; write it as a key of `labels`",)),
    Row("unknown parameter", "count: 2", "cuont: 2", ("prefect.yaml:25: deployments[sell].parameters.cuont: the flow has no such parameter; did you mean count?",)),
    Row("name of a parameter that is a number", "count: 2", "1: 2", ("prefect.yaml:25: deployments[sell].parameters[1]: input should be a valid string, not 1",)),
    Row("item of a parameter", "    parameters: {count: 2}\n", "    parameters:\n      sizes:\n        - 1\n        - big\n", ("prefect.yaml:28: deployments[sell].parameters.sizes[1]: input should be a valid integer, unable to parse string as an integer, not 'big'",)),
    Row("parameter of a schedule", '      cron: "15 3 * * *"\n', '      cron: "15 3 * * *"\n      parameters: {count: 0}\n', ("prefect.yaml:16: deployments[sell].schedules[0].parameters.count: input should be greater than or equal to 1, not 0",)),
    Row("required parameter of a scheduled flow", "    entrypoint: rule_flows.deliver\n", "    entrypoint: rule_flows.deliver\n    schedules: [*nightly]\n", ("prefect.yaml:35: deployments[deliver].schedules[0].parameters: missing address, which the flow requires: each scheduled run would fail",)),
    Row("job variable of another type", "deadline_seconds: 900", "deadline_seconds: soon", ("prefect.yaml:30: deployments[sell].work_pool.job_variables.deadline_seconds: 'soon' is not of type 'integer'",)),
    Row("unknown job variable", "deadline_seconds: 900", "dealine_seconds: 900", ("prefect.yaml:30: deployments[sell].work_pool.job_variables.dealine_seconds: work pool kubernetes has no such job variable; did you mean deadline_seconds?",)),
    Row("job variable that a step fills with a text", "deadline_seconds: 900", 'deadline_seconds: "{{ commit.stdout }}"', ("prefect.yaml:30: deployments[sell].work_pool.job_variables.deadline_seconds: '{{ commit.stdout }}' is not of type 'integer'",)),
    Row("misspelt work pool", "name: kubernetes\n      job", "name: kubernets\n      job", ("prefect.yaml:27: deployments[sell].work_pool.name: unknown work pool 'kubernets'; did you mean kubernetes?",)),
    Row("policy that is not one", "deadline_seconds: 900", "on_crash: retry", ("prefect.yaml:30: deployments[sell].work_pool.job_variables.on_crash: 'retry' is not one of ['none', 'retry 1']",)),
    Row("maximum runtime beyond the deadline", "deadline_seconds: 900", "deadline_seconds: 900\n        max_runtime_seconds: 900", ("prefect.yaml:31: deployments[sell].work_pool.job_variables.max_runtime_seconds: 900 is not below deadline_seconds (900), which would end the run first",)),
    Row("start timeout beyond the deadline", "deadline_seconds: 900", "deadline_seconds: 900\n        start_timeout_seconds: 1200", ("prefect.yaml:31: deployments[sell].work_pool.job_variables.start_timeout_seconds: 1200 is not below deadline_seconds (900), which would end the run first",)),
    Row("maximum runtime of a run that is rescheduled", "deadline_seconds: 900", "max_runtime_seconds: 600\n        on_termination: reschedule", ("prefect.yaml:30: deployments[sell].work_pool.job_variables.max_runtime_seconds: a run that it ends would be executed again, because of on_termination: reschedule; use deadline_seconds, or on_termination: relinquish",)),
    Row("outage policy without a schedule", 'job_variables: {image: "{{ pin-image.image }}"}', 'job_variables: {image: "{{ pin-image.image }}", after_outage: latest}', ("prefect.yaml:36: deployments[deliver].work_pool.job_variables.after_outage: it chooses among scheduled runs, and the deployment has no schedules",)),
    Row("early cluster of a flow without one", "deadline_seconds: 900", "early_cluster: small", ('prefect.yaml:30: deployments[sell].work_pool.job_variables.early_cluster: sell does not begin with a small cluster of its own, so it would be started for nothing; give the flow task_runner=dask_runner("small", start_early=True), or leave this out',)),
    Row("no image", '        image: "{{ pin-image.image }}"\n', "", ('prefect.yaml:28: deployments[sell].work_pool.job_variables.image: missing: runs would use the work pool\'s default image; write `image: "{{ pin-image.image }}"`',)),
    Row("no image and no job variables", '    work_pool: {name: kubernetes, job_variables: {image: "{{ pin-image.image }}"}}\n', "    work_pool: {name: kubernetes}\n", ('prefect.yaml:36: deployments[deliver].work_pool.job_variables.image: missing: runs would use the work pool\'s default image; write `image: "{{ pin-image.image }}"`',)),
    Row("secret by name", "GREETING: hello", "SHOP_PASSWORD: hunter2", ("prefect.yaml:31: deployments[sell].work_pool.job_variables.env.SHOP_PASSWORD: looks like a secret in plain text, which would be stored in the deployment's record; move it to the Kubernetes Secret of the flow runs",)),
    Row("secret by value", "GREETING: hello", 'DATABASE: "postgresql://shop:hunter2@db/shop"', ("prefect.yaml:31: deployments[sell].work_pool.job_variables.env.DATABASE: looks like a secret in plain text, which would be stored in the deployment's record; move it to the Kubernetes Secret of the flow runs",)),
    Row("access key by value", "GREETING: hello", "ACCOUNT: AKIAABCDEFGHIJKLMNOP", ("prefect.yaml:31: deployments[sell].work_pool.job_variables.env.ACCOUNT: looks like a secret in plain text, which would be stored in the deployment's record; move it to the Kubernetes Secret of the flow runs",)),
    Row("secret in a parameter", "count: 2", "shop: ghp_0123456789012345678901234567890123", ("prefect.yaml:25: deployments[sell].parameters.shop: looks like a secret in plain text, which would be stored in the deployment's record",)),
    Row("secret inside of a parameter", "    entrypoint: rule_flows.deliver\n", "    entrypoint: rule_flows.pack\n    parameters: {box: 1, items: [], labels: {to: ghp_0123456789012345678901234567890123}}\n", ("prefect.yaml:35: deployments[deliver].parameters.labels.to: looks like a secret in plain text, which would be stored in the deployment's record",)),
    Row("secret of a block", "GREETING: hello", 'API: "{{ prefect.blocks.secret.shop }}"', ("prefect.yaml:31: deployments[sell].work_pool.job_variables.env.API: Prefect would store the secret's value in the deployment's record; move it to the Kubernetes Secret of the flow runs",)),
    Row("misspelt setting", "GREETING: hello", 'TIDEPOOL_STORAGE_ROT: "s3://b"', ("prefect.yaml:31: deployments[sell].work_pool.job_variables.env: unknown setting TIDEPOOL_STORAGE_ROT; did you mean TIDEPOOL_STORAGE_ROOT?",)),
    Row("parameters above the server's limit", "count: 2", "shop: " + "x" * 600_000, ("prefect.yaml:25: deployments[sell].parameters: the server refuses it: flow run parameters must be less than 524,288 bytes when serialized (got 600,011 bytes).",)),
    Row("no owner", "tags: [managed-by:tidepool]\n    schedules", "tags: [tier:1]\n    schedules", ("prefect.yaml:22: deployments[sell].tags: missing tag managed-by:tidepool, which marks the deployment as managed",)),
    Row("no owner at an anchor", PREFECT[PREFECT.index("definitions:") :], PREFECT[PREFECT.index("definitions:") :].replace("definitions:\n", "definitions:\n  tags: &tags\n    - tier:1\n").replace("tags: [managed-by:tidepool]", "tags: *tags"), ("prefect.yaml:12: deployments[deliver].tags: missing tag managed-by:tidepool, which marks the deployment as managed (also in deployments[sell])",)),
    Row("no owner at a merged anchor", PREFECT[PREFECT.index("definitions:") :], PREFECT[PREFECT.index("definitions:") :].replace("definitions:\n", "definitions:\n  base: &base\n    paused: true\n").replace("tags: [managed-by:tidepool]", "<<: *base"), ("prefect.yaml:12: deployments[deliver].tags: missing tag managed-by:tidepool, which marks the deployment as managed (also in deployments[sell])",)),
    Row("value of an alias", PREFECT[PREFECT.index("definitions:") :], PREFECT[PREFECT.index("definitions:") :].replace("definitions:\n", "definitions:\n  at: &at '99 3 * * *'\n").replace('cron: "15 3 * * *"', "cron: *at"), ("prefect.yaml:12: deployments[sell].schedules[0].cron: '99 3 * * *': minute '99' is not accepted: 0 to 59",)),
    Row("work pool that the server lacks", "", "", ("prefect.yaml:27: deployments[sell].work_pool.name: the server has no work pool 'kubernetes'; known: none (also in deployments[deliver] at line 36)",), server=checks.Server({"kubernetes": None})),
    Row("unknown Prefect variable", "{{ commit.stdout }}", "{{ prefect.variables.shop_ownr }}", ("prefect.yaml:21: deployments[sell].version: {{ prefect.variables.shop_ownr }}: unknown Prefect variable 'shop_ownr'; did you mean shop_owner?",), server=checks.Server(variables=frozenset({"other"}))),
    Row("block that the server lacks", "{{ commit.stdout }}", "{{ prefect.blocks.json.shop }}", ("prefect.yaml:21: deployments[sell].version: {{ prefect.blocks.json.shop }}: the server has no such block",), server=checks.Server(blocks=frozenset())),
    Row("environment variable without a value for a deploy", "{{ commit.stdout }}", "{{ $SHOP_NAME }}", ("prefect.yaml:21: deployments[sell].version: environment variable SHOP_NAME is not set: set it, or list it in `may_be_empty` of [tool.tidepool] in pyproject.toml if that is right",), deploying=True),
    Row("missing input of a step", "      script: git describe\n", "      stream_output: false\n", ("prefect.yaml:4: build[1].prefect.deployments.steps.run_shell_script: missing input 'script', which the step requires",)),
    Row("invalid prefect.yaml", "pull: []\n", "pull: ]\n", ("prefect.yaml:10: invalid YAML: no value where one is expected",)),
    Row("unknown key of an overlay", "every_deployment:", "every_deploymnt:", ("environments/staging.yaml:1: every_deploymnt: unknown key; did you mean every_deployment?",), file="environments/staging.yaml", environment="staging"),
    Row("unknown deployment in an overlay", "  deliver:\n", "  delivr:\n", ("environments/staging.yaml:4: deployments.delivr: unknown deployment 'delivr'; did you mean deliver?",), file="environments/staging.yaml", environment="staging"),
    Row("overlay of a file without deployments", PREFECT[PREFECT.index("deployments:") :], "", ("prefect.yaml:1: deployments: missing",), environment="staging"),
    Row("schedules in an overlay", "    paused: true\n", "    schedules: []\n", ("environments/staging.yaml:5: deployments.deliver.schedules: schedules are written in prefect.yaml only; `paused` switches them off",), file="environments/staging.yaml", environment="staging"),
    Row("image in an overlay", "every_deployment:", "image: a/b\nevery_deployment:", ("environments/staging.yaml:1: image: only null is possible: the environment runs without an image",), file="environments/staging.yaml", environment="staging"),
    Row("overlay that is a list", "", "- a\n", ("environments/staging.yaml:1: the file: it must be a mapping, not list",), file="environments/staging.yaml", environment="staging"),
    Row("list of deployments in an overlay", "deployments:\n  deliver:\n    paused: true\n", "deployments: [deliver]\n", ("environments/staging.yaml:3: deployments: must be a mapping, not list",), file="environments/staging.yaml", environment="staging"),
    Row("patch that is not a mapping", "    paused: true\n", "    - paused\n", ("environments/staging.yaml:4: deployments.deliver: must be a mapping, not list",), file="environments/staging.yaml", environment="staging"),
    Row("unknown key by an overlay", "    paused: true\n", "    pausd: true\n", ("environments/staging.yaml:5: deployments[deliver].pausd: unknown key; did you mean paused?",), file="environments/staging.yaml", environment="staging"),
    Row("value by an overlay", "deadline_seconds: 600", "deadline_seconds: 1", ("environments/staging.yaml:2: deployments[deliver].work_pool.job_variables.deadline_seconds: 1 is less than the minimum of 60 (also in deployments[sell])",), file="environments/staging.yaml", environment="staging"),
    Row("duplicate key of an overlay", "    paused: true\n", "    paused: true\n    paused: true\n", ("environments/staging.yaml:6: deployments.deliver.paused: duplicate key (first at line 5)",), file="environments/staging.yaml", environment="staging"),
    Row("unknown environment", "", "", ("environments/stagin.yaml:1: unknown environment 'stagin'; did you mean staging?",), file="environments/staging.yaml", environment="stagin"),
    Row("invalid overlay", "    paused: true\n", "    paused: ]\n", ("environments/staging.yaml:5: invalid YAML: no value where one is expected",), file="environments/staging.yaml", environment="staging"),
    Row("unknown key of an automation", "    trigger:\n", "    triger:\n", ("automations.yaml:8: automations[run-failed].triger: unknown key; did you mean trigger?",), file="automations.yaml"),
    Row("unknown key of an automation hides no other", AUTOMATIONS, AUTOMATIONS.replace("name: shop_owner", "nam: shop_owner").replace("automations:\n", "  - {name: big, value: 2026-01-01}\nautomations:\n").replace("template.json", "templat.json").replace("subject: failed", "subjct: failed"), ("automations.yaml:4: variables[0].nam: unknown key; did you mean name?", "automations.yaml:5: variables[big].value: it has a value that is not one of JSON, such as a date without quotes", "automations.yaml:17: automations[run-failed].actions[0].subjct: unknown key; did you mean subject?", "templat.json:1: template of work pool kubernetes: No such file or directory"), file="automations.yaml"),
    Row("unknown key of a trigger", "threshold: 1", "treshold: 1", ("automations.yaml:13: automations[run-failed].trigger.treshold: unknown key; did you mean threshold?",), file="automations.yaml"),
    Row("unknown key of an action", "subject: failed", "subjct: failed", ("automations.yaml:16: automations[run-failed].actions[0].subjct: unknown key; did you mean subject?",), file="automations.yaml"),
    Row("trigger that Prefect refuses", "posture: Reactive", "posture: Sometimes", ("automations.yaml:10: automations[run-failed].trigger.posture: input should be Posture.Reactive or Posture.Proactive",), file="automations.yaml"),
    Row("automation without a runbook", "name: run-failed", "name: run-fail", ("automations.yaml:6: automations[run-fail].name: the runbook docs/runbooks/run-fail.md does not exist",), file="automations.yaml"),
    Row("automation of an unknown deployment", "{type: notify, subject: failed, body: look}", "{type: run-deployment, deployment: sell/nope}", ("automations.yaml:15: automations[run-failed].actions: unknown deployment 'sell/nope'; known: deliver/deliver, sell/sell",), file="automations.yaml"),
    Row("template that is not there", "template.json", "templat.json", ("templat.json:1: template of work pool kubernetes: No such file or directory",), file="automations.yaml"),
    Row("template that is not an object", "", "[]", ("template.json:1: template of work pool kubernetes: it must be a JSON object",), file="template.json"),
    Row("template whose variables are not a schema", '{"image": {"type": "string"}', '{"image": {"type": "strin"}', ("template.json:1: template of work pool kubernetes: variables.properties.image.type is not a JSON schema: 'strin' is not valid under any of the given schemas",), file="template.json"),
    Row("automation of a deployment that is a list", "{type: notify, subject: failed, body: look}", "{type: run-deployment, deployment: [sell]}", ("automations.yaml:15: automations[run-failed].actions: unknown deployment \"['sell']\"; known: deliver/deliver, sell/sell",), file="automations.yaml"),
    Row("template that the server refuses", '"job_configuration": {"image": "{{ image }}"}', '"job_configuration": {"image": "{{ imgae }}"}', ("automations.yaml:2: work_pools[kubernetes].base_job_template: the server refuses it: the variables specified in the job configuration template must be present as properties in the variables schema. Your job configuration uses the following undeclared variable(s): imgae.",), file="template.json"),
    Row("variable that the server refuses", "value: ann", "value: " + "x" * 6_000, ("automations.yaml:4: variables[shop_owner].value: the server refuses it: variable value must be less than 5000 characters",), file="automations.yaml"),
    Row("limit beyond the server's integers", "automations:\n", "concurrency_limits: [{name: tidepool-a, limit: 99999999999}]\nautomations:\n", ("automations.yaml:5: concurrency_limits[tidepool-a].limit: input should be less than or equal to 2147483647, not 99999999999",), file="automations.yaml"),
    Row("limit below zero", "automations:\n", "concurrency_limits: [{name: tidepool-a, limit: -1}]\nautomations:\n", ("automations.yaml:5: concurrency_limits[tidepool-a].limit: input should be greater than or equal to 0, not -1",), file="automations.yaml"),
    Row("variable without a form in JSON", "value: ann", "value: 2026-01-01", ("automations.yaml:4: variables[shop_owner].value: it has a value that is not one of JSON, such as a date without quotes",), file="automations.yaml"),
    Row("limit without the owner's name", "automations:\n", "concurrency_limits: [{name: downloads, limit: 2}]\nautomations:\n", ("automations.yaml:5: concurrency_limits[downloads].name: the name must start with tidepool-, which marks it as managed: a limit has no tags",), file="automations.yaml"),
    Row("two resources of one name", "variables:\n", "variables:\n  - {name: shop_owner, value: bob}\n", ("automations.yaml:5: variables[shop_owner]: duplicate name",), file="automations.yaml"),
    Row("invalid automations", "work_pools:\n", "work_pools: ]\n", ("automations.yaml:1: invalid YAML: no value where one is expected",), file="automations.yaml"),
    Row("unknown house rule", "variables =", "variable =", ("pyproject.toml:3: tool.tidepool.variable: unknown key; did you mean variables?",), file="pyproject.toml"),
    Row("house rule of another type", '["SHOP_NAME"]', '"SHOP_NAME"', ("pyproject.toml:3: tool.tidepool.variables: input should be a valid list, not 'SHOP_NAME'",), file="pyproject.toml"),
    Row("house rules that are not a table", PYPROJECT, "[tool]\ntidepool = 3\n", ("pyproject.toml:1: tidepool: must be a table, not 3",), file="pyproject.toml"),
    Row("pyproject.toml that cannot be read", "[tool.tidepool]", "[tool.tidepool", ("pyproject.toml:1: cannot be read: Expected ']' at the end of a table declaration (at line 1, column 15)",), file="pyproject.toml"),
    Row("missing runbook", "docs/runbooks/deliver.md", "docs/runbooks/delivery.md", ("prefect.yaml:33: deployments[deliver].description: the runbook docs/runbooks/delivery.md does not exist",)),
    Row("no runbook", " docs/runbooks/deliver.md", "", ("prefect.yaml:33: deployments[deliver].description: no link to a runbook, such as docs/runbooks/deliver.md",)),
    Row("required key", "variables =", 'required = ["version"]\nvariables =', ("prefect.yaml:32: deployments[deliver].version: missing: `required` of [tool.tidepool] in pyproject.toml asks for it",), file="pyproject.toml"),
    Row("tags", "variables =", 'tags = ["owner"]\nvariables =', ("prefect.yaml:22: deployments[sell].tags: needs exactly one tag owner:…, not 0 (also in deployments[deliver] at line 35)",), file="pyproject.toml"),
    Row("row of the tags", "variables =", 'tags = ["managed-by"]\ntag_row = true\nvariables =', ("prefect.yaml:19: deployments[sell].description: no row '| tidepool |' of a table, as the tags have it (also in deployments[deliver] at line 33)",), file="pyproject.toml"),
    Row("headings of a runbook", "variables =", 'runbook_headings = ["Meaning", "Repair"]\nvariables =', ("docs/runbooks/deliver.md:1: missing heading `## Repair`", "docs/runbooks/sell.md:1: missing heading `## Repair`"), file="pyproject.toml"),
    Row("order of headings", "variables =", 'runbook_headings = ["Impact", "Meaning"]\nvariables =', ("docs/runbooks/deliver.md:1: the order of headings is Impact, Meaning", "docs/runbooks/sell.md:1: the order of headings is Impact, Meaning"), file="pyproject.toml"),
    Row("descriptions in the form", "", FORMS, ("rule_flows.py:10: parameter count of sell: the form in the UI shows the description below `Args:` and not that of Field; remove the latter", "rule_flows.py:10: parameter day of sell: the form in the UI shows no description; it does not show that of Field: write it in the docstring, below `Args:`", "rule_flows.py:23: parameter address of deliver: the form in the UI shows no description: write it in the docstring, below `Args:`"), file="rule_flows.py", house_rule="parameter_descriptions = true"),
    Row("late imports", "variables =", 'late_imports = ["pydantic"]\nvariables =', ("rule_flows.py:7: each run of the flow would begin with the import of pydantic: import it in the function that uses it",), file="pyproject.toml"),
    Row("schema that is not enforced", "    parameters: {count: 2}\n", "    parameters: {count: 2}\n    enforce_parameter_schema: false\n", ("prefect.yaml:26: deployments[sell].enforce_parameter_schema: must not be false: the server would accept runs that fail at once",), house_rule="enforce_parameter_schema = true"),
    Row("image by a tag", '        image: "{{ pin-image.image }}"\n', "        image: a/b:c\n", ("prefect.yaml:29: deployments[sell].work_pool.job_variables.image: 'a/b:c' is not pinned by digest: use name@sha256:… or the output of tidepool.deploy.steps.pin_image",), house_rule="image_by_digest = true"),
    Row("image of a step that does not pin it", "{{ pin-image.image }}", "{{ commit.stdout }}", ("prefect.yaml:29: deployments[sell].work_pool.job_variables.image: '{{ commit.stdout }}' is not pinned by digest: use name@sha256:… or the output of tidepool.deploy.steps.pin_image",), house_rule="image_by_digest = true"),
]  # fmt: skip


def broken(folder: Path, row: Row) -> list[str]:
    """Return the problems of the files that a row breaks."""
    write(folder, row.file if row.old or row.new else "", row.old, row.new)
    if row.house_rule:
        (folder / "pyproject.toml").write_text(f"{PYPROJECT}{row.house_rule}\n")
    return problems(folder, row.environment, server=row.server, deploying=row.deploying)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("environment", ["production", "staging"])
def test_good_files_have_no_problem(tmp_path: Path, environment: str) -> None:
    assert problems(write(tmp_path), environment) == []


def test_parameters_of_a_variadic_flow_are_accepted(tmp_path: Path) -> None:
    parameters = "    parameters: {box: 1, items: [1, 2], labels: {to: Ann}}\n"
    entrypoint = "    entrypoint: rule_flows.deliver\n"
    assert problems(write(tmp_path, "prefect.yaml", entrypoint, "    entrypoint: rule_flows.pack\n" + parameters)) == []


def test_a_job_variable_that_each_run_must_have_may_be_missing_in_a_deployment(tmp_path: Path) -> None:
    """The server accepts the deployment: who starts a run gives it."""
    properties = '"properties": {"image"'
    required = f'"required": ["region"], {properties.replace("image", "region")}: {{"type": "string"}}, "image"'
    assert problems(write(tmp_path, "template.json", properties, required)) == []


def test_after_a_step_that_does_not_declare_its_outputs_any_name_may_be_one(tmp_path: Path) -> None:
    text = PREFECT.replace("commit.stdout", "colour")
    [problem] = problems(write(tmp_path, "prefect.yaml", "", text))
    assert "{{ colour }}: unknown step 'colour'" in problem
    assert (
        problems(write(tmp_path, "prefect.yaml", "", text.replace("push:\n", "push:\n  - rule_steps.undeclared: {}\n")))
        == []
    )


NULLS = """
    description:
    version:
    tags: [managed-by:tidepool]
    schedule: {}
    flow_name:
    triggers:
    active:
    concurrency_limit:
    parameters:
    schedules:
"""


def test_keys_without_a_value_are_those_of_prefects_own_files(tmp_path: Path) -> None:
    text = PREFECT.replace("description: Delivers. docs/runbooks/deliver.md", "enforce_parameter_schema: true")
    text = text.replace("    tags: [managed-by:tidepool]\n    work_pool", f"{NULLS}    work_pool")
    write(tmp_path, "prefect.yaml", "", text.replace("definitions:\n  schedules", "definitions:\n  x:\n  schedules"))
    (tmp_path / "pyproject.toml").write_text(PYPROJECT.replace("runbooks = true\n", ""))
    assert problems(tmp_path) == []


BY_MODULE = "name the function by its module, with dots, as Dask workers import it"


@pytest.mark.parametrize(
    ("entrypoint", "sentence"),
    [
        (
            "prefect/shop_flows.py:sell",
            f"'prefect/shop_flows.py:sell' is a file; {BY_MODULE}: prefect.shop_flows.sell",
        ),
        (
            "prefect.shop_flows.sell",
            "its module cannot be imported: ModuleNotFoundError: No module named 'prefect.shop_flows'",
        ),
    ],
)
def test_a_folder_with_the_name_of_a_package_is_named(tmp_path: Path, entrypoint: str, sentence: str) -> None:
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "shop_flows.py").write_text(FLOWS)
    advice = "the folder needs another name"
    assert problems(write(tmp_path, "prefect.yaml", "rule_flows.sell", entrypoint)) == [
        f"prefect.yaml:20: deployments[sell].entrypoint: {sentence}; another package is called prefect: {advice}"
    ]


@pytest.mark.parametrize("key", ["catchup: false", "max_active_runs: null", "active: null"])
def test_what_prefect_writes_by_itself_is_accepted(tmp_path: Path, key: str) -> None:
    text = PREFECT.replace("      slug: nightly\n", f"      slug: nightly\n      {key}\n", 1)
    assert problems(write(tmp_path, "prefect.yaml", "", text)) == []


def test_a_flow_that_asks_a_server_when_it_is_imported_starts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "")
    repository = write(tmp_path, "prefect.yaml", "rule_flows.sell", "asking_flows.sell")
    asking = "from prefect.blocks.system import Secret\nKEY = Secret.load('mail').get()\n"
    (tmp_path / "asking_flows.py").write_text(f"{asking}{FLOWS}")
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        [found] = problems(repository)
    assert "its module cannot be imported: ValueError: No Prefect API URL provided" in found
    assert "(asking_flows.py:2)" in found


def test_names_are_the_authors(tmp_path: Path) -> None:
    """What Prefect accepts is accepted: without a timezone a schedule is in UTC."""
    text = PREFECT.replace("name: sell\n", "name: 01 Sell_It\n").replace("slug: nightly", "slug: Every_Night")
    assert problems(write(tmp_path, "prefect.yaml", "", text.replace("      timezone: Europe/Paris\n", ""))) == []


def test_pull_steps_of_each_deployment_are_enough(tmp_path: Path) -> None:
    text = PREFECT.replace("pull: []\n", "").replace("    entrypoint:", "    pull: []\n    entrypoint:")
    assert problems(write(tmp_path, "prefect.yaml", "", text)) == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.rule)
def test_a_mistake_is_one_problem_with_its_line(tmp_path: Path, row: Row) -> None:
    assert traced(tmp_path, row)[0] == list(row.messages)


MODULES = (automations, checks, deployments, environments, form, house_rules, models, schedules, scope)
# These return a problem's message; elsewhere a text is not one.
MESSAGES = {
    "_problem",
    "_missing",
    "_expression",
    "_variable",
    "_output",
    "_message",
    "_unknown_key",
}
# These raise one; elsewhere an error is not about the files.
RAISING = (deployments, models, schedules, scope)


def sites() -> Iterator[tuple[str, int]]:
    """Yield file and line of each statement that reports a problem."""
    for module in MODULES:
        path = str(module.__file__)
        for function in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(function, ast.FunctionDef):
                reports = (
                    node for node in ast.walk(function) if _reports(node, function.name, raising=module in RAISING)
                )
                yield from ((path, node.lineno) for node in reports)


def _reports(node: ast.AST, function: str, *, raising: bool) -> bool:
    match node:
        case ast.Yield(value=ast.Tuple() | ast.Call()):
            return True
        case ast.Raise(exc=ast.Call(func=ast.Name(id="ValueError" | "UsageError"))):
            return raising
        case ast.Return(value=ast.Constant(value="")):
            return False
        case ast.Return(value=ast.Tuple() | ast.JoinedStr() | ast.Constant(value=str())):
            return function in MESSAGES
        case ast.Call(func=ast.Attribute(value=ast.Name(id="found"), attr="append")):
            return True
    return False


_FILES = {str(module.__file__) for module in MODULES}
_TRACED: dict[str, tuple[list[str], set[tuple[str, int]]]] = {}


def traced(folder: Path, row: Row) -> tuple[list[str], set[tuple[str, int]]]:
    """Return the problems of a row, and the lines of the checks that it executes; once for each row."""
    executed: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _argument: object) -> object:
        if frame.f_code.co_filename not in _FILES:
            return None
        if event == "line":
            executed.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    if row.rule not in _TRACED:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            _TRACED[row.rule] = broken(folder, row), executed
        finally:
            sys.settrace(before)
    return _TRACED[row.rule]


def test_every_rule_has_a_row(tmp_path: Path) -> None:
    """Each statement of the checks that reports a problem is executed by a row."""
    executed = set().union(*(traced(tmp_path / str(index), row)[1] for index, row in enumerate(ROWS)))
    missing = [f"{Path(path).name}:{line}" for path, line in sites() if (path, line) not in executed]
    assert not missing, f"rules without a row: {missing}"
