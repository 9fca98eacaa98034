"""Base job templates: the parts that each installation sets, which Git neither compares nor overwrites.

The chart writes them (helm/tidepool/templates/_work-pool.tpl): namespace, account, Secrets, image and API of flow runs.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_Path = tuple[str | int, ...]

_CONFIGURATION: _Path = ("job_configuration",)
_MANIFEST: _Path = (*_CONFIGURATION, "job_manifest")
_POD: _Path = (*_MANIFEST, "spec", "template", "spec")
_CONTAINER: _Path = (*_POD, "containers", 0)
INSTALLED: tuple[_Path, ...] = (
    ("variables", "properties", "image", "pattern"),
    (*_CONFIGURATION, "namespace"),
    (*_CONFIGURATION, "env", "PREFECT_API_URL"),
    (*_MANIFEST, "metadata", "namespace"),
    (*_POD, "serviceAccountName"),
    (*_POD, "imagePullSecrets"),
    (*_POD, "priorityClassName"),
    (*_CONTAINER, "imagePullPolicy"),
    (*_CONTAINER, "envFrom"),
)
"""Paths in a base job template that belong to the installation, besides the defaults of all variables."""


def comparable(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return a base job template without what belongs to the installation."""
    result = copy.deepcopy(dict(template))
    for path in _paths(result):
        parent = _at(result, path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)
    return result


def with_installed(template: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """Return a base job template with what belongs to the installation taken from the one on the server.

    Raises:
        UsageError: there, a job variable chooses the account or another part that belongs to the installation.
    """
    result = copy.deepcopy(dict(template))
    for path in _paths(result):
        parent, source = _at(result, path[:-1]), _at(there, path[:-1])
        if not isinstance(parent, dict) or not isinstance(source, dict):
            continue
        name = path[-1]
        if name not in source:
            if path in INSTALLED:
                parent.pop(name, None)
            continue
        if path in INSTALLED and "{{" in str(source[name]):
            message = f"the work pool on the server lets job variables choose {name}: upgrade the chart, then deploy"
            raise UsageError(message)
        parent[name] = copy.deepcopy(source[name])
    return result


def _paths(template: Mapping[str, Any]) -> Iterator[_Path]:
    yield from INSTALLED
    for name in _at(template, ("variables", "properties")) or {}:
        yield ("variables", "properties", name, "default")


def _at(template: Any, path: _Path) -> Any:
    """Return the part of a template at a path; None if there is none."""
    for key in path:
        try:
            template = template[key]
        except (KeyError, IndexError, TypeError):
            return None
    return template
