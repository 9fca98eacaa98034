"""YAML files with the line of each value, and the problems of their values, each with file and line.

The data is PyYAML's, because `prefect deploy` reads with it. ruamel.yaml knows lines too, but even as YAML 1.1 it
reads `y` as true and `1e5` as a number, where Prefect sees texts: the checks would see other data than the deploy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import yaml

from tidepool.deploy.config import yaml_lines
from tidepool.deploy.config.yaml_lines import LOADER, Place
from tidepool.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Of a path's last key, the position in a list.
_INDEX = re.compile(r"\[[^]]*\]$")
# Uses of one mistake that its message names.
_NAMED = 3
# An item of a list at the top of a file, such as a deployment, and the rest of the path.
_ITEM = re.compile(r"(\w+\[[^]]*\])\.(.*)")


@dataclass(frozen=True, order=True)
class Problem:
    """One problem.

    Attributes:
        file: Path from the repository's root.
        line: From 1.
        where: Path of the value in the file; empty if the problem is not one of a value.
        message: What is wrong and accepted.
    """

    file: str
    line: int
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.where and f'{self.where}: '}{self.message}"


class InvalidFileError(UsageError):
    """A file that cannot be read, with the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class YamlFile:
    """A YAML file that was read.

    Attributes:
        name: The file's path from the repository's root, as shown in messages.
        data: The content, as `yaml.safe_load` returns it.
        lines: Line of each key and list item.
        duplicates: A problem for each key that its mapping has already. YAML keeps the last one silently.
    """

    name: str
    data: Any
    lines: yaml_lines.Lines = field(default_factory=yaml_lines.Lines)
    duplicates: list[Problem] = field(default_factory=list)

    def line(self, place: Place) -> int:
        """Return the line of a value; of what would hold it, if it does not exist."""
        near = self.lines.nearest(place)
        return 1 if near is None else self.lines.of[near]

    def problem(self, place: Place, message: str) -> Problem:
        """Return a problem of a value, with its line and its path."""
        return Problem(self.name, self.line(place), path(place, self.data), message)


def read_text(path: Path, name: str) -> str:
    """Read a file of text, which messages call by the name.

    Raises:
        InvalidFileError: it cannot be read, or is not in UTF-8; with the line.
    """
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise InvalidFileError(Problem(name, 1, "", f"cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        message = f"cannot be read: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file in UTF-8"
        raise InvalidFileError(Problem(name, line, "", message)) from error


def read(path: Path, name: str) -> YamlFile:
    """Read a YAML file, which messages call by the name.

    Raises:
        InvalidFileError: the file cannot be read or is not valid YAML; with the line.
    """
    text = read_text(path, name)
    try:
        node = yaml.compose(text, Loader=LOADER)
        if node is not None:
            _refuse_misunderstood(node, ())
        data = yaml.load(text, Loader=LOADER)  # noqa: S506 - it is the safe one
    except yaml.MarkedYAMLError as error:
        line, message = _in_words(error, text)
        raise InvalidFileError(Problem(name, line, "", f"invalid YAML: {message}")) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise InvalidFileError(Problem(name, 1, "", f"invalid YAML: {' '.join(str(error).split())}")) from error
    if node is None:
        return YamlFile(name, data)
    file = YamlFile(name, data, yaml_lines.find(text, node))
    for place, line, first in file.lines.duplicates:
        file.duplicates.append(replace(file.problem(place, f"duplicate key (first at line {first})"), line=line))
    return file


# What the parser finds, in words: its problem, text of the line where it found it, and the sentence.
_WORDS = (
    ("cannot start any token", r"^\s*\t", "a line is indented by a tab; use spaces"),
    ("tab character", "", "a line is indented by a tab; use spaces"),
    ("cannot start any token", r"[:\[{,-]\s*[@`%]", "a text cannot begin with @, % or `; put it in quotes"),
    ("expected alphabetic or numeric character", r"\*", '`*` begins an alias; put the text in quotes: "* * * * *"'),
    ("expected alphabetic or numeric character", r"&", "`&` begins an anchor; put the text in quotes"),
    ("could not find expected ':'", "", "no colon after a key, or a text of several lines without quotes"),
    ("mapping values are not allowed", "", "a second colon in one line; put the text in quotes, or begin a new line"),
    ("did not find expected key", "", "the indentation does not fit the lines above, or a quote is not closed"),
    ("did not find expected '-' indicator", "", "the indentation does not fit the items of the list above"),
    ("found unexpected end of stream", "", "a quote is not closed"),
    ("did not find expected ',' or ']'", "", "a list that began with `[` is not closed"),
    ("did not find expected ',' or '}'", "", "a mapping that began with `{` is not closed"),
    ("did not find expected node content", "", "no value where one is expected"),
    ("but found another document", "", "a second document begins (`---`), and Prefect reads one"),
    ("found unhashable key", "", "a list or mapping cannot be a key; put the text in quotes"),
    ("could not determine a constructor", "", "unknown tag; put a text that begins with `!` in quotes"),
)


def _in_words(error: yaml.MarkedYAMLError, text: str) -> tuple[int, str]:
    """Return the line of a parser's error, and what is wrong there."""
    problem = error.problem or error.context or "unknown error"
    # What is not closed is found at the end, and is repaired where it begins.
    unclosed = "end of stream" in problem or "expected ',' or" in problem
    mark = (error.context_mark if unclosed else None) or error.problem_mark or error.context_mark
    lines = text.splitlines()
    index = min(mark.line, len(lines) - 1) if mark and lines else 0
    if "could not find expected ':'" in problem and error.context_mark:
        index = error.context_mark.line
    here = lines[index] if lines else ""
    if "undefined alias" in problem:
        name = re.search(r"\*([\w-]+)", here[mark.column :] if mark else here)
        anchors = sorted(set(re.findall(r"&([\w-]+)", text)))
        alias = name[1] if name else ""
        return index + 1, f"no anchor &{alias} above it{did_you_mean(alias, anchors)}"
    for words, pattern, sentence in _WORDS:
        if words in problem and re.search(pattern, here):
            return index + 1, sentence
    return index + 1, problem


def _refuse_misunderstood(node: yaml.Node, above: tuple[int, ...]) -> None:
    """Refuse `{{ … }}` without quotes, which is a mapping in a mapping, and an alias of what contains it.

    Raises:
        yaml.MarkedYAMLError: with the line.
    """
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="an alias stands inside of its own anchor", problem_mark=node.start_mark)
    inside = (*above, id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.MappingNode):
                message = '`{{ … }}` without quotes is a mapping; write "{{ … }}"'
                raise yaml.MarkedYAMLError(problem=message, problem_mark=key.start_mark)
            _refuse_misunderstood(value, inside)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_misunderstood(item, inside)


def is_inside(problem: Problem, found: Iterable[Problem]) -> bool:
    """Return True if a problem is one of a part of a value that has a problem itself, as an overlay may add a part."""
    return any(
        (each.file, each.line) == (problem.file, problem.line)
        and each.where
        and problem.where.startswith((f"{each.where}.", f"{each.where}["))
        for each in found
    )


def once(problems: Iterable[Problem]) -> list[Problem]:
    """Return problems sorted by file and line, each mistake once.

    What an anchor or an overlay gives to several places is one mistake, with the places that use it. What is wrong at
    the same place of several deployments, in the same words, is one, too: a rule that all of them break.
    """
    uses: dict[tuple[str, int, str, str], list[Problem]] = {}
    for each in sorted(set(problems)):
        key = each.where.rpartition(".")[2]
        uses.setdefault((each.file, each.line, _INDEX.sub("", key), each.message), []).append(each)
    mistakes: dict[tuple[str, int, str, str], list[Problem]] = {}
    for (file, line, _, message), found in uses.items():
        item = _ITEM.fullmatch(found[0].where)
        mistakes.setdefault((file, 0 if item else line, item[2] if item else found[0].where, message), []).extend(found)
    return [replace(first, message=f"{first.message}{_also(first, others)}") for first, *others in mistakes.values()]


def _also(first: Problem, others: list[Problem]) -> str:
    """Return the other places of a problem as an addition to its message: the deployments, if they are others."""
    owners = {_owner(each): each.line for each in reversed(others)}
    owners.pop(_owner(first), None)
    named = list(reversed(owners.items())) or [(each.where, each.line) for each in others]
    shown = [name if line == first.line else f"{name} at line {line}" for name, line in named[:_NAMED]]
    if more := named[_NAMED:]:
        lines = sorted({line for _, line in more} - {first.line})
        at = f" at line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines))}" if lines else ""
        shown[-1] += f" and {len(more)} more{at}"
    return f" (also in {', '.join(shown)})" if shown else ""


def _owner(problem: Problem) -> str:
    item = _ITEM.fullmatch(problem.where)
    return item[1] if item else problem.where.partition(".")[0]


def raise_if_any(problems: Iterable[Problem], consequence: str = "") -> None:
    """Refuse files that have problems.

    Args:
        problems: All of them.
        consequence: What did not happen therefore, such as `nothing was written`.

    Raises:
        UsageError: all problems, one per line, below their number.
    """
    if found := once(problems):
        count = f"{len(found)} problem{'' if len(found) == 1 else 's'}{consequence and f'; {consequence}'}:"
        raise UsageError("\n".join([count, *(f"  {problem}" for problem in found)]))


def path(place: Place, data: Any = None) -> str:
    """Return a place as people write it: `deployments[csv-etl].work_pool.name`.

    An item of a list in the data that has a name is shown with it instead of its position.
    """
    text = ""
    for part in place:
        data = data[part] if _holds(data, part) else None
        if isinstance(part, int):
            name = data.get("name") if isinstance(data, dict) else None
            text += f"[{name}]" if name and isinstance(name, str) else f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text or "the file"


def place_in(data: Any, location: tuple[int | str, ...]) -> Place:
    """Return pydantic's location of an error in the data as a place: without the branches of unions."""
    place: list[int | str] = []
    for index, part in enumerate(location):
        if _holds(data, part):
            data = data[part]
        elif index < len(location) - 1 or not isinstance(data, dict) or not str(part).isidentifier():
            continue  # it is not a missing key, which is the last part
        place.append(part)
    return tuple(place)


def _holds(data: Any, part: int | str) -> bool:
    return (isinstance(data, dict) and part in data) or (isinstance(data, list) and part in range(len(data)))
