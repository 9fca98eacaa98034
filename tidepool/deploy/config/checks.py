"""Checks of prefect.yaml and automations.yaml: every problem at once, each with its file and line.

`prefect deploy` ignores unknown keys, drops what a misspelt placeholder should have filled in, and finds an invalid
value only when the deployments before it are written. Here both files are checked as a whole before anything is
written; with a server, its work pools, variables and blocks count too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tidepool.deploy.config import (
    automations,
    deployments,
    environments,
    flows,
    form,
    house_rules,
    models,
    placeholders,
    scope,
    yaml_source,
)
from tidepool.deploy.config.scope import Scope
from tidepool.deploy.config.yaml_source import InvalidFileError, Problem, path
from tidepool.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tidepool.deploy.config.deployments import Templates
    from tidepool.deploy.config.house_rules import HouseRules
    from tidepool.deploy.config.yaml_lines import Finding, Place
    from tidepool.deploy.config.yaml_source import YamlFile

FILE = "prefect.yaml"
STEP = "tidepool.deploy.steps.validate"


@dataclass(frozen=True)
class Server:
    """The part of the server that the checks need to know.

    Attributes:
        templates: Base job templates of its work pools, as they will be after an apply; None for a missing pool.
        variables: Names of its Prefect variables; None if they do not matter.
        blocks: Those of the blocks in the prefect file that exist, as `type/name`; None if they do not matter.
    """

    templates: Templates = field(default_factory=dict)
    variables: frozenset[str] | None = None
    blocks: frozenset[str] | None = None


def check(
    repository: Path,
    environment: str = environments.PRODUCTION,
    *,
    owner: str,
    file: Path | None = None,
    server: Server | None = None,
    deploying: bool = False,
    image: str | None = None,
) -> list[Problem]:
    """Return all problems of the files, sorted by file and line.

    Args:
        repository: The folder that holds prefect.yaml.
        environment: production, or an overlay that is checked together with prefect.yaml.
        owner: Owner of the managed deployments: each must carry the tag `managed-by:<owner>`.
        file: A rendered prefect file instead of prefect.yaml.
        server: What the server has; None if it is not known.
        deploying: A deploy follows: environment variables must have their values now.
        image: An existing image, with which the files are rendered.
    """
    rules, found = house_rules.load(repository)
    names: automations.Names | None = None
    try:
        file = file or repository / FILE
        base = yaml_source.read(file, file.name)
    except InvalidFileError as error:
        found.append(error.problem)
        found += _form_of_the_overlay(repository, environment)
    else:
        checker = _Files(repository, owner, rules, base, server, deploying=deploying)
        found += checker.check(environment, image)
        names = checker.names
    return sorted({*found, *automations.check(repository, owner, names, runbooks=rules.runbooks)})


def _form_of_the_overlay(repository: Path, environment: str) -> list[Problem]:
    """Return what is wrong with an overlay, whatever prefect.yaml has: it cannot be read, or has a duplicate key."""
    name = f"environments/{environment}.yaml"
    if environment == environments.PRODUCTION or environment not in environments.names(repository):
        return []
    try:
        return yaml_source.read(repository / name, name).duplicates
    except InvalidFileError as error:
        return [error.problem]


def pools(manifest: Any) -> set[str]:
    """Return the names of the work pools that a prefect file uses."""
    listed = [each for each in _list(_dict(manifest).get("deployments")) if isinstance(each, dict)]
    names = {_dict(placeholders.fill_from_environment(each).get("work_pool")).get("name") for each in listed}
    return {name for name in names if isinstance(name, str) and not placeholders.find(name)}


def _templates_in_git(repository: Path) -> Templates:
    try:
        pools = automations.load(repository).work_pools
        return {pool.name: automations.template(repository, pool) for pool in pools}
    except (UsageError, ValueError, OSError):
        return {}  # automations.check reports it


class _Files:
    """The check of prefect.yaml with the overlay of one environment.

    Attributes:
        names: The deployments in Git, and those whose flow cannot be imported.
    """

    def __init__(
        self,
        repository: Path,
        owner: str,
        rules: HouseRules,
        base: YamlFile,
        server: Server | None,
        *,
        deploying: bool,
    ) -> None:
        self._repository = repository
        self._base = base
        self._overlay: YamlFile | None = None
        server = server or Server()
        in_git, variables = _templates_in_git(repository), automations.variables(repository)
        self._context = deployments.Context(
            repository=repository,
            owner=owner,
            rules=rules,
            scope=Scope(
                declared=tuple(rules.variables),
                may_be_empty=tuple(rules.may_be_empty),
                deploying=deploying,
                variables=None if server.variables is None else server.variables | variables,
                blocks=server.blocks,
            ),
            templates={**in_git, **server.templates},
            runs_an_image=True,
        )
        self.names = automations.Names()

    def check(self, environment: str, image: str | None) -> list[Problem]:
        """Return the problems of the deployments of one environment."""
        data = self._base.data
        found = list(self._base.duplicates)
        if not isinstance(data, dict):
            return [*found, self._base.problem((), f"it must be a mapping, not {type(data).__name__}")]
        overlay: dict[str, Any] = {}
        if environment != environments.PRODUCTION:
            overlay = self._read_overlay(environment, found)
        manifest, positions = environments.assemble(data, overlay, image)
        # Steps of a deployment take the place of the file's.
        listed = _list(data.get("deployments"))
        own_pull = bool(listed) and all("pull" in _dict(each) for each in listed)
        misplaced = models.misplaced(data)
        found += [
            self._base.problem(place, message)
            for place, message in models.findings(models.PrefectFile, data)
            if not (own_pull and place == ("pull",) and "pull" not in data)
            if len(place) <= 2 or place[0] != "deployments"  # noqa: PLR2004 - inside of one, with its overlay below
        ]
        # One mistake is one problem: of steps without the form of steps, the names are not known.
        of_steps = ("build", "push")
        unclear = any(
            each.where.startswith(of_steps) or each.message.endswith(tuple(f"did you mean {key}?" for key in of_steps))
            for each in found
        )
        if not unclear and not any(STEP in _dict(first) for first in _list(manifest.get("build"))[:1]):
            message = f"the first step must be {STEP}: it refuses an invalid file before the first write"
            found.append(self._base.problem(("build",), message))
        after, problems = scope.after_steps(self._repository, manifest, replace(self._context.scope, unclear=unclear))
        for place, message in problems:
            phase, step = str(place[0]), _step(manifest, place)  # without the steps that this environment leaves out
            own = next(index for index, each in enumerate(data[phase]) if each is step)
            found.append(self._base.problem((phase, own, *place[2:]), message))
        self._context = replace(self._context, scope=after, runs_an_image="image" not in overlay)
        names: dict[str, int] = {}
        findings: list[Finding] = []
        for position, config in zip(positions, manifest["deployments"], strict=True):
            for inside, message in self._deployment(position, config, names, found):
                if inside and inside[0] in misplaced and inside[0] not in config:
                    continue  # it stands one level too high, which has been reported
                whole: Place = ("deployments", position, *inside)
                if line := self._line_of_the_overlay(config.get("name"), inside):
                    found.append(Problem(*line, path(whole, {"deployments": {position: config}}), message))
                else:
                    findings.append((whole, message))
        merged = {"deployments": dict(zip(positions, manifest["deployments"], strict=True))}
        found += [
            Problem(self._base.name, line, path(place, merged), message)
            for (place, message), line in zip(findings, self._base.lines.edited(findings), strict=True)
        ]
        return found

    def _read_overlay(self, environment: str, found: list[Problem]) -> dict[str, Any]:
        """Return the content of an overlay, as far as it is right, and add its problems to the found ones."""
        known = environments.names(self._repository)
        name = f"environments/{environment}.yaml"
        if environment not in known:
            found.append(Problem(name, 1, "", f"unknown environment {environment!r}{did_you_mean(environment, known)}"))
            return {}
        try:
            self._overlay = overlay = yaml_source.read(self._repository / name, name)
        except InvalidFileError as error:
            found.append(error.problem)
            return {}
        found += overlay.duplicates
        found += [overlay.problem(*each) for each in environments.problems(self._base.data, overlay.data)]
        return _dict(overlay.data)

    def _deployment(
        self, position: int, config: Mapping[str, Any], names: dict[str, int], found: list[Problem]
    ) -> Iterator[Finding]:
        """Yield the problems of a deployment with their places inside it; what is elsewhere is added to the found.

        `names` has the line of the first deployment of each name.
        """
        of_form = models.findings(models.Deployment, config)
        yield from of_form
        name = config.get("name")
        if name in names:
            first = f"duplicate name (first at line {names[name]})"
            yield ("name",), f"{first}: overlays and commands find a deployment by it, so each is unique"
        # Steps of its own take the place of the file's.
        yield from scope.after_steps(self._repository, {"pull": config.get("pull")}, self._context.scope)[1]
        flow, entrypoint = None, config.get("entrypoint")
        if isinstance(name, str):
            names.setdefault(name, self._base.lines.written(("deployments", position, "name")))
            self.names.unresolved.add(name)
        if isinstance(entrypoint, str) and not placeholders.find(entrypoint):
            flow, problem = flows.find(self._repository, entrypoint)
            if problem:
                yield ("entrypoint",), problem
        found += house_rules.check_runbooks(self._context.rules, self._repository, config)
        if flow is not None:
            self.names.resolve(flow.name, str(name))
            found += house_rules.check_imports(self._context.rules, self._repository, flow)
            found += form.check(self._context.rules, self._repository, flow)
        # One mistake is one problem: what has the wrong form is not looked at again.
        reported = [*(place for place, _ in of_form if place), *models.misspelt(of_form)]
        wrong = [tuple(map(str, place)) for place in reported]  # a key that is a number has become a text
        own_steps = config.get("build") or config.get("push")  # they are refused, and name the placeholders' steps
        seen = replace(self._context, scope=replace(self._context.scope, unclear=True)) if own_steps else self._context
        for place, message in deployments.problems(seen, config, flow):
            own = tuple(map(str, place))
            if not any(own[: len(each)] == each or each[: len(own)] == own for each in wrong):
                yield place, message

    def _line_of_the_overlay(self, name: Any, inside: Place) -> tuple[str, int] | None:
        """Return file and line of a place in a deployment, if the overlay sets the value."""
        if self._overlay is not None:
            for above in (("deployments", name, *inside), ("every_deployment", *inside)):
                if above in self._overlay.lines.of:
                    return self._overlay.name, self._overlay.lines.of[above]
        return None


def _step(manifest: Mapping[str, Any], place: Place) -> Any:
    phase, index = place[:2]
    return manifest[str(phase)][index]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
