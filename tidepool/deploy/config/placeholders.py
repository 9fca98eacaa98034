"""Placeholders of the prefect file (`{{ $VARIABLE }}`, `{{ step.output }}`), and secrets that should be references."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from pydantic_core import to_jsonable_python

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tidepool.deploy.config.yaml_lines import Place

RUN_TIME = "ctx."
"""Prefix of what the Prefect worker fills in when a run starts: it is a part of the value."""
VARIABLE = "prefect.variables."
BLOCK = "prefect.blocks."

_BRACES = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|SECRET|TOKEN|(API|AUTH|ACCESS|PRIVATE|SIGNING|ENCRYPTION)_?KEY|CREDENTIAL|AUTH_STRING|(PASS|PWD|_DSN)$",
    re.IGNORECASE,
)
_NAME_OF_A_REFERENCE = re.compile(r"(_NAME|_FILE|_PATH|_ID|_REF|_ENABLED|_SECONDS|_HOST|_PORT|_REGION)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|hooks\.slack\.com/services/\w|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|://[^/\s:@]+:[^/\s@{]+@|pnu_[A-Za-z0-9]{20,}"
)


def find(value: Any) -> set[str]:
    """Return the names in `{{ … }}` that a deploy has to fill in."""
    from prefect.utilities.templating import find_placeholders

    # As JSON: Prefect's functions accept no dates, which YAML makes of whatever looks like one.
    found = find_placeholders(to_jsonable_python(value))
    return {each.name for each in found if not each.name.startswith(RUN_TIME)}


def texts(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yield each text inside a value with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from texts(item, (*place, index))


def in_braces(text: str) -> list[str]:
    """Return what a text has between `{{` and `}}`: names, and what Prefect does not take for one."""
    return [inside.strip() for inside in _BRACES.findall(text)]


def is_whole(text: str) -> bool:
    """Return True if a text is one placeholder of a step, variable or block, which may become a value of any type."""
    names = in_braces(text)
    return len(names) == 1 and not names[0].startswith("$") and _BRACES.fullmatch(text) is not None


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
