"""Flows that the deployments name: importing them, and checking their parameters."""

from __future__ import annotations

import inspect
import sys
import traceback
import types
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from tidepool.deploy.config import imports
from tidepool.deploy.config.yaml_source import place_in
from tidepool.errors import UsageError, did_you_mean, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from prefect import Flow

    from tidepool.deploy.config.imports import Stamp
    from tidepool.deploy.config.yaml_lines import Finding


class NotImportedError(UsageError):
    """A flow whose module cannot be imported.

    Attributes:
        reason: The module's error with its line, which is the same for each flow of the module.
    """

    def __init__(self, entrypoint: str, reason: str) -> None:
        super().__init__(f"cannot import flow {entrypoint}: {reason}")
        self.reason = reason


# What the import of a module raised, as long as the files that it executed stay as they are.
_FAILED: dict[tuple[Path, str], tuple[str, Stamp]] = {}


def load(repository: Path, entrypoint: str) -> Flow[..., Any]:
    """Import a flow by module and function (`flows.csv_etl.flow.csv_etl`), as a process does that imports no other.

    A module is executed once, also if it fails.

    Raises:
        NotImportedError: its module cannot be imported.
        UsageError: it is not a flow.
    """
    module = entrypoint.rpartition(".")[0]
    key = repository, module
    reason, files = _FAILED.pop(key, ("", {}))
    if reason and files == imports.stamp(files):
        _FAILED[key] = reason, files
        raise NotImportedError(entrypoint, reason)
    with _no_server(), imports.as_in_its_own_process(repository, module):
        return _load(repository, entrypoint)


@contextmanager
def _no_server() -> Iterator[None]:
    """Start no server, with a database, for a module that asks the server for a block at its top."""
    from prefect.settings import PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

    # Settings are read from files of the current folder, too: before another one is it.
    with temporary_settings({PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}):
        yield


def _load(repository: Path, entrypoint: str) -> Flow[..., Any]:
    """Import a flow into this process."""
    from prefect.exceptions import MissingFlowError
    from prefect.flows import load_flow_from_entrypoint

    try:
        return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except MissingFlowError as error:
        if entrypoint.rpartition(".")[0] not in sys.modules:  # Prefect takes any AttributeError for a missing flow
            raise _failure(repository, entrypoint, error.__cause__ or error) from error
        raise UsageError(f"cannot import flow {entrypoint}: {_missing(entrypoint)}") from error
    except (Exception, SystemExit, GeneratorExit) as error:  # the module's code may raise anything
        raise _failure(repository, entrypoint, error) from error


def _failure(repository: Path, entrypoint: str, error: BaseException) -> NotImportedError:
    """Return the error of a flow whose module raised one, which is remembered."""
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    frames = _frames(repository, error)
    reason = f"{type(error).__name__}: {text}{_raised_in(repository, error, frames)}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = entrypoint.split(".", maxsplit=1)[0]
        statement, file = (frames[-1].line or "", frames[-1].filename) if frames else ("", "")
        advice = shadowed(repository, top) if error.name.split(".")[0] == top else ""
        reason += advice or imports.elsewhere(repository, error.name, statement, file)
    # Without a line of the repository, nothing of it was executed, and what is missing may be there later.
    if files := {each.filename for each in frames}:
        _FAILED[repository, entrypoint.rpartition(".")[0]] = reason, imports.stamp(files)
    return NotImportedError(entrypoint, reason)


def find(repository: Path, entrypoint: str) -> tuple[Flow[..., Any] | None, str]:
    """Return the flow that an entrypoint means, None if that is unclear, and what is wrong with the entrypoint.

    A flow that is named by a file is one of a module too. It is loaded from there, so that one mistake hides no other.
    """
    if _names_a_module(entrypoint):
        try:
            return load(repository, entrypoint), ""
        except UsageError as error:
            reason = error.reason if isinstance(error, NotImportedError) else ""
            return None, f"its module cannot be imported: {reason}" if reason else str(error)
    path, colon, function = entrypoint.replace("\\", "/").partition(":")
    is_path = "/" in path or path.endswith(".py")
    module = by_module(repository, entrypoint)
    file = _file(repository, entrypoint)
    kind = "is not a module's function" if not (colon or is_path) else "is a file" if is_path else "has a colon"
    kind += " that does not exist" if path.endswith(".py") and not (repository / path).is_file() else ""
    problem = f"{entrypoint!r} {kind}; name the function by its module, with dots, as Dask workers import it"
    if (
        not path
        or not function
        or path.startswith(("/", ".."))
        or (is_path and "." in path.removesuffix(".py").removeprefix("./"))
    ):
        return None, f"{problem}: flows.<domain>.flow.<function>"
    problem = f"{problem}: {module}"
    advice = shadowed(repository, module.partition(".")[0])
    if advice or not file.is_file():
        return None, f"{problem}{advice}"
    try:
        flow = load(repository, module)
    except UsageError as error:
        return None, f"{problem}, which cannot be imported: {str(error).partition(': ')[2]}"
    loaded = getattr(sys.modules.get(module.rpartition(".")[0]), "__file__", None)
    return (flow if loaded and Path(loaded).resolve() == file.resolve() else None), problem


def _names_a_module(entrypoint: str) -> bool:
    """Return True if an entrypoint has the form of a module's function: words with dots between them."""
    return not (set(":/\\") & set(entrypoint) or entrypoint.endswith(".py") or entrypoint.startswith(".")) and (
        "." in entrypoint
    )


def by_module(repository: Path, entrypoint: str) -> str:
    """Return an entrypoint that names a file or has a colon as one that names a module: `flows/shop.py:sell`.

    Of a project that is installed from its folder `src`, the module begins below it.
    """
    path, function = _parts(entrypoint)
    module = path.replace("/", ".")
    if in_source_folder(repository, module):
        installed = module.removeprefix("src.")
        with suppress(Exception):  # its package may raise anything
            spec = find_spec(installed)
            if spec and spec.origin and Path(spec.origin).resolve() == _file(repository, entrypoint).resolve():
                module = installed
    return f"{module}.{function}"


def in_source_folder(repository: Path, module: str) -> bool:
    """Return True if a module begins with the folder `src` of a project, which is not a package itself."""
    return module.startswith("src.") and not (repository / "src" / "__init__.py").exists()


def _file(repository: Path, entrypoint: str) -> Path:
    return repository / f"{_parts(entrypoint)[0].replace('.', '/')}.py"


def _parts(entrypoint: str) -> tuple[str, str]:
    """Return the path or module of an entrypoint, without `.py`, and its function."""
    path, _, function = entrypoint.replace("\\", "/").partition(":")
    return path.removesuffix(".py").removeprefix("./"), function


def flow_of(repository: Path, entrypoint: str) -> Flow[..., Any]:
    """Return the flow of an entrypoint, to be run in this process: what its import changes there stays.

    Raises:
        UsageError: the entrypoint is not a module's function, or cannot be imported.
    """
    imports.importable(repository)
    with _no_server():
        if _names_a_module(entrypoint):
            return _load(repository, entrypoint)
    raise UsageError(find(repository, entrypoint)[1])


def shadowed(repository: Path, top: str) -> str:
    """Return the advice about a folder of the repository that has the name of another package; empty if it has not."""
    if not top or not (repository / top).is_dir():
        return ""
    spec = find_spec(top)
    places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    if not places or any(Path(str(each)).is_relative_to(repository) for each in places):
        return ""
    # One that is imported here is needed, too.
    advice = "the folder needs another name" + (
        "" if top in sys.modules else ", or an __init__.py if the other is not needed"
    )
    return f"; another package is called {top}: {advice}"


def _missing(entrypoint: str) -> str:
    """Return what an entrypoint means whose module has been imported and has no such flow."""
    from prefect import Flow

    module, _, name = entrypoint.rpartition(".")
    whole, holder = sys.modules.get(entrypoint), sys.modules[module]
    flows = sorted(each for each, value in vars(whole or holder).items() if isinstance(value, Flow))
    if whole:
        named = ", ".join(f"{entrypoint}.{each}" for each in flows) or "flows.<domain>.flow.<function>"
        return f"it is a module; name its function: {named}"
    problem = f"{name} is not decorated with @flow" if hasattr(holder, name) else f"{module} has no {name}"
    return f"{problem}{did_you_mean(name, flows)}"


def _raised_in(repository: Path, error: BaseException, frames: list[traceback.FrameSummary]) -> str:
    """Return the line of the repository that an error comes from, as an addition to its text."""
    if isinstance(error, SyntaxError):
        file = Path(error.filename or "")
        return f" ({file.relative_to(repository) if file.is_relative_to(repository) else file}:{error.lineno})"
    return f" ({Path(frames[-1].filename).relative_to(repository)}:{frames[-1].lineno})" if frames else ""


def _frames(repository: Path, error: BaseException) -> list[traceback.FrameSummary]:
    """Return the lines of the repository that an error went through, but for those of this module."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.lineno]
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(repository)]
    return [frame for frame in inside if Path(__file__) != Path(frame.filename)]


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
    """Return the type of a parameter; one without an annotation accepts any value.

    As in Prefect, `*args` is a parameter that is a list, `**kwargs` one that is a mapping.
    """
    accepted: Any = annotation(flow.fn, name)
    kind = getattr(inspect.signature(flow.fn).parameters.get(name), "kind", None)
    if kind is inspect.Parameter.VAR_POSITIONAL:
        accepted = types.GenericAlias(list, accepted)
    elif kind is inspect.Parameter.VAR_KEYWORD:
        mapping = types.GenericAlias(dict, (str, accepted))
        accepted = get_args(accepted)[0] if get_origin(accepted) is Unpack else mapping
    try:
        return TypeAdapter(accepted)
    except PydanticSchemaGenerationError:  # a class that pydantic does not know, such as a DataFrame
        return TypeAdapter(accepted, config=ConfigDict(arbitrary_types_allowed=True))


def parameter_problems(flow: Flow[..., Any], values: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with values of some parameters: unknown names, wrong types, out of bounds."""
    accepted = inspect.signature(flow.fn).parameters
    variadic = next((name for name, each in accepted.items() if each.kind is each.VAR_KEYWORD), "")
    named = [name for name, each in accepted.items() if each.kind in {each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY}]
    for name, value in values.items():
        if name not in accepted:
            advice = f"write it as a key of `{variadic}`" if variadic else ""
            yield (name,), f"the flow has no such parameter{did_you_mean(name, accepted, advice)}"
            continue
        try:
            parameter_type(flow, name).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            yield (name, *place_in(value, first["loc"])), reason(first)
        else:
            for key in set(value).intersection(named) if name == variadic else ():
                yield (name, key), f"is a parameter of its own: write it beside `{variadic}`"


def missing_parameters(flow: Flow[..., Any], given: Collection[str]) -> list[str]:
    """Return the required parameters that are not among the given ones."""
    return [
        name
        for name, parameter in inspect.signature(flow.fn).parameters.items()
        if name not in given
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
