"""`tidepool new`: a flow with everything that belongs to it, which runs at once and is then changed.

Everything is checked and rendered before the first file is written. If a file cannot be written, or the result does not
pass `tidepool validate`, every file is as it was.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import keyword
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidepool.author import prefect_file
from tidepool.deploy.config import checks, environments, house_rules, schedules, yaml_source
from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tidepool.author import Kind
    from tidepool.deploy.config.house_rules import HouseRules
    from tidepool.deploy.config.yaml_source import YamlFile

_TEMPLATES = [Path(__file__).parent / folder for folder in ("templates", "repository")]
# What Kubernetes and file names take. Longer ones would not fit in the lines of the templates.
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST = 40
_TAG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_URL = "TIDEPOOL_REPOSITORY_URL"
# Ending of a file that takes the place of another one.
_NEW = ".tidepool-new"
_ROW = re.compile(r"\| \[`([^`]+)`\]")


@dataclass(frozen=True)
class Order:
    """The flow that is asked for.

    Attributes:
        name: Its name, and that of its deployment: `daily-orders`.
        kind: Where its work is done: in the flow's process, in mapped tasks, in batches of items, in a Dask dataframe.
        cron: Its schedule; empty for runs on request only.
        timezone: Of the schedule.
        tags: Values of tags, such as `owner`, by their keys; only those that are given.
    """

    name: str
    kind: Kind = "plain"
    cron: str = ""
    timezone: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The name of its package and of its function."""
        return self.name.replace("-", "_")


def new(repository: Path, order: Order) -> list[str]:
    """Write the files of a new flow.

    Args:
        repository: The folder that holds prefect.yaml.
        order: The flow.

    Returns:
        The files that were created or changed, relative to the repository.

    Raises:
        UsageError: something is wrong with the order or with the repository; no file was changed.
    """
    rules, problems = house_rules.load(repository)
    yaml_source.raise_if_any(problems, "nothing was written")
    file = yaml_source.read(repository / checks.FILE, checks.FILE)
    if not isinstance(file.data, dict) or not environments.deployment_names(file.data):
        raise UsageError(f"{file.name}: there is no deployment yet whose work pool could be used; write the first one")
    _check(order, rules, file)
    _validate(repository, "nothing was written; repair them first")
    texts = _texts(repository, order, rules, file)
    with _all_or_none(repository, texts):
        _validate(repository, "nothing was written")
    return list(texts)


def refusal(name: str, house_rule: str = "") -> str:
    """Return what a name of a flow or a repository has to be, if this one is not; otherwise nothing.

    Args:
        name: The name.
        house_rule: A regular expression that it has to match, too.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        return f"lower-case letters, digits and single hyphens, a letter first, at most {_LONGEST} characters"
    if house_rule and not re.fullmatch(house_rule, name):
        return f"{house_rule} (`names` of [tool.tidepool])"
    return ""


def _check(order: Order, rules: HouseRules, file: YamlFile) -> None:
    """Refuse what is wrong with an order.

    Raises:
        UsageError: with the option, and what is accepted.
    """
    name, known = order.name, environments.deployment_names(file.data)
    if accepted := refusal(name, rules.names):
        raise UsageError(f"invalid name {name!r}: {accepted}; for example daily-orders")
    if name in known:
        raise UsageError(f"{file.name}:{file.line(('deployments', known.index(name)))}: {name} exists already")
    if order.timezone and not order.cron:
        raise UsageError("--timezone is that of a schedule: give --cron, too")
    schedule = {"slug": "regular", "cron": order.cron, "timezone": order.timezone or "UTC"}
    if order.cron and (found := list(schedules.problems(schedule, datetime.now(UTC)))):
        raise UsageError("; ".join(f"--{key}: {message}" for key, message in found))
    _check_tags(order, rules, file)


def _check_tags(order: Order, rules: HouseRules, file: YamlFile) -> None:
    for key, value in order.tags.items():
        if not _TAG.fullmatch(value):
            raise UsageError(f"--{key}: {value!r} is not accepted: lower-case letters, digits and single hyphens")
    for key in rules.tags:
        if key not in order.tags:
            # Whether the file is valid is known later.
            listed = [each.get("tags") for each in file.data["deployments"] if isinstance(each, dict)]
            used = [str(tag) for tags in listed if isinstance(tags, list) for tag in tags]
            values = sorted({tag.removeprefix(f"{key}:") for tag in used if tag.startswith(f"{key}:")})
            known = f"in use: {', '.join(values) or 'none'}"
            raise UsageError(f"--{key} is missing, a tag that [tool.tidepool] asks for; {known}")


def _validate(repository: Path, consequence: str) -> None:
    owner = settings().deploy.owner
    found = {each for name in environments.names(repository) for each in checks.check(repository, name, owner=owner)}
    yaml_source.raise_if_any(found, consequence)


def _texts(repository: Path, order: Order, rules: HouseRules, file: YamlFile) -> dict[str, str]:
    """Return the content of each new or changed file, by its path in the repository.

    Raises:
        UsageError: a file exists already, or prefect.yaml has an unusual form.
    """
    name, module = order.name, order.module
    runbook = f"docs/runbooks/{name}.md" if rules.runbooks else ""
    sample = f"samples/{name}.csv"
    common = {"name": name, "module": module, "kind": order.kind, "sample": sample, "runbook": runbook}
    when = f"`{order.cron}` ({order.timezone or 'UTC'})" if order.cron else "On request"
    created = flow_files(common, when, rules.runbook_headings)
    if taken := [each for each in [f"flows/{module}", *created] if (repository / each).exists()]:
        raise UsageError(f"{taken[0]} exists already; choose another name, nothing was written")
    if not (repository / "flows" / "__init__.py").exists():
        created = {"flows/__init__.py": '"""The flows, a package for each domain."""\n', **created}
    text = (repository / file.name).read_bytes().decode()  # with its own ends of lines
    changed = {file.name: prefect_file.add(text, file, _deployment(order, rules, file, text, common))}
    readme = repository / "README.md"
    if readme.is_file() and (table := _with_row(readme.read_bytes().decode(), order, runbook, when)):
        changed["README.md"] = table
    return {**created, **changed}


def flow_files(common: Mapping[str, Any], when: str, headings: list[str]) -> dict[str, str]:
    """Return the content of each file that belongs to one flow only, by its path in the repository.

    Args:
        common: Values of the templates: `name`, `module`, `kind`, and the paths `sample` and `runbook` (may be empty).
        when: The schedule in words.
        headings: Of the runbook.

    Raises:
        UsageError: the name has another meaning in Python or in the flow's module.
    """
    name, module = common["name"], common["module"]
    if keyword.iskeyword(module) or hasattr(builtins, module):
        raise UsageError(f"invalid name {name!r}: it is a word of Python; the flow's function has that name")
    created = {
        f"flows/{module}/__init__.py": f'"""{name}: the mean of each group of a CSV."""\n',
        f"flows/{module}/flow.py": render("flow.py", common),
        f"flows/{module}/transform.py": render("transform.py", common),
        common["sample"]: render("sample.csv", common),
        f"tests/unit/test_{module}_transform.py": render("test_transform.py", common),
        f"tests/integration/test_{module}_flow.py": render("test_flow.py", common),
    }
    if runbook := common["runbook"]:
        created[runbook] = render("runbook.md", {**common, "when": when, "headings": headings})
    _refuse_shadowing(name, module, created[f"flows/{module}/flow.py"])
    return created


def _deployment(order: Order, rules: HouseRules, file: YamlFile, text: str, common: Mapping[str, Any]) -> str:
    columns = dict(order.tags) if rules.tag_row else {}
    if runbook := common["runbook"]:
        # Without the variable, a deploy would need a value for it.
        link = f"{{{{ ${_URL} }}}}/{runbook}" if _URL in {*rules.may_be_empty, *rules.variables} else runbook
        columns["runbook"] = f"[{runbook}]({link})"
    tags = ", ".join([f"managed-by:{settings().deploy.owner}", *(f"{key}:{each}" for key, each in order.tags.items())])
    values = {
        **common,
        "columns": columns,
        "tags": f"[{tags}]",
        "cron": order.cron,
        "timezone": order.timezone or "UTC",
        "version": prefect_file.usual(text, file, "version"),
        "concurrency_limit": prefect_file.usual(text, file, "concurrency_limit"),
        # `after_outage` chooses among scheduled runs.
        "work_pool": prefect_file.usual(
            text,
            file,
            "work_pool",
            lambda pool: bool(order.cron) or "after_outage" not in (pool.get("job_variables") or {}),
        ),
    }
    return render("deployment.yaml", values)


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return the text of a template of `templates/` or `repository/`, which is named without its ending."""
    import jinja2

    # Brackets: braces are those of Python and of Prefect's own placeholders.
    given = jinja2.Environment(  # noqa: S701 - the texts are Python, YAML and Markdown, not HTML
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        block_start_string="[%",
        block_end_string="%]",
        variable_start_string="[[",
        variable_end_string="]]",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return given.get_template(f"{template}.jinja").render(values)


def _refuse_shadowing(name: str, module: str, flow: str) -> None:
    """Refuse a name that the flow's module has for something else, such as `report`.

    Raises:
        UsageError: it does.
    """
    bound = [
        each
        for node in ast.parse(flow).body
        for each in (
            [alias.asname or alias.name for alias in node.names]
            if isinstance(node, ast.Import | ast.ImportFrom)
            else [getattr(node, "name", "")]
        )
    ]
    if bound.count(module) > 1:
        raise UsageError(f"invalid name {name!r}: the flow's module uses {module} for something else")


def _with_row(readme: str, order: Order, runbook: str, when: str) -> str:
    """Return the README with one more row in its table of deployments; empty if it has no such table."""
    lines = readme.splitlines(keepends=True)
    rows = [index for index, line in enumerate(lines) if _ROW.match(line)]
    if not rows or not runbook:
        return ""
    first = rows[0]
    rows = [index for offset, index in enumerate(rows) if index == first + offset]  # those of the first table
    names = [match[1] for index in rows if (match := _ROW.match(lines[index]))]
    place = next((index for index, name in zip(rows, names, strict=True) if name > order.name), rows[-1] + 1)
    when = when[:1].lower() + when[1:]
    end = "\r\n" if "\r\n" in readme else "\n"
    lines.insert(place, f"| [`{order.name}`]({runbook}) | {when} | computes the mean of each group of a CSV |{end}")
    return "".join(lines)


@contextmanager
def _all_or_none(repository: Path, texts: Mapping[str, str]) -> Iterator[None]:
    """Write files for a block; if one cannot be written or the block raises, each is as it was.

    Raises:
        TidepoolError: one cannot be written.
    """
    paths = {repository / name: text.encode() for name, text in texts.items()}
    before = {path: path.read_bytes() for path in paths if path.exists()}
    folders: list[Path] = []
    prepared: list[Path] = []
    replaced: list[Path] = []
    try:
        for path, content in paths.items():
            folders += _make_folder(path.parent)
            prepared.append(_beside(path))
            _prepare(path, content)
        for path in paths:
            _beside(path).replace(path)
            replaced.append(path)
        importlib.invalidate_caches()
        yield
    except BaseException as error:
        for path in replaced:
            if path in before:
                _prepare(path, before[path]).replace(path)
            else:
                path.unlink()
        for path in prepared:
            path.unlink(missing_ok=True)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # with the bytecode that the validation has left there
        if isinstance(error, OSError) and len(replaced) < len(paths):
            place = os.path.relpath(error.filename or repository, repository).replace(_NEW, "")
            raise TidepoolError(f"{place} cannot be written: {error.strerror}; nothing was written") from error
        raise


def _prepare(path: Path, content: bytes) -> Path:
    """Write a file beside the one that it will replace; return its path."""
    beside = _beside(path)
    beside.write_bytes(content)
    if path.exists():
        shutil.copymode(path, beside)
    return beside


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}{_NEW}")


def _make_folder(folder: Path) -> list[Path]:
    """Create a folder and those above it that are missing; return the topmost of these."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[-1:]
