"""Strict reading of prefect.yaml and automations.yaml: every problem at once, each with its file and line.

`prefect deploy` drops unknown keys without a word, and finds a bad value when the deployments before it are written.
Here the whole of both files is checked before anything is written; with a server, its work pools count too.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
import zoneinfo
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from tidepool import settings as settings_module
from tidepool.deploy.config import automations, environments, schedules, yaml_source
from tidepool.deploy.reconcile.desired import Flows, from_environment, placeholders
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from prefect import Flow

    from tidepool.deploy.config.yaml_source import Where, YamlFile

FILE = "prefect.yaml"
STEP = "tidepool.deploy.steps.validate"
_RUNBOOK = re.compile(r"docs/runbooks/[A-Za-z0-9._-]+\.md")

_NOT_HERE = {
    "build": "a deployment with its own `build` skips the checks of the top-level one",
    "push": "the one image is pushed by the top-level `push`",
    "sla": "self-hosted Prefect refuses it after it has written the deployment; write an automation",
    "triggers": "they would be made anew by each deploy; write an automation into automations.yaml",
    "schedule": "write `schedules`, a list",
    "flow_name": "the flow's name is the flow's business",
    "active": "a deploy would undo a pause made by on-call; use `tidepool pause`",
    "variables": "Prefect 3 calls them `job_variables`",
}

# Names and values of variables that hold a secret; a reference to one ({{ … }}) is fine.
_SECRET_NAME = re.compile(
    r"(PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIAL|AUTH_STRING)", re.IGNORECASE
)
_SECRET_NAME_OF_A_REFERENCE = re.compile(r"(_NAME|_FILE|_PATH|_ID|_REF|_ENABLED|_SECONDS)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|hooks\.slack\.com/services/\w|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|://[^/\s:@]+:[^/\s@{]+@|pnu_[A-Za-z0-9]{20,}"
)


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: Path from the repository's root.
        line: From 1.
        message: What is wrong, and what is accepted.
    """

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def sentence(problems: Sequence[Problem]) -> str:
    """All problems, one per line, under a count."""
    count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}, nothing was written:"
    return "\n".join([count, *(f"  {problem}" for problem in problems)])


def check(
    repository: Path,
    environment: str = environments.PRODUCTION,
    *,
    owner: str,
    file: Path | None = None,
    templates: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> list[Problem]:
    """All problems of the manifest, sorted by file and line.

    Args:
        repository: The folder that holds prefect.yaml.
        environment: production, or an overlay that is checked together with prefect.yaml.
        owner: Whose the deployments are: each must carry the tag `managed-by:<owner>`.
        file: A rendered prefect file in the place of prefect.yaml.
        templates: Base job templates of the server's work pools, in the place of those in Git; None for a pool
            that the server does not have.
    """
    found: list[Problem] = []
    try:
        base = yaml_source.read(file or repository / FILE, file.name if file else FILE)
    except UsageError as error:
        return [Problem(FILE, 1, str(error))]
    found += _repeated(base)
    shape = _shape(_File, base, _describe_deployment(base))
    found += shape
    server_file, problems = _server_file(repository, owner)
    found += problems
    in_git, problems = _templates(repository, server_file)
    found += problems
    if _has_deployments(base):
        checker = _Checker(repository, owner, {**in_git, **(templates or {})})
        found += checker.check(base, environment if file is None else environments.PRODUCTION)
        found += checker.check_automations(repository, server_file)
    return sorted(set(found))


# --- the shape of the files ----------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Schedule(_Strict):
    slug: automations.Name
    timezone: str
    cron: str | None = None
    interval: float | str | None = None
    rrule: str | None = None
    anchor_date: str | None = None
    day_or: bool | None = None
    parameters: dict[str, Any] = {}
    replaces: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> _Schedule:
        given = [name for name in ("cron", "interval", "rrule") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of cron, interval and rrule is needed, not {' and '.join(given) or 'none'}")
        if given == ["interval"] and self.anchor_date is None:
            raise ValueError("an interval needs an anchor_date: without one each deploy moves the ticks")
        return self


class _Limit(_Strict):
    limit: Annotated[int, Field(ge=1)]
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"]
    grace_period_seconds: Annotated[int, Field(ge=60, le=86400)] | None = None


class _Pool(_Strict):
    name: str
    work_queue_name: str | None = None
    job_variables: dict[str, Any] = {}


class _Deployment(_Strict):
    name: automations.Name
    entrypoint: str
    description: str
    tags: list[str]
    work_pool: _Pool
    schedules: list[_Schedule] = []
    parameters: dict[str, Any] = {}
    version: str | None = None
    paused: bool | None = None
    concurrency_limit: Annotated[int, Field(ge=1)] | _Limit | None = None
    enforce_parameter_schema: bool | None = None
    pull: list[dict[str, Any]] | None = None


class _File(_Strict):
    deployments: Annotated[list[_Deployment], Field(min_length=1)]
    pull: list[dict[str, Any]]
    build: list[dict[str, Any]] | None = None
    push: list[dict[str, Any]] | None = None
    name: str | None = None
    prefect_version: str | None = Field(default=None, alias="prefect-version")
    definitions: dict[str, Any] = {}


def _repeated(file: YamlFile) -> list[Problem]:
    return [
        Problem(file.name, file.line(where), f"{_path(where)}: the key is written twice, and YAML keeps the last one")
        for where in file.repeated
    ]


def _describe_deployment(file: YamlFile) -> Mapping[int, str]:
    listed = file.data.get("deployments") if isinstance(file.data, dict) else None
    names = (
        [each.get("name") if isinstance(each, dict) else None for each in listed] if isinstance(listed, list) else []
    )
    return {index: str(name) for index, name in enumerate(names) if name}


def _shape(model: type[BaseModel], file: YamlFile, names: Mapping[int, str]) -> list[Problem]:
    """Unknown keys, missing keys and wrong types."""
    if not isinstance(file.data, dict):
        return [Problem(file.name, 1, f"it must be a mapping, not {type(file.data).__name__}")]
    try:
        model.model_validate(file.data)
    except ValidationError as error:
        seen: dict[tuple[Where, str], Problem] = {}
        for each in error.errors():
            where = _clean(file.data, each["loc"])
            message = _message(model, where, each)
            # The branches of a union each have their say about the same place.
            seen.setdefault((where, message), Problem(file.name, file.line(where), f"{_path(where, names)}: {message}"))
        return list(seen.values())
    return []


def _clean(data: Any, location: tuple[int | str, ...]) -> Where:
    """The way in the file: without the branches of unions, which pydantic puts in."""
    where: list[int | str] = []
    current: Any = data
    for index, part in enumerate(location):
        item = isinstance(current, list) and isinstance(part, int) and part < len(current)
        if item or (isinstance(current, dict) and part in current):
            current = current[part]
        elif index == len(location) - 1 and isinstance(current, dict) and isinstance(part, str) and part.isidentifier():
            pass  # a missing key: the last part
        else:
            continue
        where.append(part)
    return tuple(where)


def _message(model: type[BaseModel], where: Where, error: Any) -> str:
    key = str(where[-1]) if where else ""
    if error["type"] == "extra_forbidden":
        if key in _NOT_HERE and len(where) > 1:
            return f"not allowed here: {_NOT_HERE[key]}"
        known = _keys(model, where[:-1])
        return f"unknown key{_hint(key, sorted(known))}"
    if error["type"] == "missing":
        return "missing" + (
            ": without it Prefect writes this machine's folder into each deployment; the image is the code: `pull: []`"
            if where == ("pull",)
            else ""
        )
    if error["type"] == "string_pattern_mismatch":
        return f"{error['input']!r} must be lower-case words joined by hyphens"
    text = str(error["msg"]).removeprefix("Value error, ")
    text = text[0].lower() + text[1:]
    shown = "" if error["type"] == "value_error" or isinstance(error["input"], dict) else f", not {error['input']!r}"
    return text + shown


def _keys(model: type[BaseModel], where: Where) -> list[str]:
    """The keys that a mapping may have."""
    current: Any = model
    for part in where:
        if isinstance(part, int):
            continue
        field = next((each for name, each in current.model_fields.items() if (each.alias or name) == part), None)
        if field is None:
            return []
        current = _model_in(field.annotation) or _Strict
    return [field.alias or name for name, field in current.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_in(each) for each in getattr(annotation, "__args__", ()))
    return next((each for each in inner if each), None)


def _path(where: Where, names: Mapping[int, str] | None = None) -> str:
    """`deployments[csv-etl].work_pool.name`."""
    text = ""
    for index, part in enumerate(where):
        if isinstance(part, int):
            name = (names or {}).get(part) if index == 1 and where[0] == "deployments" else None
            text += f"[{name or part}]"
        else:
            text += f".{part}" if text else str(part)
    return text or "the file"


def _has_deployments(file: YamlFile) -> bool:
    """The deployments are a list of named mappings; otherwise there is nothing further to look at."""
    listed = file.data.get("deployments") if isinstance(file.data, dict) else None
    return isinstance(listed, list) and all(isinstance(each, dict) and each.get("name") for each in listed)


# --- automations.yaml ----------------------------------------------------------------------------------------------


def _server_file(repository: Path, owner: str) -> tuple[automations.ServerFile, list[Problem]]:
    try:
        file = automations.read(repository)
    except UsageError as error:
        return automations.ServerFile(), [Problem(automations.FILE, 1, str(error))]
    if file is None or file.data is None:
        return automations.ServerFile(), []
    found = _repeated(file) + _shape(automations.ServerFile, file, {})
    if found:
        return automations.ServerFile(), found
    content = automations.ServerFile.model_validate(file.data)
    for key in ("work_pools", "concurrency_limits", "variables", "automations"):
        names = [each.name for each in getattr(content, key)]
        found += [
            Problem(file.name, file.line((key, index)), f"{key}[{name}]: the name is there twice")
            for index, name in enumerate(names)
            if name in names[:index]
        ]
    for index, limit in enumerate(content.concurrency_limits):
        if not limit.name.startswith(f"{owner}-"):
            found.append(
                Problem(
                    file.name,
                    file.line(("concurrency_limits", index, "name")),
                    f"concurrency_limits[{limit.name}]: the name must start with {owner}-: a limit has no tags, its "
                    "name says whose it is",
                )
            )
    return content, found


def _templates(
    repository: Path, content: automations.ServerFile
) -> tuple[dict[str, Mapping[str, Any] | None], list[Problem]]:
    result: dict[str, Mapping[str, Any] | None] = {}
    found = []
    for pool in content.work_pools:
        try:
            result[pool.name] = automations.template(repository, pool)
        except (OSError, ValueError) as error:
            found.append(Problem(pool.base_job_template, 1, f"template of work pool {pool.name}: {error}"))
    return result, found


# --- what the deployments mean -------------------------------------------------------------------------------------


@dataclass
class _At:
    """A deployment and where it stands."""

    index: int
    config: Mapping[str, Any]
    flow: Flow[..., Any] | None = None

    @property
    def name(self) -> str:
        return str(self.config["name"])

    def where(self, *rest: str | int) -> Where:
        return ("deployments", self.index, *rest)


Finding = tuple["Where", str]


class _Checker:
    """Checks deployments one by one; each method gives (place, message)."""

    def __init__(self, repository: Path, owner: str, templates: Mapping[str, Mapping[str, Any] | None]) -> None:
        self._repository = repository
        self._owner = owner
        self._templates = templates
        self._flows = Flows(repository)
        self._names: set[str] = set()

    def check(self, base: YamlFile, environment: str) -> list[Problem]:
        """Checks the deployments of one environment."""
        manifest = base.data
        overlay: YamlFile | None = None
        if environment != environments.PRODUCTION:
            try:
                manifest = environments.load(self._repository, environment)
            except UsageError as error:
                return [Problem(f"environments/{environment}.yaml", 1, str(error))]
            name = f"environments/{environment}.yaml"
            overlay = yaml_source.read(self._repository / name, name)
        found: list[Problem] = _repeated(overlay) if overlay else []
        if base.data is manifest:
            found += [Problem(base.name, base.line(where), message) for where, message in self._file(manifest)]
        seen: dict[str, int] = {}
        for index, config in enumerate(manifest["deployments"]):
            at = _At(index, from_environment(config))
            for where, message in self._deployment(at, seen):
                file, line = _locate(base, overlay, at.name, where)
                found.append(Problem(file, line, f"{_path(where, {index: at.name})}: {message}"))
        return found

    def _file(self, manifest: Mapping[str, Any]) -> Iterator[Finding]:
        build = manifest.get("build") or []
        first = next(iter(build[0]), "") if build and isinstance(build[0], dict) else ""
        if first != STEP:
            yield ("build",), f"build: the first step must be {STEP}: it vetoes a broken file before the first write"

    def _deployment(self, at: _At, seen: dict[str, int]) -> Iterator[Finding]:
        if at.name in seen:
            yield at.where("name"), "the name is there twice: the second would overwrite the first"
        seen[at.name] = at.index
        tag = automations.owner_tag(self._owner)
        if tag not in _list(at.config.get("tags")):
            yield at.where("tags"), f"{tag} is missing: the tag says whose the deployment is"
        yield from self._runbook(at)
        yield from self._entrypoint(at)
        yield from self._schedules(at)
        yield from self._parameters(at)
        yield from self._work_pool(at)
        yield from self._secrets(at)

    def _runbook(self, at: _At) -> Iterator[Finding]:
        links = _RUNBOOK.findall(str(at.config.get("description") or ""))
        if not links:
            yield at.where("description"), f"no link to a runbook, such as docs/runbooks/{at.name}.md"
        for link in sorted(set(links)):
            if (self._repository / "docs").is_dir() and not (self._repository / link).is_file():
                yield at.where("description"), f"the runbook {link} does not exist"

    def _entrypoint(self, at: _At) -> Iterator[Finding]:
        entrypoint = at.config.get("entrypoint")
        if not isinstance(entrypoint, str):
            return
        if "/" in entrypoint or ":" in entrypoint:
            yield at.where("entrypoint"), f"{entrypoint!r} is a file; write the module: flows.domain.flow.function"
            return
        try:
            at.flow = self._flows.load(entrypoint)
        except UsageError as error:
            yield at.where("entrypoint"), str(error)
            return
        self._names.add(f"{at.flow.name}/{at.name}")

    def _schedules(self, at: _At) -> Iterator[Finding]:
        listed = [each for each in _list(at.config.get("schedules")) if isinstance(each, dict)]
        slugs: set[str] = set()
        for index, schedule in enumerate(listed):
            slug = schedule.get("slug")
            if slug in slugs:
                yield at.where("schedules", index, "slug"), f"slug {slug!r} is there twice"
            slugs.add(str(slug))
            for key, message in _schedule(schedule):
                yield at.where("schedules", index, key), message
            replaced = schedule.get("replaces")
            if replaced is not None and replaced in {each.get("slug") for each in listed}:
                yield at.where("schedules", index, "replaces"), f"{replaced!r} is still there"
            if replaced is not None and replaced in {each.get("replaces") for each in listed[:index]}:
                yield at.where("schedules", index, "replaces"), f"{replaced!r} is replaced twice"

    def _parameters(self, at: _At) -> Iterator[Finding]:
        if at.flow is None:
            return
        own = _dict(at.config.get("parameters"))
        yield from _parameters(at.flow, own, at.where("parameters"), complete=False)
        for index, schedule in enumerate(_list(at.config.get("schedules"))):
            if isinstance(schedule, dict):
                more = _dict(schedule.get("parameters"))
                where = at.where("schedules", index, "parameters")
                # What is wrong with the deployment's own has been said.
                known = {name: value for name, value in own.items() if name not in _bad(at.flow, own)}
                yield from _parameters(at.flow, {**known, **more}, where, complete=not _bad(at.flow, own))

    def _work_pool(self, at: _At) -> Iterator[Finding]:
        pool = _dict(at.config.get("work_pool"))
        name = pool.get("name")
        if not isinstance(name, str) or placeholders(name):
            return
        if name not in self._templates:
            return
        template = self._templates[name]
        if template is None:
            yield at.where("work_pool", "name"), f"the server has no work pool {name!r}"
            return
        schema = _dict(template.get("variables"))
        variables = _dict(pool.get("job_variables"))
        known = list(_dict(schema.get("properties")))
        for key in variables:
            if key not in known:
                message = f"work pool {name} has no such job variable{_hint(key, known)}"
                yield at.where("work_pool", "job_variables", key), message
        yield from self._job_variables(at, variables, schema)

    def _job_variables(self, at: _At, variables: Mapping[str, Any], schema: dict[str, Any]) -> Iterator[Finding]:
        from prefect.utilities.schema_tools.validation import validate

        literal = {key: value for key, value in variables.items() if not placeholders(value)}
        for error in validate(literal, cast("Any", schema), ignore_required=True, allow_none_with_default=True):
            # Prefect lets each variable with a default be null: of the branches, the first is the variable's own type.
            reason = error.context[0].message if error.context else error.message
            yield at.where("work_pool", "job_variables", *error.absolute_path), reason

    def _secrets(self, at: _At) -> Iterator[Finding]:
        variables = _dict(_dict(at.config.get("work_pool")).get("job_variables"))
        environment = _dict(variables.get("env"))
        for key, value in environment.items():
            if isinstance(value, str) and looks_secret(str(key), value):
                yield (
                    at.where("work_pool", "job_variables", "env", key),
                    (
                        "this looks like a secret in clear: it would stand in the deployment's record; put it into the "
                        "Secret of the flow runs"
                    ),
                )
        try:
            settings_module.reject_unknown([str(key) for key in environment])
        except UsageError as error:
            yield at.where("work_pool", "job_variables", "env"), str(error)
        for key, value in _dict(at.config.get("parameters")).items():
            if isinstance(value, str) and _SECRET_VALUE.search(value):
                yield at.where("parameters", key), "this looks like a secret in clear"

    def check_automations(self, repository: Path, content: automations.ServerFile) -> list[Problem]:
        """Checks automations: Prefect takes them, they have a runbook, and the deployments they name exist."""
        file = automations.read(repository)
        if file is None:
            return []
        ids = {name: automations.stand_in(name) for name in [*self._names, automations.NOTIFY]}
        found = []
        for index, entry in enumerate(content.automations):
            messages: list[tuple[Where, str]] = []
            try:
                core = automations.model(entry, self._owner, ids)
            except ValidationError as error:
                messages += [
                    (_clean(entry.model_dump(), each["loc"]), f"{each['msg'][0].lower()}{each['msg'][1:]}")
                    for each in error.errors()[:1]
                ]
            except ValueError as error:
                messages.append((("actions",), str(error)))
            else:
                messages += list(_unknown(entry.trigger, core.trigger, ("trigger",)))
                for position, (raw, action) in enumerate(zip(entry.actions, core.actions, strict=True)):
                    rest = {key: value for key, value in raw.items() if key != "deployment"}
                    messages += list(_unknown(rest, action, ("actions", position)))
            runbook = f"docs/runbooks/{entry.name}.md"
            if (repository / "docs").is_dir() and not (repository / runbook).is_file():
                messages.append((("name",), f"the runbook {runbook} does not exist"))
            found += [
                Problem(
                    file.name,
                    file.line(("automations", index, *where)),
                    f"automations[{entry.name}]{''.join(f'.{part}' for part in where)}: {message}",
                )
                for where, message in messages
            ]
        return found


def _locate(base: YamlFile, overlay: YamlFile | None, name: str, where: Where) -> tuple[str, int]:
    """File and line of a place in the merged manifest: the overlay's, where it says something about it."""
    if overlay is not None and len(where) > 1:
        rest = where[2:]
        for above in (("deployments", name, *rest), ("every_deployment", *rest)):
            if rest and above in overlay.lines:
                return overlay.name, overlay.lines[above]
        # The overlay may leave deployments out: the positions are others then.
        own = {str(each["name"]): index for index, each in enumerate(base.data["deployments"])}
        where = ("deployments", own[name], *rest)
    return base.name, base.line(where)


def _schedule(schedule: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with one schedule, by key."""
    for key in ("cron", "interval", "rrule", "timezone", "slug"):
        if placeholders(schedule.get(key)):
            yield key, "a schedule is written out, without {{ }}: its reviewers must see it"
            return
    timezone = schedule.get("timezone")
    if isinstance(timezone, str):
        try:
            zoneinfo.ZoneInfo(timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError):
            near = difflib.get_close_matches(timezone, zoneinfo.available_timezones(), n=1)
            hint = f", did you mean {near[0]!r}?" if near else "; one is Europe/Paris"
            yield "timezone", f"{timezone!r} is no timezone{hint}"
            return
    kind = next((key for key in ("cron", "interval", "rrule") if schedule.get(key) is not None), None)
    if kind is None or not isinstance(timezone, str):
        return
    try:
        parsed = schedules.parse({key: schedule[key] for key in schedules.KEYS if key in schedule})
        schedules.next_fires(parsed, dt.datetime.now(dt.UTC), 1)
    except ValidationError as error:
        reasons = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        yield kind, f"{schedule[kind]!r}: {reasons}"
    except (ValueError, TypeError, OverflowError) as error:
        yield kind, f"{schedule[kind]!r}: {error}"


def _parameters(flow: Flow[..., Any], values: Mapping[str, Any], where: Where, *, complete: bool) -> Iterator[Finding]:
    """What is wrong with parameters; `complete`: a run is made of these alone."""
    for name, message in _bad(flow, values).items():
        yield (*where, name), message
    if complete:
        missing = _required(flow) - set(values)
        if missing:
            yield where, f"the flow needs {', '.join(sorted(missing))}: each scheduled run would fail"


def _required(flow: Flow[..., Any]) -> set[str]:
    import inspect

    return {
        name
        for name, parameter in inspect.signature(flow.fn).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }


def _bad(flow: Flow[..., Any], values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters that the flow does not take, with the reason."""
    import inspect
    from typing import get_type_hints

    from pydantic import TypeAdapter

    signature = inspect.signature(flow.fn).parameters
    hints = get_type_hints(flow.fn, include_extras=True)
    bad = {}
    for name, value in values.items():
        if name not in signature:
            bad[name] = f"flow {flow.name} has no such parameter{_hint(name, list(signature))}"
            continue
        if name not in hints or placeholders(value):
            continue
        try:
            TypeAdapter(hints[name], config=None).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            inside = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and "[" not in part)
            reason = first["msg"][0].lower() + first["msg"][1:]
            bad[name] = f"{inside}{': ' if inside else ''}{reason}, not {first['input']!r}"
    return bad


def _unknown(raw: Any, model: Any, where: Where) -> Iterator[Finding]:
    """Keys that a Prefect model silently ignored."""
    if isinstance(raw, dict) and isinstance(model, BaseModel) and not isinstance(model, RootModel):
        known = list(type(model).model_fields)
        for key, value in raw.items():
            if key not in known:
                yield (*where, key), f"unknown key{_hint(str(key), known)}"
            else:
                yield from _unknown(value, getattr(model, key), (*where, key))
    elif isinstance(raw, list) and isinstance(model, list):
        for index, (left, right) in enumerate(zip(raw, model, strict=False)):
            yield from _unknown(left, right, (*where, index))


def looks_secret(name: str, value: str) -> bool:
    """A variable whose name or value says that it is a credential, in clear."""
    if placeholders(value) or not value:
        return False
    named = bool(_SECRET_NAME.search(name)) and not _SECRET_NAME_OF_A_REFERENCE.search(name)
    return named or bool(_SECRET_VALUE.search(value))


def _hint(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def pools(manifest: Any) -> set[str]:
    """Names of the work pools that a prefect file uses."""
    deployments = [each for each in _list(_dict(manifest).get("deployments")) if isinstance(each, dict)]
    names = {_dict(from_environment(each).get("work_pool")).get("name") for each in deployments}
    return {name for name in names if isinstance(name, str) and not placeholders(name)}
