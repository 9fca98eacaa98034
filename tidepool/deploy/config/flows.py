"""Flows that the deployments name: importing them, and checking their parameters."""

from __future__ import annotations

import inspect
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from tidepool.deploy.config.yaml_source import place_in
from tidepool.errors import UsageError, did_you_mean, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from prefect import Flow

    from tidepool.deploy.config.yaml_source import Finding


def load(repository: Path, entrypoint: str) -> Flow[..., Any]:
    """Import a flow by module and function (`flows.csv_etl.flow.csv_etl`).

    Raises:
        UsageError: it cannot be imported, or is not a flow.
    """
    from prefect.flows import load_flow_from_entrypoint

    importable(repository)
    try:
        return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except (Exception, SystemExit) as error:  # an import runs the module's code, which may raise anything
        text = " ".join(str(error).split())
        place = _raised_in(repository, error)
        raise UsageError(f"cannot import flow {entrypoint}: {type(error).__name__}: {text}{place}") from error


def importable(repository: Path) -> None:
    """Put the repository's folder on the path, as `prefect deploy` in it does."""
    if str(repository) not in sys.path:
        sys.path.insert(0, str(repository))


def _raised_in(repository: Path, error: BaseException) -> str:
    """Return the line of the repository that an error comes from, as an addition to its text."""
    if isinstance(error, SyntaxError):
        return ""  # its text has the line
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.lineno]
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(repository)]
    own = [frame for frame in inside if Path(__file__) != Path(frame.filename)]
    return f" ({Path(own[-1].filename).relative_to(repository)}:{own[-1].lineno})" if own else ""


def annotation(function: Callable[..., Any], name: str) -> Any:
    """Return the annotation of a parameter or of `return`: `Any` without one, or if it is for type checkers only."""
    plain = inspect.unwrap(function)
    given = getattr(plain, "__annotations__", {})
    if name not in given:
        return Any
    holder = type("Holder", (), {"__annotations__": {"value": given[name]}})
    try:
        return get_type_hints(holder, globalns=plain.__globals__, include_extras=True)["value"]
    except NameError:  # imported under TYPE_CHECKING
        return Any


def parameter_type(flow: Flow[..., Any], name: str) -> TypeAdapter[Any]:
    """Return the type of a parameter; one without an annotation accepts any value."""
    accepted = annotation(flow.fn, name)
    try:
        return TypeAdapter(accepted)
    except PydanticSchemaGenerationError:  # a class that pydantic does not know, such as a DataFrame
        return TypeAdapter(accepted, config=ConfigDict(arbitrary_types_allowed=True))


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
