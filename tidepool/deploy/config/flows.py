"""Flows that the deployments name: importing them, and checking their parameters."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tidepool.deploy.config.yaml_source import place_in
from tidepool.errors import UsageError, did_you_mean, reason

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from prefect import Flow

    from tidepool.deploy.config.yaml_source import Finding


def load(repository: Path, entrypoint: str) -> Flow[..., Any]:
    """Import a flow by module and function (`flows.csv_etl.flow.csv_etl`).

    The repository's folder is put on the path, as `prefect deploy` in it does.

    Raises:
        UsageError: it cannot be imported, or is not a flow.
    """
    from prefect.flows import load_flow_from_entrypoint

    if str(repository) not in sys.path:
        sys.path.insert(0, str(repository))
    try:
        return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except Exception as error:  # an import runs the module's code, which may raise anything
        text = " ".join(str(error).split())
        raise UsageError(f"cannot import flow {entrypoint}: {type(error).__name__}: {text}") from error


def parameter_type(flow: Flow[..., Any], name: str) -> TypeAdapter[Any]:
    """Return the type of a parameter; one without an annotation accepts any value."""
    return TypeAdapter(get_type_hints(flow.fn, include_extras=True).get(name, Any))


def parameter_problems(flow: Flow[..., Any], values: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with values of some parameters: unknown names, wrong types, out of bounds."""
    accepted = list(inspect.signature(flow.fn).parameters)
    for name, value in values.items():
        if name not in accepted:
            yield (name,), f"the flow has no such parameter{did_you_mean(name, accepted)}"
            continue
        try:
            parameter_type(flow, name).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            yield (name, *place_in(value, first["loc"])), reason(first)


def missing_parameters(flow: Flow[..., Any], given: Collection[str]) -> list[str]:
    """Return the required parameters that are not among the given ones."""
    return [
        name
        for name, parameter in inspect.signature(flow.fn).parameters.items()
        if name not in given
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
