"""`tidepool run`: one deployment's flow, here and now, with its parameters from prefect.yaml and the command line.

Standard output carries the result only; whatever the flow, Prefect or Dask print goes to standard error.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tidepool.deploy.config import environments
from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import set_prefect_variables, set_variables, settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from prefect import Flow
    from prefect.client.schemas.objects import State


@dataclass(frozen=True)
class Outcome:
    """What `--json` prints."""

    flow_run_id: str
    state: str
    result: Any
    outputs: list[str]
    artifacts: list[str]


def run(
    repository: Path,
    name: str,
    *,
    parameters: Sequence[str],
    environment: str,
    provider: str | None,
    as_json: bool,
) -> int:
    """Runs the flow and prints what became of it.

    Args:
        repository: The folder that holds prefect.yaml; it becomes the current one, as it is for a worker.
        name: The deployment.
        parameters: `name=value`, each in the place of the one in prefect.yaml.
        environment: Whose overlay is merged into prefect.yaml.
        provider: Where mapped tasks run, in the place of the setting.
        as_json: Print one JSON object.

    Returns:
        Exit code: 0 if the run is Completed, otherwise 1.

    Raises:
        UsageError: the deployment, a parameter or a setting is wrong; nothing was run.
    """
    manifest = environments.load(repository, environment)
    deployment = environments.deployment(manifest, name)
    if provider is not None:
        set_variables({"TIDEPOOL_COMPUTE_PROVIDER": provider})
    settings()
    os.chdir(repository)
    with _only_result_on_stdout():
        flow = _load(deployment, repository)
        values = bind(flow, deployment.get("parameters") or {}, assignments(parameters))
        with _api(repository):
            # Prefect's overloads know no flow of any parameters and any result.
            state = cast("State[Any]", cast("Any", flow)(**values, return_state=True))
            outcome, reason = _outcome(flow, state)
    if as_json:
        sys.stdout.write(json.dumps(asdict(outcome), default=str) + "\n")
    else:
        sys.stdout.write(_text(name, outcome))
    sys.stdout.flush()
    if reason is None:
        return 0
    sys.stderr.write(f"tidepool: {name} ended {outcome.state}: {reason}\n")
    return 1


def assignments(given: Sequence[str]) -> dict[str, str]:
    """Takes `name=value` apart.

    Raises:
        UsageError: one has no `=`.
    """
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"parameter {text!r}: give it as NAME=VALUE, for example -p increment=2")
        pairs[name] = value
    return pairs


def bind(flow: Flow[..., Any], base: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of a run, checked against the flow's types and bounds.

    Args:
        flow: The flow.
        base: Values as prefect.yaml has them.
        given: Texts from the command line; each becomes what the flow's type makes of it, as text or as JSON.

    Raises:
        UsageError: a name is unknown, a value is not accepted, or one is missing.
    """
    accepted = inspect.signature(flow.fn).parameters
    for name in (*given, *base):
        if name not in accepted:
            raise UsageError(f"{flow.name}: {environments.unknown('parameter', name, list(accepted))}")
    missing = [
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty and name not in {*base, *given}
    ]
    if missing:
        raise UsageError(f"{flow.name}: parameter {', '.join(missing)} is missing: give it with -p {missing[0]}=…")
    hints = get_type_hints(flow.fn, include_extras=True)
    values: dict[str, Any] = {}
    for name in accepted:
        if name not in base and name not in given:
            continue
        adapter: TypeAdapter[Any] = TypeAdapter(hints.get(name, Any))
        try:
            values[name] = _parse(adapter, given[name]) if name in given else adapter.validate_python(base[name])
        except ValidationError as error:
            shown = given[name] if name in given else json.dumps(base[name])
            raise UsageError(f"{flow.name}: {_rejected(name, shown, flow, error)}") from None
    return values


def _parse(adapter: TypeAdapter[Any], text: str) -> Any:
    """A text as the type takes it: `null` if it may be null, then as text (`12`, `true`), then as JSON."""
    try:
        decoded = json.loads(text)
    except ValueError:
        return adapter.validate_python(text)
    if adapter.json_schema() == {}:  # any type at all
        return decoded
    first, second = (decoded, text) if decoded is None else (text, decoded)
    try:
        return adapter.validate_python(first)
    except ValidationError:
        return adapter.validate_python(second)


def _rejected(name: str, shown: str, flow: Flow[..., Any], error: ValidationError) -> str:
    """One sentence: the parameter, its value, what is wrong and what is accepted."""
    problem = error.errors()[0]
    place = "".join(f"[{part}]" for part in problem["loc"] if isinstance(part, int))
    message = problem["msg"][0].lower() + problem["msg"][1:]
    schema = flow.parameters.properties.get(name, {})
    return f"parameter {name}{place} = {shown}: {message} (accepted: {describe(schema)})"


def describe(schema: Mapping[str, Any]) -> str:
    """What a parameter accepts, in words, from its JSON schema."""
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


def _load(deployment: Mapping[str, Any], repository: Path) -> Flow[..., Any]:
    """The deployment's flow.

    Raises:
        UsageError: it cannot be imported.
    """
    from prefect.flows import load_flow_from_entrypoint

    # As for `prefect deploy` in this folder; a packaged installation has it on the path anyway.
    if str(repository) not in sys.path:
        sys.path.insert(0, str(repository))
    entrypoint = str(deployment["entrypoint"])
    try:
        return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{deployment['name']}: entrypoint {entrypoint} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _outcome(flow: Flow[..., Any], state: State[Any]) -> tuple[Outcome, str | None]:
    """What became of the run, and why it is not Completed if it is not."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
    from prefect.client.schemas.sorting import ArtifactSort

    run_id = state.state_details.flow_run_id
    if run_id is None:  # Prefect sets it for every run that has begun
        raise TidepoolError(f"{flow.name} has no flow run: {state.message}")
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id])),
            sort=ArtifactSort.UPDATED_DESC,
        )
    outputs = next((each.data for each in found if each.key == f"{flow.name}-outputs"), None)
    rows = json.loads(outputs) if isinstance(outputs, str) else []
    value = state.result(raise_on_failure=False)
    completed = state.is_completed()
    outcome = Outcome(
        flow_run_id=str(run_id),
        state=str(state.name),
        result=value if completed else None,
        outputs=[str(row["url"]) for row in rows],
        artifacts=sorted({each.key for each in found if each.key}),
    )
    return outcome, None if completed else _reason(state, value)


def _reason(state: State[Any], value: object) -> str:
    """One sentence; our own errors are that already."""
    if isinstance(value, TidepoolError):
        return str(value)
    if isinstance(value, BaseException):
        return " ".join(f"{type(value).__name__}: {value}".split())
    return " ".join((state.message or "no reason was given").split())


def _text(name: str, outcome: Outcome) -> str:
    lines = [f"{name}: {outcome.state} (flow run {outcome.flow_run_id})"]
    if outcome.result is not None:
        lines.append(json.dumps(outcome.result, indent=2, default=str))
    lines += [f"output: {url}" for url in outcome.outputs]
    return "\n".join(lines) + "\n"


@contextmanager
def _only_result_on_stdout() -> Iterator[None]:
    """Sends standard output to standard error, below Python: prints of workers and libraries too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _api(repository: Path) -> Iterator[None]:
    """A Prefect API for the run: the configured one, the demo's, or one of our own that ends with the block.

    Raises:
        TidepoolError: the configured one does not answer.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    if PREFECT_API_URL.value() is not None:
        from prefect.client.orchestration import get_client

        # Ours fails now or never: Prefect's own patience (a minute) is for runs that go on.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
        if problem is not None:
            raise TidepoolError(
                f"the Prefect API {PREFECT_API_URL.value()} (PREFECT_API_URL) does not answer: {problem!r}"
            )
        yield
        return

    from tidepool.local import server

    home = server.Home.of(repository)
    if (port := home.running_demo_port()) is not None:
        _use(server.prefect_variables(home, port))
        yield
        return

    port = server.free_port()
    variables = server.prefect_variables(home, port)
    processes = server.Processes(home, variables)
    with server.ended_by_signals():
        try:
            server.start_server(processes, home, port, "--no-ui")
            _use(variables)
            yield
            _flush()
        finally:
            processes.stop_all()


def _use(variables: dict[str, str]) -> None:
    """Points Prefect, imported already, and the Dask workers to come, to a server."""
    from prefect.context import refresh_global_settings_context

    set_prefect_variables(variables)
    refresh_global_settings_context()


def _flush() -> None:
    """Sends what Prefect still holds back of logs and events, before the server goes."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for service in (APILogWorker, EventsWorker):
        service.drain_all(timeout=10)
