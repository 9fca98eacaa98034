"""Placeholders of the prefect file (`{{ $VARIABLE }}`, `{{ step.output }}`), and secrets that should be references."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from pydantic_core import to_jsonable_python

if TYPE_CHECKING:
    from collections.abc import Mapping

_RUN_TIME = "ctx."  # filled in by the worker when a run starts: part of the value

_SECRET_NAME = re.compile(
    r"(PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL|AUTH_STRING)", re.IGNORECASE
)
_NAME_OF_A_REFERENCE = re.compile(r"(_NAME|_FILE|_PATH|_ID|_REF|_ENABLED|_SECONDS)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|hooks\.slack\.com/services/\w|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|://[^/\s:@]+:[^/\s@{]+@|pnu_[A-Za-z0-9]{20,}"
)


def find(value: Any) -> set[str]:
    """Return the names in `{{ … }}` that a deploy has to fill in."""
    from prefect.utilities.templating import find_placeholders

    # As JSON: Prefect's functions accept no dates, which YAML makes of whatever looks like one.
    found = find_placeholders(to_jsonable_python(value))
    return {each.name for each in found if not each.name.startswith(_RUN_TIME)}


def fill_from_environment(deployment: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deployment with its `{{ $VARIABLE }}`s filled in, as Prefect does it; unset ones stay."""
    from prefect.utilities.templating import apply_values

    return cast("dict[str, Any]", apply_values(to_jsonable_python(dict(deployment)), {}, remove_notset=False))


def is_secret(value: object, variable: str = "") -> bool:
    """Return whether a value is a credential in plain text: by its form (a token, a URL with a password) or variable.

    A variable with the name of a credential may be empty or hold a reference (`{{ … }}`).
    """
    if not isinstance(value, str):
        return False
    named = _SECRET_NAME.search(variable) is not None and _NAME_OF_A_REFERENCE.search(variable) is None
    return _SECRET_VALUE.search(value) is not None or (named and value != "" and not find(value))
