"""Rules that a repository sets for its own deployments: `[tool.tidepool]` in its pyproject.toml (docs/validate.md)."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from tidepool.deploy.config.yaml_source import InvalidFileError, Problem, read_text
from tidepool.errors import did_you_mean, reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect import Flow

    from tidepool.deploy.config.yaml_lines import Finding

FILE = "pyproject.toml"
_RUNBOOK = re.compile(r"docs/runbooks/[A-Za-z0-9._-]+\.md")
_HEADING = re.compile(r"^## +(.+?)\s*$", re.MULTILINE)


class HouseRules(BaseModel):
    """The settings of `[tool.tidepool]`. Without them, only what Prefect and tidepool need is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    variables: list[str] = []
    """Environment variables that prefect.yaml may name besides the settings of tidepool."""
    may_be_empty: list[str] = []
    """Environment variables that may be empty or unset when prefect.yaml is deployed."""
    required: list[str] = []
    """Keys that each deployment must have, such as `version`."""
    tags: list[str] = []
    """Keys of tags: each deployment has exactly one tag `<key>:<value>` of each."""
    tag_row: bool = False
    """The description has a row of a table that begins with the values of these tags, in this order."""
    enforce_parameter_schema: bool = False
    """`enforce_parameter_schema: false` is refused: the server would accept runs that fail at once."""
    image_by_digest: bool = False
    """The image of a deployment is pinned by digest, or is the output of a step that pins it."""
    names: str = ""
    """Regular expression that the names of deployments and the slugs of schedules match."""
    timezones: bool = False
    """Each schedule has a timezone; without one it is in UTC."""
    runbooks: bool = False
    """The description of a deployment links to a runbook in docs/runbooks, and each automation has one."""
    runbook_headings: list[str] = []
    """Headings of the second level that each runbook has, in this order."""
    parameter_descriptions: bool = False
    """Each parameter of a flow has a description in the docstring's `Args:`, which the form in the UI shows."""
    late_imports: list[str] = []
    """Packages that a flow's module must not import when it is imported itself, but in the functions that use them."""

    @field_validator("names")
    @classmethod
    def _is_a_pattern(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
        return value


def load(repository: Path) -> tuple[HouseRules, list[Problem]]:
    """Return the rules of a repository, and the problems of its pyproject.toml; without the file, the defaults.

    A key that is wrong has its default, and the others are checked.
    """
    path = repository / FILE
    if not path.is_file():
        return HouseRules(), []
    try:
        text = read_text(path, FILE)
        given: Any = tomllib.loads(text)
    except InvalidFileError as error:
        return HouseRules(), [error.problem]
    except tomllib.TOMLDecodeError as error:
        return HouseRules(), [Problem(FILE, 1, "", f"cannot be read: {error}")]
    for key in ("tool", "tidepool"):
        given = given.get(key, {})
        if not isinstance(given, dict):
            return HouseRules(), [Problem(FILE, 1, key, f"must be a table, not {given!r}")]
    found: list[Problem] = []
    try:
        return HouseRules.model_validate(given), found
    except ValidationError as error:
        for each in error.errors():
            key = str(each["loc"][0]) if each["loc"] else ""
            unknown = each["type"] == "extra_forbidden"
            known = sorted(HouseRules.model_fields)
            message = f"unknown key{did_you_mean(key, known)}" if unknown else reason(each)
            found.append(Problem(FILE, _line(text, key), f"tool.tidepool.{key}", message))
        wrong = {each["loc"][0] for each in error.errors() if each["loc"]}
        return HouseRules.model_validate({key: each for key, each in given.items() if key not in wrong}), found


def check(rules: HouseRules, repository: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what in a deployment breaks the rules, with its place inside the deployment."""
    for key in rules.required:
        if not config.get(key):
            yield (key,), f"missing: `required` of [tool.tidepool] in {FILE} asks for it"
    if rules.enforce_parameter_schema and config.get("enforce_parameter_schema") is False:
        yield ("enforce_parameter_schema",), "must not be false: the server would accept runs that fail at once"
    yield from _tags(rules, config)
    yield from _names(rules, config)
    if rules.runbooks:
        links = _RUNBOOK.findall(str(config.get("description") or ""))
        if not links:
            yield ("description",), f"no link to a runbook, such as docs/runbooks/{config.get('name') or '<name>'}.md"
        for link in sorted(set(links)):
            # The image has the files that a deploy needs, and no documentation.
            if (repository / "docs").is_dir() and not (repository / link).is_file():
                yield ("description",), f"the runbook {link} does not exist"


def _tags(rules: HouseRules, config: Mapping[str, Any]) -> Iterator[Finding]:
    listed = config.get("tags")
    tags = [str(tag) for tag in listed] if isinstance(listed, list) else []
    values = []
    for key in rules.tags:
        own = [tag.removeprefix(f"{key}:") for tag in tags if tag.startswith(f"{key}:")]
        values += own
        if len(own) != 1:
            yield ("tags",), f"needs exactly one tag {key}:…, not {len(own)}"
    row = "| " + " | ".join(values) + " |"
    if rules.tag_row and len(values) == len(rules.tags) and row not in str(config.get("description") or ""):
        yield ("description",), f"no row {row!r} of a table, as the tags have it"


def _names(rules: HouseRules, config: Mapping[str, Any]) -> Iterator[Finding]:
    listed = config.get("schedules")
    schedules = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    named: list[Finding] = [(("name",), str(config.get("name") or ""))]
    for index, schedule in enumerate(schedules):
        named.append((("schedules", index, "slug"), str(schedule.get("slug") or "")))
        if rules.timezones and not schedule.get("timezone"):
            yield ("schedules", index, "timezone"), "missing: `timezones` of [tool.tidepool] asks for it"
    for place, name in named:
        if name and rules.names and not re.fullmatch(rules.names, name):
            yield place, f"{name!r} does not match {rules.names}, `names` of [tool.tidepool]"


def check_runbooks(rules: HouseRules, repository: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the headings that the runbooks of a deployment lack."""
    for link in sorted(set(_RUNBOOK.findall(str(config.get("description") or "")))):
        page = repository / link
        if not rules.runbook_headings or not page.is_file():
            continue
        try:
            headings = _HEADING.findall(read_text(page, link))
        except InvalidFileError as error:
            yield error.problem
            continue
        missing = [each for each in rules.runbook_headings if each not in headings]
        if missing:
            yield Problem(link, 1, "", f"missing heading {', '.join(f'`## {each}`' for each in missing)}")
        elif [each for each in headings if each in rules.runbook_headings] != rules.runbook_headings:
            yield Problem(link, 1, "", f"the order of headings is {', '.join(rules.runbook_headings)}")


def check_imports(rules: HouseRules, repository: Path, flow: Flow[..., Any]) -> Iterator[Problem]:
    """Yield the imports of slow packages that each run of a flow begins with, in its module and those it imports."""
    if rules.late_imports:
        path = Path(inspect.unwrap(flow.fn).__code__.co_filename)
        yield from _early_imports(rules, repository, path, set())


def _early_imports(rules: HouseRules, repository: Path, path: Path, visited: set[Path]) -> Iterator[Problem]:
    if path in visited or not path.is_relative_to(repository) or ".venv" in path.parts:
        return
    visited.add(path)
    try:
        body = ast.parse(path.read_bytes()).body  # in its own encoding
    except (SyntaxError, ValueError):  # the flow, which has been imported, does without it
        return
    for line, module in _imported(body):
        if (package := module.split(".")[0]) in rules.late_imports:
            message = f"each run of the flow would begin with the import of {package}: import it in the function that "
            yield Problem(str(path.relative_to(repository)), line, "", f"{message}uses it")
        base = repository / module.replace(".", "/")
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                yield from _early_imports(rules, repository, file, visited)


def _imported(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Yield line and name of each module that statements import when they are executed."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{each.name}") for each in node.names if node.module)
        elif isinstance(node, ast.Try):
            yield from _imported([*node.body, *(each for handler in node.handlers for each in handler.body)])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _imported([*node.body, *node.orelse])


def _line(text: str, key: str) -> int:
    """Return the line of a key of `[tool.tidepool]`; of the table, if the key is not found."""
    lines = text.splitlines()
    table = next((index for index, line in enumerate(lines) if line.strip() == "[tool.tidepool]"), 0)
    wanted = re.compile(rf'"?{re.escape(key)}"?\s*=')
    return next((index + 1 for index, line in enumerate(lines) if index > table and wanted.match(line)), table + 1)
