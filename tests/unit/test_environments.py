"""Overlays: what an environment changes of prefect.yaml, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tidepool.deploy.config import environments
from tidepool.errors import UsageError

REPOSITORY = Path(__file__).parents[2]
DIGEST = "registry.example/team/app@sha256:" + "0a" * 32

MANIFEST: dict[str, Any] = {
    "name": "p",
    "definitions": {"pools": {}},
    "build": [
        {"prefect.deployments.steps.run_shell_script": {"id": "commit", "script": "git describe"}},
        {"prefect_docker.deployments.steps.build_docker_image": {"id": "build-image"}},
    ],
    "push": [{"tidepool.deploy.steps.pin_image": {"id": "pin-image"}}],
    "pull": [],
    "deployments": [
        {
            "name": "a",
            "schedules": [{"slug": "nightly", "cron": "0 3 * * *"}],
            "parameters": {"x": 1, "y": 2},
            "work_pool": {"name": "kubernetes", "job_variables": {"image": "{{ pin-image.image }}", "cpu": "1"}},
        },
        {"name": "b", "parameters": {}, "work_pool": {"name": "kubernetes", "job_variables": {"image": "i"}}},
    ],
}


@pytest.mark.parametrize(
    ("base", "patch", "expected"),
    [
        # The cases of RFC 7396, appendix A.
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_is_rfc_7396(base: object, patch: object, expected: object) -> None:
    assert environments.merge(base, patch) == expected


_yaml = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(_yaml, _yaml)
def test_a_second_merge_changes_nothing_and_arguments_stay(base: object, patch: object) -> None:
    before = copy.deepcopy((base, patch))
    once = environments.merge(base, patch)
    assert environments.merge(once, patch) == once
    assert (base, patch) == before


def test_an_overlay_changes_every_deployment_and_then_one() -> None:
    overlay = {
        "every_deployment": {"paused": True, "parameters": {"x": 7}},
        "deployments": {"a": {"parameters": {"x": 8, "y": None}}},
    }
    before = copy.deepcopy(MANIFEST)
    a, b = environments.render(MANIFEST, overlay)["deployments"]
    assert (a["paused"], b["paused"]) == (True, True)
    assert (a["parameters"], b["parameters"]) == ({"x": 8}, {"x": 7})
    assert a["schedules"] == [{"slug": "nightly", "cron": "0 3 * * *"}]
    assert before == MANIFEST


def test_an_environment_can_leave_a_deployment_out() -> None:
    rendered = environments.render(MANIFEST, {"every_deployment": {"paused": True}, "deployments": {"a": None}})
    assert environments.deployment_names(rendered) == ["b"]


def test_production_is_prefect_yaml_without_its_definitions() -> None:
    rendered = environments.render(MANIFEST, {})
    assert rendered == {key: value for key, value in MANIFEST.items() if key != "definitions"}


def test_without_an_image_nothing_is_built_and_the_version_still_comes_from_git() -> None:
    rendered = environments.render(MANIFEST, {"image": None})
    assert [step for entry in rendered["build"] for step in entry] == ["prefect.deployments.steps.run_shell_script"]
    assert rendered["push"] == []
    assert rendered["deployments"][0]["work_pool"]["job_variables"] == {"cpu": "1"}


def test_an_environment_runs_an_image_unless_its_overlay_has_none(tmp_path: Path) -> None:
    (tmp_path / "environments").mkdir()
    (tmp_path / "environments" / "local.yaml").write_text("image: null\n")
    (tmp_path / "environments" / "staging.yaml").write_text("every_deployment: {paused: true}\n")
    run = {name: environments.runs_an_image(tmp_path, name) for name in ("production", "staging", "local")}
    assert run == {"production": True, "staging": True, "local": False}


def test_overlays_that_cannot_be_read_are_not_none(tmp_path: Path) -> None:
    assert environments.names(tmp_path) == ["production"]
    (tmp_path / "environments").write_text("")
    with pytest.raises(UsageError, match=r"^the folder environments cannot be read: Not a directory$"):
        environments.names(tmp_path)


def test_a_given_image_takes_the_place_of_the_built_one() -> None:
    rendered = environments.render(MANIFEST, {}, DIGEST)
    assert {each["work_pool"]["job_variables"]["image"] for each in rendered["deployments"]} == {DIGEST}
    assert "build_docker_image" not in environments.to_yaml(rendered)


@pytest.mark.parametrize(
    ("overlay", "image", "message"),
    [
        ({"every_deploymnt": {}}, None, "^every_deploymnt: unknown key; did you mean every_deployment?$"),
        ({"deployments": {"aa": {}}}, None, "^deployments.aa: unknown deployment 'aa'; did you mean a?$"),
        (
            {"deployments": {"a": {"schedules": []}}},
            None,
            "^deployments.a.schedules: schedules are written in prefect.yaml",
        ),
        ({"every_deployment": {"schedules": []}}, None, "^every_deployment.schedules: schedules are written in"),
        ({"every_deployment": ["paused"]}, None, "^every_deployment: must be a mapping, not list$"),
        ({"deployments": "a"}, None, "^deployments: must be a mapping, not str$"),
        ({"deployments": {"a": 1}}, None, "^deployments.a: must be a mapping, not int$"),
        ({"x": 1, "y": 2}, None, "^x: unknown key.*; y: unknown key"),
        ({"image": None}, DIGEST, "this environment runs without an image: omit --image"),
        ({}, "app:latest", "image 'app:latest' is not pinned by digest: use name@sha256:"),
    ],
)
def test_a_wrong_overlay_or_image_is_one_sentence(overlay: dict[str, Any], image: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        environments.render(MANIFEST, overlay, image)


@pytest.mark.parametrize(
    ("content", "message"),
    [("x: 1\na: ]", r"^prefect\.yaml:2: invalid YAML: "), ("- a\n", r"^prefect\.yaml must be a mapping, not list$")],
)
def test_an_invalid_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "prefect.yaml").write_text(content)
    with pytest.raises(UsageError, match=message):
        environments.load(tmp_path, "production")


# --- this repository's own files ---------------------------------------------------------------------


def _raw() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
    return content


@pytest.mark.parametrize("environment", ["dev", "local", "staging", "production"])
def test_yaml_of_every_environment_reads_back_without_anchors(environment: str) -> None:
    rendered = environments.load(REPOSITORY, environment)
    text = environments.to_yaml(rendered)
    assert yaml.safe_load(text) == rendered
    assert "&" not in text


def test_the_registry_is_not_in_git() -> None:
    build, push = (
        next(step for entry in _raw()[phase] for name, step in entry.items() if name.startswith("prefect_docker."))
        for phase in ("build", "push")
    )
    assert build["image_name"] == "{{ $TIDEPOOL_IMAGE_NAME }}"
    assert push["image_name"] == "{{ build-image.image_name }}"
