"""The form of a flow in the Prefect UI: each parameter with a description.

Prefect takes it from the docstring's `Args:`. It ignores the description of a `Field` in `Annotated`: its own field for
the parameter, with or without a text, takes precedence.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.fields import FieldInfo

from tidepool.deploy.config import flows
from tidepool.deploy.config.yaml_source import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect import Flow

    from tidepool.deploy.config.house_rules import HouseRules


def check(rules: HouseRules, repository: Path, flow: Flow[..., Any]) -> Iterator[Problem]:
    """Yield the parameters that the form shows without a description, or with another than that of their `Field`."""
    code = inspect.unwrap(flow.fn).__code__
    path = Path(code.co_filename)
    if not rules.parameter_descriptions or not path.is_relative_to(repository):
        return
    file, line = str(path.relative_to(repository)), code.co_firstlineno
    for name, shown in flow.parameters.properties.items():
        text, own = shown.get("description"), FieldInfo.from_annotation(flows.annotation(flow.fn, name)).description
        if not text:
            lost = "; it does not show that of Field" if own else ""
            message = f"the form in the UI shows no description{lost}: write it in the docstring, below `Args:`"
            yield Problem(file, line, "", f"parameter {name} of {flow.name}: {message}")
        elif own and own != text:
            message = "the form in the UI shows the description below `Args:` and not that of Field; remove the latter"
            yield Problem(file, line, "", f"parameter {name} of {flow.name}: {message}")
