"""Placeholders of the prefect file: `{{ $VARIABLE }}` of the environment and `{{ step.output }}` of a step."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

_PLACEHOLDER = re.compile(r"{{\s*([\w.\-\[\]$]+)\s*}}")
_RUN_TIME = "ctx."  # filled in by the worker when a run starts: part of the value


def find(value: Any) -> set[str]:
    """Return the names in `{{ … }}` that a deploy has to fill in."""
    if isinstance(value, str):
        return {name for name in _PLACEHOLDER.findall(value) if not name.startswith(_RUN_TIME)}
    if isinstance(value, dict):
        return set().union(*(find(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(find(item) for item in value))
    return set()


def fill_from_environment(deployment: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deployment with its `{{ $VARIABLE }}`s filled in, as Prefect does it; unset ones stay."""
    from prefect.utilities.templating import apply_values
    from pydantic_core import to_jsonable_python

    # As JSON: Prefect's function accepts no dates, which YAML makes of whatever looks like one.
    return cast("dict[str, Any]", apply_values(to_jsonable_python(dict(deployment)), {}, remove_notset=False))
