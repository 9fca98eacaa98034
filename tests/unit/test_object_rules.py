"""The rules for the objects of flow runs: what tidepool makes keeps them, and every attempt at more breaks one."""

from __future__ import annotations

import pytest

from tests.flow_run_objects import LEGITIMATE, PARAMETERS, attempts
from tidepool.operate.object_rules import RULES, rule_of, violations

ATTEMPTS = attempts()


@pytest.mark.parametrize("kind", LEGITIMATE)
def test_what_a_run_consists_of_is_allowed(kind: str) -> None:
    assert violations(LEGITIMATE[kind], PARAMETERS) == []


def test_every_rule_has_an_object_that_keeps_it() -> None:
    assert {rule_of(each) for each in LEGITIMATE.values()} == RULES.keys() - {"DaskJob"}


@pytest.mark.parametrize("title", ATTEMPTS)
def test_an_attempt_is_refused(title: str) -> None:
    kind, manifest = ATTEMPTS[title]
    assert violations(manifest, PARAMETERS), kind


def test_a_dask_job_is_refused_altogether() -> None:
    assert violations({"kind": "DaskJob", "metadata": {"name": "j"}}, PARAMETERS) == ["a DaskJob is not allowed"]
