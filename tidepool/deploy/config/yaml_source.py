"""YAML files with the line of each value, so that a problem is reported with its line.

The data is PyYAML's, because `prefect deploy` reads with it. ruamel.yaml knows lines too, but even as YAML 1.1 it
reads `y` as true and `1e5` as a number, where Prefect sees texts: the checks would see other data than the deploy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from tidepool.deploy.config.problems import InvalidFileError, Problem, path

if TYPE_CHECKING:
    from pathlib import Path

# libyaml, where PyYAML was built with it: ten times as fast.
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"

Place = tuple[str | int, ...]
"""The path of a value in a file: keys and list positions, from the top."""


@dataclass(frozen=True)
class YamlFile:
    """A YAML file that was read.

    Attributes:
        name: The file's path from the repository's root, as shown in messages.
        data: The content, as `yaml.safe_load` returns it.
        lines: Line (from 1) of each key and list item; of a value that came by an anchor, the line at the anchor.
        duplicates: A problem for each key that its mapping has already. YAML keeps the last one silently.
    """

    name: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)
    duplicates: list[Problem] = field(default_factory=list)

    def line(self, place: Place) -> int:
        """Return the line of a value; of what would hold it, if it does not exist."""
        return next((self.lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in self.lines), 1)

    def problem(self, place: Place, message: str) -> Problem:
        """Return a problem of a value, with its line and its path."""
        return Problem(self.name, self.line(place), f"{path(place, self.data)}: {message}")


def read(path: Path, name: str) -> YamlFile:
    """Read a YAML file.

    Args:
        path: The file.
        name: Its name in messages.

    Raises:
        InvalidFileError: the file cannot be read or is not valid YAML; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        file = YamlFile(name, data=yaml.load(text, Loader=_LOADER))  # noqa: S506 - it is the safe one
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFileError(Problem(name, 1, f"cannot be read: {error}")) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise InvalidFileError(Problem(name, line, f"invalid YAML: {error.problem or error.context}")) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise InvalidFileError(Problem(name, 1, f"invalid YAML: {' '.join(str(error).split())}")) from error
    if (node := yaml.compose(text, Loader=_LOADER)) is not None:
        _find_lines(file, node, (), set())
    return file


def _find_lines(file: YamlFile, node: yaml.Node, place: Place, visited: set[int]) -> None:
    """Add the lines of a node and of all that it holds to the file."""
    file.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _find_lines(file, item, (*place, index), visited)
    elif isinstance(node, yaml.MappingNode):
        # Merged mappings go first, since a mapping's own keys win; of several merged ones, the first wins.
        for merged in (value for key, value in node.value if key.tag == _MERGE):
            for each in reversed(merged.value) if isinstance(merged, yaml.SequenceNode) else [merged]:
                _find_lines(file, each, place, visited)
        first: dict[Place, int] = {}
        for key, value in ((key, value) for key, value in node.value if key.tag != _MERGE):
            here = (*place, yaml.constructor.SafeConstructor().construct_object(key, deep=True))
            file.lines[here] = key.start_mark.line + 1
            if here in first and id(node) not in visited:  # an anchor's node is visited at each alias
                file.duplicates.append(file.problem(here, f"duplicate key (first at line {first[here]})"))
            first.setdefault(here, file.lines[here])
            _find_lines(file, value, here, visited)
        visited.add(id(node))
