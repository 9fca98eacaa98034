"""The form of each deployed flow in the Prefect UI: its text says what the types of the parameters say."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import annotated_types
import pytest
import yaml
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from tidepool import report
from tidepool.deploy.config import flows

TOP = Path(__file__).parents[2]
BYTES = "ByteSize"


def deployed() -> list[tuple[Any, str]]:
    """Each parameter of each flow."""
    entries = [each["entrypoint"] for each in yaml.safe_load((TOP / "prefect.yaml").read_text())["deployments"]]
    found = [getattr(import_module(module), name) for module, _, name in (each.rpartition(".") for each in entries)]
    return [(flow, name) for flow in found for name in flow.parameters.properties]


def parameter(case: tuple[Any, str]) -> tuple[dict[str, Any], FieldInfo, Any]:
    """What the form has of a parameter, what its `Field` says, and its annotation."""
    flow, name = case
    annotation = flows.annotation(flow.fn, name)
    return flow.parameters.properties[name], FieldInfo.from_annotation(annotation), annotation


def bounds(field: FieldInfo, annotation: object) -> str:
    """Bounds in the words of the form: `1 to 1,000`, `from 0`."""
    least = next((each.ge for each in field.metadata if isinstance(each, annotated_types.Ge)), None)
    most = next((each.le for each in field.metadata if isinstance(each, annotated_types.Le)), None)
    exclusive = [each for each in field.metadata if isinstance(each, annotated_types.Gt | annotated_types.Lt)]
    assert exclusive == [], "this test has no words for gt and lt"
    of_bytes = BYTES in str(annotation)
    shown = [
        None if each is None else report.size(int(each)).replace(".0", "") if of_bytes else f"{each:,}"
        for each in (least, most)
    ]
    if None not in shown:
        return " to ".join(map(str, shown))
    return f"from {shown[0]}" if shown[0] else f"to {shown[1]}" if shown[1] else ""


CASES = deployed()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def test_the_form_says_what_the_parameter_accepts(case: tuple[Any, str]) -> None:
    shown, field, annotation = parameter(case)
    text = " ".join(shown["description"].split())
    assert bounds(field, annotation) in text
    if "default" in shown and shown["default"] is None:
        assert "Empty: " in text, "what an empty field means"
    for placeholder in re.findall(r"\{\w+\}", str(shown.get("default"))):
        assert f"{placeholder} is " in text
    if case[1] in {"source", "data_url"}:
        assert re.search(r"a path(, [a-z ]+)?, or a file, s3 or http\(s\) URL", text)
    if case[1] in {"destination", "data_file"}:
        assert "file or s3 URL" in text, "what can be written to"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def test_the_server_checks_what_the_flow_checks(case: tuple[Any, str]) -> None:
    """The schema that a deployment is registered with has the types and bounds of the annotation."""
    shown, _, annotation = parameter(case)
    own = TypeAdapter(annotation).json_schema()
    of_the_form = {"title", "position", "description", "default"}
    assert {key: value for key, value in shown.items() if key not in of_the_form} == own


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def test_no_text_may_be_empty(case: tuple[Any, str]) -> None:
    shown = parameter(case)[0]
    for each in shown.get("anyOf", [shown]):
        if each.get("type") == "string" and "enum" not in each:
            assert each.get("minLength") or each.get("pattern")


def test_every_kind_of_bound_is_among_them() -> None:
    words = [bounds(*parameter(case)[1:]) for case in CASES]
    assert {"1 to 52", "from 0", "64 KiB to 1 GiB", "0 to 1", "1 to 1,000,000"} <= set(words)
