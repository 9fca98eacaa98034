"""Checks of prefect.yaml and automations.yaml: every problem at once, each with its file and line.

`prefect deploy` ignores unknown keys, and finds an invalid value only when the deployments before it are written. Here
both files are checked as a whole before anything is written; with a server, its work pools count too.
"""

from __future__ import annotations

import datetime as dt
import re
import zoneinfo
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from tidepool.deploy.config import (
    automations,
    environments,
    flows,
    models,
    placeholders,
    schedules,
    secrets,
    yaml_source,
)
from tidepool.deploy.config.problems import Problem, path
from tidepool.errors import UsageError, did_you_mean, reason
from tidepool.settings import reject_unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from prefect import Flow

    from tidepool.deploy.config.problems import Finding
    from tidepool.deploy.config.yaml_source import Place, YamlFile

FILE = "prefect.yaml"
STEP = "tidepool.deploy.steps.validate"
_RUNBOOK = re.compile(r"docs/runbooks/[A-Za-z0-9._-]+\.md")

Templates = dict[str, "Mapping[str, Any] | None"]
"""Base job template of each work pool; None for a pool that the server does not have."""


def check(
    repository: Path,
    environment: str = environments.PRODUCTION,
    *,
    owner: str,
    file: Path | None = None,
    templates: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> list[Problem]:
    """Return all problems of the files, sorted by file and line.

    Args:
        repository: The folder that holds prefect.yaml.
        environment: production, or an overlay that is checked together with prefect.yaml.
        owner: Owner of the managed deployments: each must carry the tag `managed-by:<owner>`.
        file: A rendered prefect file instead of prefect.yaml.
        templates: Base job templates of the server's work pools, instead of those in Git; None for a pool that the
            server does not have.
    """
    try:
        base = yaml_source.read(file or repository / FILE, file.name if file else FILE)
    except UsageError as error:
        return [Problem(FILE, 1, str(error))]
    found = models.problems(models.PrefectFile, base)
    names: set[str] | None = None
    listed = _dict(base.data).get("deployments")
    if isinstance(listed, list) and all(_dict(each).get("name") for each in listed):
        checker = _Deployments(repository, owner, {**_templates_in_git(repository), **(templates or {})})
        found += checker.check(base, environment if file is None else environments.PRODUCTION)
        names = checker.names
    return sorted({*found, *automations.check(repository, owner, names)})


def pools(manifest: Any) -> set[str]:
    """Return the names of the work pools that a prefect file uses."""
    deployments = [each for each in _list(_dict(manifest).get("deployments")) if isinstance(each, dict)]
    names = {_dict(placeholders.fill_from_environment(each).get("work_pool")).get("name") for each in deployments}
    return {name for name in names if isinstance(name, str) and not placeholders.find(name)}


def _templates_in_git(repository: Path) -> Templates:
    try:
        pools = automations.load(repository).work_pools
        return {pool.name: automations.template(repository, pool) for pool in pools}
    except (UsageError, ValueError, OSError):
        return {}  # automations.check reports it


@dataclass
class _Deployment:
    """A deployment and its position in the file."""

    index: int
    config: Mapping[str, Any]
    flow: Flow[..., Any] | None = None

    @property
    def name(self) -> str:
        return str(self.config["name"])

    def place(self, *rest: str | int) -> Place:
        return ("deployments", self.index, *rest)


class _Deployments:
    """Checks of the deployments, one by one; each method yields places and messages.

    Attributes:
        names: `flow/deployment` of each deployment whose flow could be imported.
    """

    def __init__(self, repository: Path, owner: str, templates: Templates) -> None:
        self._repository = repository
        self._owner = owner
        self._templates = templates
        self.names: set[str] = set()

    def check(self, base: YamlFile, environment: str) -> list[Problem]:
        """Return the problems of the deployments of one environment."""
        manifest = base.data
        overlay: YamlFile | None = None
        found: list[Problem] = []
        if environment == environments.PRODUCTION:
            found += [base.problem(place, message) for place, message in _first_step(manifest)]
        else:
            name = f"environments/{environment}.yaml"
            try:
                manifest = environments.load(self._repository, environment)
            except UsageError as error:
                return [Problem(name, 1, str(error))]
            overlay = yaml_source.read(self._repository / name, name)
            found += overlay.duplicates
        seen: set[str] = set()
        for index, config in enumerate(manifest["deployments"]):
            at = _Deployment(index, placeholders.fill_from_environment(config))
            for place, message in self._deployment(at, seen):
                file, line = _locate(base, overlay, at.name, place)
                found.append(Problem(file, line, f"{path(place, manifest)}: {message}"))
        return found

    def _deployment(self, at: _Deployment, seen: set[str]) -> Iterator[Finding]:
        if at.name in seen:
            yield at.place("name"), "duplicate name: the second deployment would overwrite the first"
        seen.add(at.name)
        tag = automations.owner_tag(self._owner)
        if tag not in _list(at.config.get("tags")):
            yield at.place("tags"), f"missing tag {tag}, which marks the deployment as managed"
        yield from self._runbook(at)
        yield from self._entrypoint(at)
        yield from self._schedules(at)
        yield from self._parameters(at)
        yield from self._work_pool(at)
        yield from self._secrets(at)

    def _runbook(self, at: _Deployment) -> Iterator[Finding]:
        links = _RUNBOOK.findall(str(at.config.get("description") or ""))
        if not links:
            yield at.place("description"), f"no link to a runbook, such as docs/runbooks/{at.name}.md"
        for link in sorted(set(links)):
            if (self._repository / "docs").is_dir() and not (self._repository / link).is_file():
                yield at.place("description"), f"the runbook {link} does not exist"

    def _entrypoint(self, at: _Deployment) -> Iterator[Finding]:
        entrypoint = at.config.get("entrypoint")
        if not isinstance(entrypoint, str):
            return
        if "/" in entrypoint or ":" in entrypoint:
            yield at.place("entrypoint"), f"{entrypoint!r} is a file; use the module: flows.<domain>.flow.<function>"
            return
        try:
            at.flow = flows.load(self._repository, entrypoint)
        except UsageError as error:
            yield at.place("entrypoint"), str(error)
            return
        self.names.add(f"{at.flow.name}/{at.name}")

    def _schedules(self, at: _Deployment) -> Iterator[Finding]:
        listed = [each for each in _list(at.config.get("schedules")) if isinstance(each, dict)]
        slugs: set[str] = set()
        for index, schedule in enumerate(listed):
            slug = schedule.get("slug")
            if slug in slugs:
                yield at.place("schedules", index, "slug"), f"duplicate slug {slug!r}"
            slugs.add(str(slug))
            for key, message in _schedule(schedule):
                yield at.place("schedules", index, key), message
            replaced = schedule.get("replaces")
            if replaced is not None and replaced in {each.get("slug") for each in listed}:
                yield at.place("schedules", index, "replaces"), f"schedule {replaced!r} still exists"
            if replaced is not None and replaced in {each.get("replaces") for each in listed[:index]}:
                yield at.place("schedules", index, "replaces"), f"schedule {replaced!r} is replaced more than once"

    def _parameters(self, at: _Deployment) -> Iterator[Finding]:
        if at.flow is None:
            return
        own = _dict(at.config.get("parameters"))
        invalid = list(_parameters(at.flow, own))
        for inside, message in invalid:
            yield at.place("parameters", *inside), message
        for index, schedule in enumerate(_list(at.config.get("schedules"))):
            more = _dict(_dict(schedule).get("parameters"))
            for inside, message in _parameters(at.flow, more):
                yield at.place("schedules", index, "parameters", *inside), message
            missing = flows.missing_parameters(at.flow, {**own, **more})
            if missing and not invalid:  # an unknown parameter may be the missing one, misspelt
                message = (
                    f"missing {', '.join(sorted(missing))}, which the flow requires: each scheduled run would fail"
                )
                yield at.place("schedules", index, "parameters"), message

    def _work_pool(self, at: _Deployment) -> Iterator[Finding]:
        pool = _dict(at.config.get("work_pool"))
        name = pool.get("name")
        if not isinstance(name, str) or placeholders.find(name):
            return
        if name not in self._templates:
            return
        template = self._templates[name]
        if template is None:
            yield at.place("work_pool", "name"), f"the server has no work pool {name!r}"
            return
        schema = _dict(template.get("variables"))
        variables = _dict(pool.get("job_variables"))
        known = list(_dict(schema.get("properties")))
        for key in variables:
            if key not in known:
                message = f"work pool {name} has no such job variable{did_you_mean(key, known)}"
                yield at.place("work_pool", "job_variables", key), message
        yield from self._job_variables(at, variables, schema)

    def _job_variables(
        self, at: _Deployment, variables: Mapping[str, Any], schema: dict[str, Any]
    ) -> Iterator[Finding]:
        from prefect.utilities.schema_tools.validation import validate

        literal = {key: value for key, value in variables.items() if not placeholders.find(value)}
        for error in validate(literal, cast("Any", schema), ignore_required=True, allow_none_with_default=True):
            # Prefect lets each variable with a default be null: of the branches, the first is the variable's own type.
            message = error.context[0].message if error.context else error.message
            yield at.place("work_pool", "job_variables", *error.absolute_path), message

    def _secrets(self, at: _Deployment) -> Iterator[Finding]:
        looks = "looks like a secret in plain text, which would be stored in the deployment's record"
        environment = _dict(_dict(_dict(at.config.get("work_pool")).get("job_variables")).get("env"))
        for key, value in environment.items():
            if secrets.is_secret_variable(str(key), value):
                message = f"{looks}; move it to the Kubernetes Secret of the flow runs"
                yield at.place("work_pool", "job_variables", "env", key), message
        try:
            reject_unknown([str(key) for key in environment])
        except UsageError as error:
            yield at.place("work_pool", "job_variables", "env"), str(error)
        for key, value in _dict(at.config.get("parameters")).items():
            if secrets.is_secret_value(value):
                yield at.place("parameters", key), looks


def _first_step(manifest: Mapping[str, Any]) -> Iterator[Finding]:
    build = manifest.get("build") or []
    first = next(iter(build[0]), "") if build and isinstance(build[0], dict) else ""
    if first != STEP:
        yield ("build",), f"the first step must be {STEP}: it refuses an invalid file before the first write"


def _locate(base: YamlFile, overlay: YamlFile | None, name: str, place: Place) -> tuple[str, int]:
    """Return file and line of a place in the merged manifest: the overlay's, where the overlay sets the value."""
    if overlay is not None and len(place) > 1:
        rest = place[2:]
        for above in (("deployments", name, *rest), ("every_deployment", *rest)):
            if rest and above in overlay.lines:
                return overlay.name, overlay.lines[above]
        # The overlay may leave deployments out, which shifts the positions.
        own = {str(each["name"]): index for index, each in enumerate(base.data["deployments"])}
        place = ("deployments", own[name], *rest)
    return base.name, base.line(place)


def _schedule(schedule: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the problems of one schedule, by key."""
    for key in ("cron", "interval", "rrule", "timezone", "slug"):
        if placeholders.find(schedule.get(key)):
            yield key, "a schedule cannot contain {{ }}: its reviewers must see the value"
            return
    timezone = schedule.get("timezone")
    if isinstance(timezone, str):
        try:
            zoneinfo.ZoneInfo(timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError):
            hint = did_you_mean(timezone, zoneinfo.available_timezones(), "an example is Europe/Paris")
            yield "timezone", f"unknown timezone {timezone!r}{hint}"
            return
    kind = next((key for key in ("cron", "interval", "rrule") if schedule.get(key) is not None), None)
    if kind is None or not isinstance(timezone, str):
        return
    try:
        parsed = schedules.parse({key: schedule[key] for key in schedules.KEYS if key in schedule})
        schedules.next_runs(parsed, dt.datetime.now(dt.UTC), 1)
    except ValidationError as error:
        reasons = "; ".join(reason(each, show_input=False) for each in error.errors())
        yield kind, f"{schedule[kind]!r}: {reasons}"
    except (ValueError, TypeError, OverflowError) as error:
        yield kind, f"{schedule[kind]!r}: {error}"


def _parameters(flow: Flow[..., Any], values: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the problems of parameters, but for values that a deploy has yet to fill in."""
    for place, message in flows.parameter_problems(flow, values):
        name = str(place[0])
        if name not in flow.parameters.properties or not placeholders.find(values[name]):
            yield place, message


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
