"""`tidepool run`: one deployment's flow in this process, with parameters from prefect.yaml and the command line.

Standard output carries the result only; whatever the flow, Prefect or Dask print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from tidepool.deploy.config import environments, flows
from tidepool.deploy.config.yaml_source import path
from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import set_prefect_variables, set_variables, settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from prefect import Flow
    from prefect.client.schemas.objects import State
    from pydantic import TypeAdapter


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run, as `--json` prints it."""

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
    """Run the flow and print its outcome.

    Args:
        repository: The folder that holds prefect.yaml; it becomes the current one, as it is for a worker.
        name: The deployment.
        parameters: `name=value`, each overriding the one in prefect.yaml.
        environment: The environment whose overlay is merged into prefect.yaml.
        provider: Where mapped tasks run; overrides the setting.
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
        flow = flows.load(repository, deployment["entrypoint"])
        values = bind(flow, deployment.get("parameters") or {}, assignments(parameters))
        with _api(repository):
            # Prefect's overloads know no flow of any parameters and any result.
            state = cast("State[Any]", cast("Any", flow)(**values, return_state=True))
            outcome, reason = _outcome(flow, state)
            _flush()
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
    if adapter.json_schema() == {}:  # any type at all
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


def _outcome(flow: Flow[..., Any], state: State[Any]) -> tuple[Outcome, str | None]:
    """Read the run's outcome, and the reason when it is not Completed."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
    from prefect.client.schemas.sorting import ArtifactSort

    run_id = state.state_details.flow_run_id
    if run_id is None:  # Prefect sets it for every run that has started
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
    """Give the reason in one sentence, which tidepool's own errors are already."""
    if isinstance(value, TidepoolError):
        return str(value)
    if isinstance(value, BaseException):
        return " ".join(f"{type(value).__name__}: {value}".split())
    return " ".join((state.message or "no reason recorded").split())


def _text(name: str, outcome: Outcome) -> str:
    lines = [f"{name}: {outcome.state} (flow run {outcome.flow_run_id})"]
    if outcome.result is not None:
        lines.append(json.dumps(outcome.result, indent=2, default=str))
    lines += [f"output: {url}" for url in outcome.outputs]
    return "\n".join(lines) + "\n"


@contextmanager
def _only_result_on_stdout() -> Iterator[None]:
    """Redirect standard output to standard error, below Python: prints of workers and libraries too."""
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
    """Provide a Prefect API for the run: the configured one, the demo's, or one that ends with the block.

    Raises:
        TidepoolError: the configured one does not answer.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    if PREFECT_API_URL.value() is not None:
        from prefect.client.orchestration import get_client

        # Fail at once: Prefect's own retries (a minute) are for runs that are under way.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
        if problem is not None:
            raise TidepoolError(
                f"the Prefect API {PREFECT_API_URL.value()} (PREFECT_API_URL) does not answer: {problem!r}"
            )
        yield
        return

    from tidepool.local.processes import signals_interrupt
    from tidepool.local.server import Home, running_server

    home = Home.of(repository)
    if (server := home.demo_server()) is not None:
        _use(server.variables)
        yield
        return

    with signals_interrupt(), running_server(home) as server:
        _use(server.variables)
        yield


def _use(variables: dict[str, str]) -> None:
    """Point Prefect, which is imported already, and the Dask workers to come at a server."""
    from prefect.context import refresh_global_settings_context

    set_prefect_variables(variables)
    refresh_global_settings_context()


def _flush() -> None:
    """Send the logs and events that Prefect still buffers: the server may end, and the outcome is printed last."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for service in (APILogWorker, EventsWorker):
        service.drain_all(timeout=10)
