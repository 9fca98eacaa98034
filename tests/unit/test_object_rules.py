"""The rules for the objects of flow runs: what tidepool makes keeps them, and every attempt at more breaks one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from tests.flow_run_objects import LEGITIMATE, PARAMETERS, attempts
from tidepool.operate.object_rules import RULES, rule_of, violations
from tidepool.operate.rules import Anything, Fields, Items, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def _longer(part: Any) -> Iterator[Any]:
    """Yield copies of a part of an object, each with one of its texts a megabyte long."""
    if isinstance(part, str):
        yield "a" * 1_000_000
    pairs = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, inner in pairs:
        for each in _longer(inner):
            changed = copy.copy(part)
            changed[key] = each
            yield changed


@pytest.mark.parametrize("kind", LEGITIMATE)
def test_no_text_of_an_object_may_have_a_megabyte(kind: str) -> None:
    """The operator holds all of them in memory. The API server itself bounds what is in `metadata`."""
    manifest = LEGITIMATE[kind]
    bounded = {key: each for key, each in manifest.items() if key not in {"kind", "metadata"}}
    found = list(_longer(bounded))
    assert found
    for changed in found:
        assert violations({**manifest, **changed}, PARAMETERS), changed.keys()


def _places(rule: Rule, path: str) -> Iterator[tuple[str, Rule]]:
    yield path, rule
    if isinstance(rule, Items):
        yield from _places(rule.rule, f"{path}[]")
    if isinstance(rule, Fields):
        for name, inner in rule.known.items():
            yield from _places(inner, f"{path}.{name}")


def test_nothing_but_a_status_and_metadata_is_without_bound() -> None:
    for kind, rule in RULES.items():
        for path, inner in _places(rule, kind):
            unbounded = isinstance(inner, Anything) or (isinstance(inner, Fields) and inner.open)
            assert not unbounded or path.endswith((".status", ".metadata")), path


def test_a_driver_may_have_a_script_as_its_command() -> None:
    job = copy.deepcopy(LEGITIMATE["Job"])
    job["spec"]["template"]["spec"]["containers"][0]["args"] = ["python", "-c", "a" * 60_000]
    assert violations(job, PARAMETERS) == []


def test_a_dask_job_is_refused_altogether() -> None:
    assert violations({"kind": "DaskJob", "metadata": {"name": "j"}}, PARAMETERS) == ["a DaskJob is not allowed"]
