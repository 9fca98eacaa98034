"""Strict models of prefect.yaml and automations.yaml: an unknown key, a missing key or a wrong type is a problem.

Prefect's own models ignore unknown keys.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tidepool.deploy.config.yaml_source import place_in
from tidepool.errors import did_you_mean, reason

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from pydantic_core import ErrorDetails

    from tidepool.deploy.config.yaml_lines import Finding, Place
    from tidepool.deploy.config.yaml_source import Problem, YamlFile

NOT_ALLOWED = {
    "build": "a deployment with its own `build` skips the checks of the top-level one",
    "push": "the one image is pushed by the top-level `push`",
    "sla": "self-hosted Prefect refuses it after it has written the deployment; write an automation",
    "triggers": "each deploy recreates them and undoes a pause; write an automation into automations.yaml",
    "schedule": "write `schedules`, a list, each with a slug",
    "flow_name": "the flow itself has its name; remove it",
    "active": "a deploy would undo a pause made by on-call; remove it, and to pause use `tidepool pause`",
    "catchup": "Prefect 3 has no such setting; remove it",
    "max_active_runs": "Prefect 3 has no such setting; write `concurrency_limit` into the deployment",
    "is_schedule_active": "Prefect 3 ignores it; remove it, and to pause use `tidepool pause`",
    "variables": "Prefect 3 calls them `job_variables`",
}
"""Keys that Prefect accepts in a deployment or a schedule and tidepool does not, with the reason."""

_NEAR = re.compile(r"^unknown key; did you mean (\S+)\?$")
# Without a value these have no effect; Prefect's own templates have them.
_NULL = ("schedule", "flow_name", "sla", "triggers", "max_active_runs", "active")
# Written by Prefect's own commands, and what is so without them.
_DEFAULTS = {"catchup": False, "is_schedule_active": True}
_STOPPED = (
    "a deploy would undo what on-call does; without it the schedule runs: remove the schedule, "
    "or write `paused: true` into the deployment"
)
_NO_PULL = (
    "missing: without it Prefect writes this machine's folder into each deployment; the image is the code: `pull: []`"
)
_NO_SLUG = "missing: by its slug a schedule keeps its pause when it is changed; write for example `slug: daily`"
# `flow/name` stands for a deployment; the others are those that Prefect refuses in the names of flows.
_NAME = r"^[^/%&<>]+$"
_LARGEST = 2**31 - 1  # of the integers of the server's database
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# --- prefect.yaml --------------------------------------------------------------------------------------------------


class Schedule(_Strict):
    """A schedule of a deployment; `schedules.problems` checks which keys go together."""

    slug: Annotated[str, Field(min_length=1)]
    timezone: str | None = None
    cron: str | None = None
    interval: float | str | None = None
    rrule: str | None = None
    anchor_date: str | None = None
    day_or: bool | None = None
    parameters: dict[str, Any] | None = None
    replaces: str | None = None


class DeploymentConcurrency(_Strict):
    """Concurrency limit of a deployment's runs."""

    limit: Annotated[int, Field(ge=1, le=_LARGEST)]
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"]
    grace_period_seconds: Annotated[int, Field(ge=60, le=86400)] | None = None


class DeploymentWorkPool(_Strict):
    """Work pool of a deployment."""

    name: str
    work_queue_name: str | None = None
    job_variables: dict[str, Any] | None = None


class Deployment(_Strict):
    """A deployment. Prefect reads null as the default, and writes it into the files that it makes."""

    name: Annotated[str, Field(pattern=_NAME)]
    entrypoint: str
    description: str | None = None
    tags: list[str] | None = None
    work_pool: DeploymentWorkPool
    schedules: list[Schedule] | None = None
    parameters: dict[str, Any] | None = None
    version: str | None = None
    paused: bool | None = None
    concurrency_limit: Annotated[int, Field(ge=1, le=_LARGEST)] | DeploymentConcurrency | None = None
    enforce_parameter_schema: bool | None = None
    pull: list[dict[str, Any]] = []


class PrefectFile(_Strict):
    """The whole of prefect.yaml."""

    deployments: Annotated[list[Deployment], Field(min_length=1)]
    pull: list[dict[str, Any]]
    build: list[dict[str, Any]] | None = None
    push: list[dict[str, Any]] | None = None
    name: str | None = None
    prefect_version: str | None = Field(default=None, alias="prefect-version")
    definitions: dict[str, Any] | None = None


# --- automations.yaml ----------------------------------------------------------------------------------------------


class WorkPool(_Strict):
    """A work pool and the file of its base job template."""

    name: str
    type: str
    base_job_template: str


class ConcurrencyLimit(_Strict):
    """A global concurrency limit."""

    name: Name
    limit: int = Field(ge=0, le=_LARGEST)
    slot_decay_per_second: float = Field(default=0.0, ge=0)


class Variable(_Strict):
    """A Prefect variable: any JSON value."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    value: Any


class Automation(_Strict):
    """An automation; trigger and actions as in Prefect, plus `notify` and `deployment`."""

    name: Name
    description: str
    trigger: dict[str, Any]
    actions: list[dict[str, Any]] = Field(min_length=1)


class ServerFile(_Strict):
    """The whole of automations.yaml."""

    work_pools: list[WorkPool] = []
    concurrency_limits: list[ConcurrencyLimit] = []
    variables: list[Variable] = []
    automations: list[Automation] = []


# --- a file that does not fit its model ----------------------------------------------------------------------------

_JOB_VARIABLES = ("env", "image", "working_dir", "command")
# Keys that are written one level too high: in which mapping, and where they belong.
_TOO_HIGH: tuple[tuple[type[BaseModel], Collection[str], str], ...] = (
    (
        PrefectFile,
        {*Deployment.model_fields, "schedule", "job_variables", "work_queue_name"}
        - {*PrefectFile.model_fields, "version"},
        "the keys of a deployment belong into an item of `deployments`",
    ),
    (
        Deployment,
        {*Schedule.model_fields, "active"} - set(Deployment.model_fields),
        "the keys of a schedule belong into an item of `schedules`",
    ),
    (Deployment, set(DeploymentConcurrency.model_fields), "these keys belong into `concurrency_limit`"),
    (Deployment, {"job_variables", "work_queue_name"}, "these keys belong into `work_pool`"),
    (
        Deployment,
        _JOB_VARIABLES,
        "job variables belong into `work_pool: {job_variables: {…}}`",
    ),
    (DeploymentWorkPool, _JOB_VARIABLES, "job variables belong into `job_variables`"),
)


def problems(model: type[BaseModel], file: YamlFile) -> list[Problem]:
    """Return the duplicate keys, unknown keys, missing keys and wrong types of a file, by the model of the whole."""
    return [*file.duplicates, *(file.problem(place, message) for place, message in findings(model, file.data))]


def findings(model: type[BaseModel], data: Any) -> list[Finding]:
    """Return the unknown keys, missing keys and wrong types of data, one for each place and each mistake."""
    if not isinstance(data, dict):
        return [((), f"it must be a mapping, not {type(data).__name__}")]
    try:
        model.model_validate(data)
    except ValidationError as error:
        found: dict[Place, str] = {}
        together: dict[tuple[Place, str], list[str]] = {}
        for each in error.errors():
            place = place_in(data, each["loc"])
            if each["type"] != "extra_forbidden":
                found.setdefault(place, _message(place, each))
            elif _has_no_effect(place[-1], each["input"]):
                continue
            elif advice := _too_high(_model_at(model, place[:-1]), place[-1]):
                together.setdefault((place[:-1], advice), []).append(str(place[-1]))
            else:
                known = _keys(_model_at(model, place[:-1]))
                found.setdefault(place, _unknown_key(str(place[-1]), each["input"], known))
        for (above, advice), keys in together.items():
            names = f"s {', '.join(keys)}" if len(keys) > 1 else ""
            found[(*above, keys[0])] = f"unknown key{names}; {advice}"
        if model is PrefectFile and misplaced(data) and not data.get("deployments"):
            found.pop(("deployments",), None)
        for place in misspelt(found.items()):
            found.pop(place, None)
        # Of a value that may be of several types, the branch that fits its form is the deepest.
        return [
            (place, message) for place, message in found.items() if not any(_is_inside(each, place) for each in found)
        ]
    return []


def misplaced(data: Mapping[str, Any]) -> list[str]:
    """Return the keys of a deployment that stand at the top of a prefect file: a deployment may lack them."""
    return [key for key in data if _too_high(PrefectFile, key)]


def _too_high(model: type[BaseModel] | None, key: Any) -> str:
    """Return the place that a key of a mapping belongs to, if it is written one level too high; otherwise nothing."""
    return next((advice for above, keys, advice in _TOO_HIGH if above is model and key in keys), "")


def _has_no_effect(key: Any, value: Any) -> bool:
    """Return True if an unknown key is one of Prefect's own templates, without a value or with its default."""
    if key in _DEFAULTS and value is _DEFAULTS[key]:
        return True
    return key in _NULL and (value is None or (key == "schedule" and value in ({}, [])))


def misspelt(found: Iterable[Finding]) -> list[Place]:
    """Return the places of the keys that unknown keys are near to, and that are therefore missing."""
    near = ((place, _NEAR.search(message)) for place, message in found)
    return [(*place[:-1], match[1]) for place, match in near if match]


def _is_inside(place: Place, outer: Place) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def _message(place: Place, error: ErrorDetails) -> str:
    key = str(place[-1]) if place else ""
    empty = error["input"] is None and error["type"].endswith("_type")  # a key whose value was not filled in
    match "missing" if empty else error["type"]:
        case "missing":
            reasons = {"pull": _NO_PULL, "slug": _NO_SLUG}
            return reasons.get(key, "missing: it has no value" if empty else "missing")
        case "model_type" | "dict_type":
            return f"must be a mapping, not {error['input']!r}"
        case "list_type" if isinstance(error["input"], dict):
            return "must be a list, not a mapping"
        case "string_type" if isinstance(error["input"], dt.date):
            return f"must be a text, which YAML reads as a date without quotes: '{error['input']}'"
        case "string_pattern_mismatch":
            of_prefect = error["ctx"]["pattern"] == _NAME
            form = "without / % & < >, and not empty" if of_prefect else "lower-case words joined by hyphens"
            return f"{error['input']!r} must be {form}"
    return reason(error)


def _unknown_key(key: str, value: Any, known: Collection[str]) -> str:
    if key == "active" and value is False:
        return f"not allowed here: {_STOPPED}"
    if key == "version" and "deployments" in known:
        return "unknown key; remove it: only a deployment has a version, in its item of `deployments`"
    if key in NOT_ALLOWED and "deployments" not in known:
        return f"not allowed here: {NOT_ALLOWED[key]}"
    return f"unknown key{did_you_mean(key, sorted(known))}"


def _keys(model: type[BaseModel] | None) -> list[str]:
    """Return the keys that a mapping accepts."""
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _model_at(model: type[BaseModel] | None, place: Place) -> type[BaseModel] | None:
    """Return the model of the mapping at a place; None if it accepts any keys."""
    for part in place:
        if isinstance(part, str) and model is not None:
            field = model.model_fields.get(part)
            model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_in(each) for each in getattr(annotation, "__args__", ()))
    return next((each for each in inner if each), None)
