"""`tidepool run`: one flow in this process, with parameters from prefect.yaml and the command line.

Standard output carries the result only; whatever the flow, Prefect or Dask print goes to standard error.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import typer
from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core import to_jsonable_python

from tidepool.deploy.config import environments, flows, placeholders
from tidepool.deploy.config.imports import stdout_to_stderr
from tidepool.deploy.config.yaml_source import path
from tidepool.errors import TidepoolError, UsageError
from tidepool.local.debugger import quit_ends_the_run
from tidepool.local.processes import signals_interrupt
from tidepool.local.server import Home, running_server
from tidepool.report import run_report
from tidepool.report.own_errors import log_as_sentences
from tidepool.settings import SIZES, set_prefect_variables, set_variables, settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from uuid import UUID

    from prefect import Flow
    from prefect.client.schemas.objects import State
    from pydantic import TypeAdapter


# With one thread, a debugger's prompt is that of the one item that runs.
_DEBUG = {"TIDEPOOL_COMPUTE_PROVIDER": "threads"} | {
    f"TIDEPOOL_{size.upper()}_{part}": "1" for size in SIZES for part in ("WORKERS", "THREADS")
}


def run(
    repository: Path,
    name: str,
    parameters: Sequence[str],
    environment: str,
    provider: str | None,
    *,
    as_json: bool,
    debug: bool = False,
) -> int:
    """Run a flow and print its outcome.

    The repository becomes the current folder, as it is for a worker.

    Args:
        repository: The folder that holds prefect.yaml.
        name: A deployment, or a flow by its module, `flows.csv_etl.flow.csv_etl`, which needs no deployment.
        parameters: `NAME=VALUE` texts, which override those of the deployment.
        environment: The environment of the deployment.
        provider: Where mapped tasks run; None for the setting.
        as_json: Print one JSON object.
        debug: Everything in this process, mapped tasks one after the other, without the flow's timeout.

    Returns:
        Exit code: 0 if the run is Completed, otherwise 1.

    Raises:
        UsageError: the name, a parameter or a setting is wrong; nothing was run.
    """
    deployment = _deployment(repository, name, environment)
    if debug and provider not in {None, "threads"}:
        raise UsageError(f"--debug runs everything in one process: omit --provider {provider}")
    if debug:
        set_variables(_DEBUG)
        quit_ends_the_run()
    elif provider is not None:
        set_variables({"TIDEPOOL_COMPUTE_PROVIDER": provider})
    settings()
    os.chdir(repository)
    with stdout_to_stderr():
        flow = flows.flow_of(repository, _entrypoint(name, deployment))
        if debug:
            flow.timeout_seconds = None  # it would go on at the debugger's prompt
        given = assignments(parameters)
        values = bind(flow, _base(name, deployment, given), given)
        with _api(repository):
            run_report.install()
            log_as_sentences()
            state, result = execute(flow, values)
            outcome = _outcome(flow.name, state, result)
    if as_json:
        typer.echo(json.dumps(outcome, allow_nan=False))
    else:
        typer.echo(f"{name}: {state.name} (flow run {outcome['flow_run_id']})")
        if outcome["result"] is not None:
            typer.echo(json.dumps(outcome["result"], indent=2, allow_nan=False))
        for url in outcome["outputs"]:
            typer.echo(f"output: {url}")
    if state.is_completed():
        return 0
    typer.echo(f"tidepool: {name} ended {state.name}: {_reason(state, result)}", err=True)
    return 1


def execute(flow: Flow[..., Any], values: dict[str, Any]) -> tuple[State[Any], Any]:
    """Run a flow function of any kind, as Prefect's engine does for a deployment.

    Args:
        flow: The flow; its function may be a coroutine, a generator or both.
        values: Its parameters, as a deployment has them: `*args` as a list, `**kwargs` as a mapping.

    Returns:
        The final state, and the result (of a generator a list of what it yields) or the exception.
    """
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow
    from prefect.utilities.callables import get_parameter_defaults

    values = {**get_parameter_defaults(flow.fn), **values}
    # Prefect's overloads know no flow of any parameters and any result.
    any_flow = cast("Any", flow)
    if not flow.isgenerator:
        state: Any = run_flow(any_flow, parameters=values, return_type="state")
        state = asyncio.run(state) if inspect.iscoroutine(state) else state
        return state, state.result(raise_on_failure=False)
    # The engine gives a generator's items, and its state to the server only.
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run(any_flow, parameters=values)
        try:
            result: Any = asyncio.run(_items(run_flow(any_flow, flow_run=flow_run, parameters=values)))
        except Exception as error:  # noqa: BLE001 - the flow's own, which is the outcome
            result = error
        return cast("State[Any]", client.read_flow_run(flow_run.id).state), result


async def _items(generator: Any) -> list[Any]:
    return [item async for item in generator] if inspect.isasyncgen(generator) else list(generator)


def _deployment(repository: Path, name: str, environment: str) -> Mapping[str, Any]:
    """Return the deployment of that name, or of a flow that is named by its module one without parameters."""
    manifest = environments.load(repository, environment)
    by_module = "." in name and all(part.isidentifier() for part in name.split("."))
    # With a colon it is a flow as Prefect names it, for which there is advice.
    if (by_module or ":" in name) and name not in environments.deployment_names(manifest):
        return {"entrypoint": name}
    return environments.deployment(manifest, name)


def _entrypoint(name: str, deployment: Mapping[str, Any]) -> str:
    entrypoint = deployment.get("entrypoint")
    if not isinstance(entrypoint, str):
        raise UsageError(f"deployments[{name}].entrypoint: must be a module's function, not {entrypoint!r}")
    return entrypoint


def _base(name: str, deployment: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """Return the parameters of a deployment that are not given on the command line, with environment variables.

    Raises:
        UsageError: they are not a mapping, or one needs a step, a server or a variable that is not set.
    """
    base = deployment.get("parameters") or {}
    if not isinstance(base, dict):
        raise UsageError(f"deployments[{name}].parameters: must be a mapping, not {base!r}")
    filled = placeholders.fill_from_environment({key: value for key, value in base.items() if key not in given})
    for key, value in filled.items():
        unfilled = [name for _, text in placeholders.texts(value) for name in placeholders.in_braces(text)]
        if names := [name for name in unfilled if name.startswith("$") or name in placeholders.find(value)]:
            raise UsageError(f"parameter {key}: {{{{ {names[0]} }}}} has no value here; pass it with -p {key}=…")
    return filled


def assignments(given: Sequence[str]) -> dict[str, str]:
    """Parse `name=value` pairs.

    Raises:
        UsageError: one has no `=`.
    """
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"invalid parameter {text!r}: use NAME=VALUE, for example -p increment=2")
        pairs[name] = value
    return pairs


def bind(flow: Flow[..., Any], base: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """Merge the parameters of a run and check them against the flow's types and bounds.

    Args:
        flow: The flow.
        base: Values from prefect.yaml.
        given: Texts from the command line; each is parsed by the flow's type, as text or as JSON.

    Raises:
        UsageError: a name is unknown, a value is invalid, or one is missing.
    """
    values = {**base, **{name: _parse(flows.parameter_type(flow, name), text) for name, text in given.items()}}
    for place, problem in flows.parameter_problems(flow, values):
        schema = flow.parameters.properties.get(str(place[0]))
        accepted = "" if schema is None else f" (accepted: {describe(schema)})"
        raise UsageError(f"{flow.name}: parameter {path(place)}: {problem}{accepted}")
    if missing := flows.missing_parameters(flow, values):
        raise UsageError(f"{flow.name}: missing parameter {', '.join(missing)}: pass it with -p {missing[0]}=…")
    return values


def _parse(adapter: TypeAdapter[Any], text: str) -> Any:
    """Return a text as the type accepts it: as `null`, then as text (`12`, `true`), then as JSON; else unchecked."""
    try:
        decoded = json.loads(text)
    except ValueError:
        decoded = text
    try:
        if adapter.json_schema() == {}:  # any type at all
            return decoded
    except PydanticInvalidForJsonSchema:  # a class that JSON does not have
        return decoded
    for value in (decoded, text) if decoded is None else (text, decoded):
        with suppress(ValidationError):
            return adapter.validate_python(value)
    return decoded


def describe(schema: Mapping[str, Any]) -> str:
    """Describe in words what a parameter accepts, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(describe(part) for part in schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    kind = str(schema.get("type", "any value"))
    if kind == "array":
        return f"a list, each {describe(schema.get('items') or {})}"
    bounds = [f"{words} {schema[key]:,}" for key, words in _BOUNDS.items() if key in schema]
    words = {"null": "null", "integer": "an integer", "number": "a number", "boolean": "true or false"}
    words |= {"string": "text", "object": "a JSON object"}
    return " ".join([words.get(kind, kind), *bounds])


_BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
    "minLength": "with a length from",
    "maxLength": "with a length to",
}


def _outcome(flow: str, state: State[Any], result: object) -> dict[str, Any]:
    """Return the outcome of the run, as `--json` prints it."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
    from prefect.client.schemas.sorting import ArtifactSort

    run_id = cast("UUID", state.state_details.flow_run_id)
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id])),
            sort=ArtifactSort.UPDATED_DESC,
        )
    outputs = next((each.data for each in found if each.key == f"{flow}-outputs"), None)
    return {
        "flow_run_id": str(run_id),
        "state": state.name,
        "result": _as_json(result) if state.is_completed() else None,
        "outputs": [row["url"] for row in json.loads(str(outputs or "[]"))],
        "artifacts": sorted({each.key for each in found if each.key}),
    }


def _as_json(result: object) -> Any:
    """Return a result as values of JSON: null for NaN and infinities, the name of its type if it has no such form.

    The run is Completed: whatever it returned, the outcome is printed.
    """
    try:
        return _finite(to_jsonable_python(result, bytes_mode="base64", fallback=str))
    except Exception:  # noqa: BLE001 - the classes of a result have methods of their own, which may raise anything
        return f"{type(result).__qualname__}, which has no form in JSON"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _reason(state: State[Any], result: object) -> str:
    """Give the reason in one sentence, which tidepool's own errors are already."""
    if isinstance(result, TidepoolError):
        return str(result)
    if isinstance(result, BaseException):
        return " ".join(f"{type(result).__name__}: {result}".split())
    return " ".join((state.message or "no reason recorded").split())


@contextmanager
def _api(repository: Path) -> Iterator[None]:
    """Provide a Prefect API for the run: the configured one, the demo's, or one that ends with the block.

    Raises:
        TidepoolError: the configured one does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.context import refresh_global_settings_context
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with ExitStack() as stack:
        if (configured := PREFECT_API_URL.value()) is not None:
            # Fail at once: Prefect's own retries (a minute) are for runs that are under way.
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
                problem = client.api_healthcheck()
            if problem is not None:
                raise TidepoolError(f"the Prefect API {configured} (PREFECT_API_URL) does not answer: {problem!r}")
        else:
            home = Home.of(repository)
            server = home.demo_server()
            if server is None:
                # It takes seconds; on standard output is the result only.
                typer.echo("starting a Prefect server for this run; `make demo` shows its history", err=True)
                stack.enter_context(signals_interrupt())
                server = stack.enter_context(running_server(home))
            # For Prefect, which is imported already, and the Dask workers to come.
            set_prefect_variables(server.variables)
            refresh_global_settings_context()
        yield
        # Send the logs and events that Prefect still buffers: the server may end, and the outcome is printed last.
        for service in (APILogWorker, EventsWorker):
            service.drain_all(timeout=10)
