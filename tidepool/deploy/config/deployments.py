"""Checks of one deployment of prefect.yaml, with everything that the deploy and the server will make of its values."""

from __future__ import annotations

import datetime as dt
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from tidepool.deploy.config import automations, environments, flows, house_rules, placeholders, schedules
from tidepool.errors import UsageError, did_you_mean, reason
from tidepool.settings import reject_unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from jsonschema.exceptions import ValidationError as SchemaError
    from prefect import Flow

    from tidepool.deploy.config.house_rules import HouseRules
    from tidepool.deploy.config.scope import Scope
    from tidepool.deploy.config.yaml_lines import Finding, Place

PIN_STEP = "tidepool.deploy.steps.pin_image"

Templates = dict[str, "Mapping[str, Any] | None"]
"""Base job template of each work pool; None for a pool that the server does not have."""


@dataclass(frozen=True)
class Context:
    """Everything that the checks of a deployment need besides its entry.

    Attributes:
        repository: The folder that holds prefect.yaml.
        owner: Owner of the managed deployments.
        rules: Rules of the repository.
        scope: What placeholders may name.
        templates: Base job templates of the known work pools.
        runs_an_image: False if the environment runs what is in the working folder.
    """

    repository: Path
    owner: str
    rules: HouseRules
    scope: Scope
    templates: Templates
    runs_an_image: bool


def problems(context: Context, raw: Mapping[str, Any], flow: Flow[..., Any] | None) -> Iterator[Finding]:
    """Yield the problems of a deployment, each with its place inside the deployment; `flow` is None if unknown."""
    config = placeholders.fill_from_environment(raw)
    tag = automations.owner_tag(context.owner)
    if tag not in _list(config.get("tags")):
        yield ("tags",), f"missing tag {tag}, which marks the deployment as managed"
    yield from house_rules.check(context.rules, context.repository, config)
    secrets = list(_secrets(config))
    yield from secrets
    elsewhere = {place for place, _ in secrets}
    yield from (each for each in _placeholders(context.scope, raw) if each[0] not in elsewhere)
    if flow is not None:
        yield from _parameters(context.scope, flow, config)
        yield from _early_cluster(flow, _dict(config, "work_pool", "job_variables"))
    yield from _schedules(config)
    yield from _work_pool(context, config)
    yield from _refused_by_the_server(config)


def _placeholders(scope: Scope, raw: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in raw.items():
        if key == "schedules":  # their times cannot have any
            for index, schedule in enumerate(_list(value)):
                yield from scope.problems(_dict(schedule).get("parameters"), (key, index, "parameters"))
        elif key != "pull":  # its values are filled in when a run starts
            yield from scope.problems(value, (key,))
    for index, each in enumerate(_list(raw.get("tags"))):
        names = placeholders.in_braces(each) if isinstance(each, str) else []
        if names and str(each).strip() == f"{{{{ {names[0]} }}}}" and names[0].lstrip("$") in scope.may_be_empty:
            yield ("tags", index), f"{names[0]} may be empty, and the tag would be dropped; write text before it"


# --- parameters and schedules --------------------------------------------------------------------------------------


def _parameters(scope: Scope, flow: Flow[..., Any], config: Mapping[str, Any]) -> Iterator[Finding]:
    own = _dict(config, "parameters")
    invalid = list(_parameter_problems(flow, own))
    if config.get("enforce_parameter_schema") is not False:
        reported = {place[0] for place, _ in invalid}
        invalid += [each for each in _refused_by_the_schema(scope, flow, own) if each[0][0] not in reported]
    for place, message in invalid:
        yield ("parameters", *place), message
    for index, schedule in enumerate(_list(config.get("schedules"))):
        more = _dict(schedule, "parameters")
        for place, message in _parameter_problems(flow, more):
            yield ("schedules", index, "parameters", *place), message
        missing = flows.missing_parameters(flow, {**own, **more})
        if missing and not invalid:  # an unknown parameter may be the missing one, misspelt
            message = f"missing {', '.join(sorted(missing))}, which the flow requires: each scheduled run would fail"
            yield ("schedules", index, "parameters"), message


def _parameter_problems(flow: Flow[..., Any], values: Mapping[str, Any]) -> Iterator[Finding]:
    """Return the problems of parameters, but for values that a deploy has yet to fill in."""
    known = flow.parameters.properties
    final = {name: each for name, each in values.items() if name not in known or not placeholders.find(each)}
    return flows.parameter_problems(flow, final)


def _refused_by_the_schema(scope: Scope, flow: Flow[..., Any], values: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the values that are not of the type in the flow's schema: the server converts nothing, as the flow does."""
    from prefect.utilities.schema_tools.validation import validate

    schema = cast("Any", flow.parameters.model_dump(exclude_unset=True))
    for error in validate(dict(values), schema, preprocess=False, ignore_required=True):
        if error.absolute_path and _is_refused(error, scope):
            first = _first(error)
            converted = "; the server converts nothing" if first.validator == "type" else ""
            yield tuple(error.absolute_path), f"{first.message}{converted}"


def _is_refused(error: SchemaError, scope: Scope) -> bool:
    """Return True if an error of a schema does not depend on the value of a placeholder."""
    if error.context:  # of a choice of types: each of them has to be refused
        branches: dict[Any, bool] = {}
        for each in error.context:
            branch = each.relative_schema_path[0]
            branches[branch] = branches.get(branch, False) or _is_refused(each, scope)
        return all(branches.values())
    if isinstance(error.instance, str) and placeholders.find(error.instance):
        return error.validator == "type" and scope.is_text(error.instance)
    return error.validator != "format"  # as the server, which does not look at it


def _first(error: SchemaError) -> SchemaError:
    """Return the error of the first of several types, one of which a value must have."""
    return error.context[0] if error.context else error


def _schedules(config: Mapping[str, Any]) -> Iterator[Finding]:
    listed = [_dict(each) for each in _list(config.get("schedules"))]
    slugs = [each.get("slug") for each in listed]
    replacements = [each.get("replaces") for each in listed]
    for index, (schedule, slug, replaced) in enumerate(zip(listed, slugs, replacements, strict=True)):
        if slug is not None and slug in slugs[:index]:
            yield ("schedules", index, "slug"), f"duplicate slug {slug!r}"
        for key, message in schedules.problems(schedule, dt.datetime.now(dt.UTC)):
            yield ("schedules", index, key), message
        if replaced is not None and replaced in slugs:
            yield ("schedules", index, "replaces"), f"schedule {replaced!r} still exists"
        if replaced is not None and replaced in replacements[:index]:
            yield ("schedules", index, "replaces"), f"schedule {replaced!r} is replaced more than once"


# --- work pool -----------------------------------------------------------------------------------------------------


def _work_pool(context: Context, config: Mapping[str, Any]) -> Iterator[Finding]:
    name = _dict(config, "work_pool").get("name")
    if not isinstance(name, str) or placeholders.find(name):
        return
    template = context.templates.get(name)
    if template is not None:
        yield from _job_variables(context, config, template)
        return
    known = sorted(each for each, found in context.templates.items() if found is not None)
    near = did_you_mean(name, known, "-")
    if name in context.templates:
        yield ("work_pool", "name"), f"the server has no work pool {name!r}{did_you_mean(name, known)}"
    elif near != "; -":
        yield ("work_pool", "name"), f"unknown work pool {name!r}{near}"


def _job_variables(context: Context, config: Mapping[str, Any], template: Mapping[str, Any]) -> Iterator[Finding]:
    from prefect.utilities.schema_tools.validation import validate

    schema = _dict(template, "variables")
    pool = _dict(config, "work_pool")
    variables, known = _dict(pool, "job_variables"), _dict(schema, "properties")
    for key in variables:
        if key not in known:
            message = f"work pool {pool['name']} has no such job variable{did_you_mean(key, list(known))}"
            yield ("work_pool", "job_variables", key), message
    for error in validate(variables, cast("Any", schema), ignore_required=True, allow_none_with_default=True):
        # Prefect lets each variable with a default be null: of the branches, the first is the variable's own type.
        if _is_refused(error, context.scope):
            yield ("work_pool", "job_variables", *error.absolute_path), _first(error).message
    defaults = {key: _dict(each).get("default") for key, each in known.items()}
    for key, message in _policies(variables, {**defaults, **variables}, scheduled=bool(config.get("schedules"))):
        yield ("work_pool", "job_variables", key), message
    if context.runs_an_image and "image" in known:
        yield from _image(context, variables.get("image"))


def _policies(given: Mapping[str, Any], effective: Mapping[str, Any], *, scheduled: bool) -> Iterator[tuple[str, str]]:
    """Yield what would have no effect in the policy of a deployment, by the job variable."""
    deadline = effective.get("deadline_seconds")
    for key in ("start_timeout_seconds", "max_runtime_seconds"):
        seconds = given.get(key)
        if isinstance(seconds, int) and isinstance(deadline, int) and seconds >= deadline:
            yield key, f"{seconds} is not below deadline_seconds ({deadline}), which would end the run first"
    if given.get("max_runtime_seconds") and effective.get("on_termination") == "reschedule":
        message = "a run that it ends would be executed again, because of on_termination: reschedule"
        yield "max_runtime_seconds", f"{message}; use deadline_seconds, or on_termination: relinquish"
    if given.get("after_outage", "all") != "all" and not scheduled:
        yield "after_outage", "it chooses among scheduled runs, and the deployment has no schedules"


def _early_cluster(flow: Flow[..., Any], variables: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield a problem if the driver would ask for a Dask cluster that the flow does not take over when it begins."""
    size = variables.get("early_cluster") or "none"
    runner: Any = flow.task_runner  # of `dask_runner`; another one has no such attributes
    takes_over = getattr(runner, "start_early", False) and not getattr(runner, "shared", "")
    if size != "none" and not (takes_over and getattr(runner, "size", "") == size):
        message = f"{flow.name} does not begin with a {size} cluster of its own, so it would be started for nothing"
        place = ("work_pool", "job_variables", "early_cluster")
        yield place, f'{message}; give the flow task_runner=dask_runner("{size}", start_early=True), or leave this out'


def _image(context: Context, image: object) -> Iterator[Finding]:
    place = ("work_pool", "job_variables", "image")
    if not image:
        pinned = [step for step, function in context.scope.functions.items() if function == PIN_STEP]
        example = f'"{{{{ {pinned[0]}.image }}}}"' if pinned else "name@sha256:…"
        yield place, f"missing: runs would use the work pool's default image; write `image: {example}`"
    elif context.rules.image_by_digest and not _is_pinned(context.scope, str(image)):
        yield place, f"{image!r} is not pinned by digest: use name@sha256:… or the output of {PIN_STEP}"


def _is_pinned(scope: Scope, image: str) -> bool:
    return scope.function(image) == PIN_STEP or environments.DIGEST.fullmatch(image) is not None


def _secrets(config: Mapping[str, Any]) -> Iterator[Finding]:
    looks = "looks like a secret in plain text, which would be stored in the deployment's record"
    environment = _dict(config, "work_pool", "job_variables", "env")
    advice = "move it to the Kubernetes Secret of the flow runs"
    for key, value in environment.items():
        variable: Place = ("work_pool", "job_variables", "env", key)
        filled = [name for name in placeholders.in_braces(str(value)) if name.startswith("$")]
        if placeholders.is_secret(value, str(key)):
            yield variable, f"{looks}; {advice}"
        elif any(placeholders.is_secret("-", name) for name in (str(key), *filled) if filled):
            yield variable, f"the value of {filled[0]} would be stored in the deployment's record; {advice}"
    for place, text in placeholders.texts(config):
        if any(name.startswith(f"{placeholders.BLOCK}secret.") for name in placeholders.in_braces(text)):
            yield place, f"Prefect would store the secret's value in the deployment's record; {advice}"
    try:
        reject_unknown([str(key) for key in environment])
    except UsageError as error:
        yield ("work_pool", "job_variables", "env"), str(error)
    for place, text in placeholders.texts(_dict(config, "parameters"), ("parameters",)):
        if placeholders.is_secret(text):
            yield place, looks


# --- what the server makes of it -----------------------------------------------------------------------------------

# Fields of a request that creates a deployment, by their place in prefect.yaml.
_FIELDS: dict[str, Place] = {
    **{name: (name,) for name in ("name", "version", "description", "entrypoint", "tags", "parameters", "paused")},
    "enforce_parameter_schema": ("enforce_parameter_schema",),
    "pull_steps": ("pull",),
    "work_pool_name": ("work_pool", "name"),
    "work_queue_name": ("work_pool", "work_queue_name"),
    "job_variables": ("work_pool", "job_variables"),
    "concurrency_limit": ("concurrency_limit", "limit"),
    "concurrency_options": ("concurrency_limit",),
}


def _refused_by_the_server(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what the model of the request refuses, and what cannot be sent to it."""
    from prefect.server.schemas.actions import DeploymentCreate

    body: dict[str, Any] = {"flow_id": str(UUID(int=0))}
    for field, place in _FIELDS.items():
        value = _at(config, place)
        if field == "concurrency_options":
            value = {key: each for key, each in _dict(value).items() if key != "limit"} or None
        for inside, number in _not_json(value, place):
            yield inside, f"{number} is not a value of JSON"
        if value is not None and not list(_not_json(value, place)):
            body[field] = to_jsonable_python(value)
    try:
        # The schema of the parameters has been checked, value by value.
        DeploymentCreate.model_validate_json(json.dumps({**body, "enforce_parameter_schema": False}))
    except ValidationError as error:
        for each in error.errors():
            field = str(each["loc"][0]) if each["loc"] else ""
            inside = each["loc"][1:] if field in _FIELDS else each["loc"]
            yield (*_FIELDS.get(field, ()), *inside), f"the server refuses it: {reason(each)}"


def _not_json(value: Any, place: Place) -> Iterator[tuple[Place, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_json(item, (*place, key))


def _at(config: Mapping[str, Any], place: Place) -> Any:
    """Return the value at a place; `concurrency_limit` may be the limit itself."""
    value: Any = config
    for key in place:
        if not isinstance(value, dict):
            return value if place == _FIELDS["concurrency_limit"] else None
        value = value.get(key)
    return value


def _dict(value: Any, *keys: str) -> dict[str, Any]:
    """Return the mapping below these keys of a value; empty where there is none."""
    for key in keys:
        value = _dict(value).get(key)
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
