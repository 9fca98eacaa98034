"""Checks of prefect.yaml and automations.yaml: every problem at once, each with its file and line.

`prefect deploy` ignores unknown keys, and finds an invalid value only when the deployments before it are written. Here
both files are checked as a whole before anything is written; with a server, its work pools count too.
"""

from __future__ import annotations

import datetime as dt
import re
import zoneinfo
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from tidepool.deploy.config import (
    automations,
    environments,
    flows,
    models,
    placeholders,
    schedules,
    yaml_source,
)
from tidepool.deploy.config.yaml_source import InvalidFileError, Problem, path
from tidepool.errors import UsageError, did_you_mean, reason
from tidepool.settings import reject_unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from prefect import Flow

    from tidepool.deploy.config.yaml_source import Finding, Place, YamlFile

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
    templates: Templates | None = None,
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
        file = file or repository / FILE
        base = yaml_source.read(file, file.name)
    except InvalidFileError as error:
        return [error.problem]
    found = models.problems(models.PrefectFile, base)
    names: set[str] | None = None
    listed = _dict(base.data).get("deployments")
    if isinstance(listed, list) and all(_dict(each).get("name") for each in listed):
        checker = _Deployments(repository, owner, {**_templates_in_git(repository), **(templates or {})})
        found += checker.check(base, environment)
        names = checker.names
    return sorted({*found, *automations.check(repository, owner, names)})


def pools(manifest: Any) -> set[str]:
    """Return the names of the work pools that a prefect file uses."""
    deployments = [each for each in _list(_dict(manifest).get("deployments")) if isinstance(each, dict)]
    names = {_dict(placeholders.fill_from_environment(each), "work_pool").get("name") for each in deployments}
    return {name for name in names if isinstance(name, str) and not placeholders.find(name)}


def _templates_in_git(repository: Path) -> Templates:
    try:
        pools = automations.load(repository).work_pools
        return {pool.name: automations.template(repository, pool) for pool in pools}
    except (UsageError, ValueError, OSError):
        return {}  # automations.check reports it


class _Deployments:
    """Checks of the deployments, one by one; `names` are those (`flow/name`) whose flow could be imported."""

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
            if not any(STEP in _dict(first) for first in _list(manifest.get("build"))[:1]):
                message = f"the first step must be {STEP}: it refuses an invalid file before the first write"
                found.append(base.problem(("build",), message))
        else:
            name = f"environments/{environment}.yaml"
            try:
                manifest = environments.load(self._repository, environment)
                overlay = yaml_source.read(self._repository / name, name)
            except InvalidFileError as error:
                return [error.problem]
            except UsageError as error:
                return [Problem(name, 1, str(error))]
            found += overlay.duplicates
        names = environments.deployment_names(manifest)
        for index, config in enumerate(manifest["deployments"]):
            problems = list(self._deployment(placeholders.fill_from_environment(config)))
            if names[index] in names[:index]:
                problems.append((("name",), "duplicate name: the second deployment would overwrite the first"))
            for inside, message in problems:
                place = ("deployments", index, *inside)
                file, line = _locate(base, overlay, names[index], place)
                found.append(Problem(file, line, f"{path(place, manifest)}: {message}"))
        return found

    def _deployment(self, config: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield the problems of a deployment, each with its place inside the deployment."""
        tag = automations.owner_tag(self._owner)
        if tag not in _list(config.get("tags")):
            yield ("tags",), f"missing tag {tag}, which marks the deployment as managed"
        links = _RUNBOOK.findall(str(config.get("description") or ""))
        if not links:
            yield ("description",), f"no link to a runbook, such as docs/runbooks/{config['name']}.md"
        for link in sorted(set(links)):
            if (self._repository / "docs").is_dir() and not (self._repository / link).is_file():
                yield ("description",), f"the runbook {link} does not exist"
        entrypoint = config.get("entrypoint")
        if isinstance(entrypoint, str):  # else the models report it
            try:
                flow = self._flow(entrypoint)
            except UsageError as error:
                yield ("entrypoint",), str(error)
            else:
                self.names.add(f"{flow.name}/{config['name']}")
                yield from _parameters(flow, config)
        yield from _schedules(config)
        yield from self._work_pool(config)
        yield from _secrets(config)

    def _flow(self, entrypoint: str) -> Flow[..., Any]:
        if "/" in entrypoint or ":" in entrypoint:
            raise UsageError(f"{entrypoint!r} is a file; use the module: flows.<domain>.flow.<function>")
        return flows.load(self._repository, entrypoint)

    def _work_pool(self, config: Mapping[str, Any]) -> Iterator[Finding]:
        from prefect.utilities.schema_tools.validation import validate

        pool = _dict(config, "work_pool")
        name = pool.get("name")
        if not isinstance(name, str) or name not in self._templates:
            return
        template = self._templates[name]
        if template is None:
            yield ("work_pool", "name"), f"the server has no work pool {name!r}"
            return
        schema = _dict(template, "variables")
        variables = _dict(pool, "job_variables")
        known = list(_dict(schema, "properties"))
        for key in variables:
            if key not in known:
                message = f"work pool {name} has no such job variable{did_you_mean(key, known)}"
                yield ("work_pool", "job_variables", key), message
        literal = {key: value for key, value in variables.items() if not placeholders.find(value)}
        for error in validate(literal, cast("Any", schema), ignore_required=True, allow_none_with_default=True):
            # Prefect lets each variable with a default be null: of the branches, the first is the variable's own type.
            message = error.context[0].message if error.context else error.message
            yield ("work_pool", "job_variables", *error.absolute_path), message
        defaults = {key: _dict(each).get("default") for key, each in _dict(schema, "properties").items()}
        for key, message in _policies(variables, {**defaults, **variables}, scheduled=bool(config.get("schedules"))):
            yield ("work_pool", "job_variables", key), message


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


def _schedules(config: Mapping[str, Any]) -> Iterator[Finding]:
    listed = [_dict(each) for each in _list(config.get("schedules"))]
    slugs = [each.get("slug") for each in listed]
    replacements = [each.get("replaces") for each in listed]
    for index, (schedule, slug, replaced) in enumerate(zip(listed, slugs, replacements, strict=True)):
        if slug is not None and slug in slugs[:index]:
            yield ("schedules", index, "slug"), f"duplicate slug {slug!r}"
        for key, message in _schedule(schedule):
            yield ("schedules", index, key), message
        if replaced is not None and replaced in slugs:
            yield ("schedules", index, "replaces"), f"schedule {replaced!r} still exists"
        if replaced is not None and replaced in replacements[:index]:
            yield ("schedules", index, "replaces"), f"schedule {replaced!r} is replaced more than once"


def _parameters(flow: Flow[..., Any], config: Mapping[str, Any]) -> Iterator[Finding]:
    own = _dict(config, "parameters")
    invalid = list(_parameter_problems(flow, own))
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


def _secrets(config: Mapping[str, Any]) -> Iterator[Finding]:
    looks = "looks like a secret in plain text, which would be stored in the deployment's record"
    environment = _dict(config, "work_pool", "job_variables", "env")
    for key, value in environment.items():
        if placeholders.is_secret(value, str(key)):
            message = f"{looks}; move it to the Kubernetes Secret of the flow runs"
            yield ("work_pool", "job_variables", "env", key), message
    try:
        reject_unknown([str(key) for key in environment])
    except UsageError as error:
        yield ("work_pool", "job_variables", "env"), str(error)
    for key, value in _dict(config, "parameters").items():
        if placeholders.is_secret(value):
            yield ("parameters", key), looks


def _locate(base: YamlFile, overlay: YamlFile | None, name: str, place: Place) -> tuple[str, int]:
    """Return file and line of a place in the merged manifest: the overlay's, where the overlay sets the value."""
    if overlay is not None:
        inside = place[2:]
        for above in (("deployments", name, *inside), ("every_deployment", *inside)):
            if above in overlay.lines:
                return overlay.name, overlay.lines[above]
        # The overlay may leave deployments out, which shifts the positions.
        own = {name: index for index, name in enumerate(environments.deployment_names(base.data))}
        place = ("deployments", own[name], *inside)
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
        schedules.next_runs(schedules.parse(schedule), dt.datetime.now(dt.UTC), 1)
    except ValidationError as error:
        reasons = "; ".join(reason(each, show_input=False) for each in error.errors())
        yield kind, f"{schedule[kind]!r}: {reasons}"
    except (ValueError, TypeError, OverflowError) as error:
        yield kind, f"{schedule[kind]!r}: {error}"


def _dict(value: Any, *keys: str) -> dict[str, Any]:
    """Return the mapping below these keys of a value; empty where there is none."""
    for key in keys:
        value = _dict(value).get(key)
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
