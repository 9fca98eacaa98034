"""YAML that remembers where each value stands, so that a problem can be shown with its line.

Beyond what `yaml.safe_load` reads, it notices a key that is written twice, where YAML silently keeps the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# libyaml, where PyYAML was built with it: ten times as fast.
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Where = tuple[str | int, ...]
"""The way to a value: keys and list positions, from the top of the file."""


@dataclass(frozen=True)
class YamlFile:
    """A YAML file that was read.

    Attributes:
        name: The file's path from the repository's root, as a person knows it.
        data: What `yaml.safe_load` gives, with merge keys and anchors resolved.
        lines: Line (from 1) of each key and list item. A value that came by an anchor stands where the anchor is.
        repeated: Keys that are written twice in one mapping.
    """

    name: str
    data: Any
    lines: Mapping[Where, int]
    repeated: tuple[Where, ...]

    def line(self, where: Where) -> int:
        """The line of a value; of what holds it, if it does not exist."""
        for length in range(len(where), -1, -1):
            if where[:length] in self.lines:
                return self.lines[where[:length]]
        return 1


def read(path: Path, name: str) -> YamlFile:
    """Reads a YAML file.

    Args:
        path: The file.
        name: What to call it in messages.

    Raises:
        UsageError: there is no such file, or it is no YAML; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} cannot be read: {error}") from error
    loader = _LOADER(text)
    try:
        builder = _Builder(loader)
        node = loader.get_single_node()
        data = None if node is None else builder.build(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UsageError(f"{name}:{mark.line + 1 if mark else 1}: no YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: no YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
    return YamlFile(name=name, data=data, lines=builder.lines, repeated=tuple(builder.repeated))


class _Builder:
    """Turns nodes into values and keeps the lines."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._flat: set[int] = set()
        self.lines: dict[Where, int] = {}
        self.repeated: list[Where] = []

    def build(self, node: yaml.Node, where: Where) -> Any:
        """The value of a node."""
        self.lines.setdefault(where, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*where, index)) for index, item in enumerate(node.value)]
        return self._loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[Any, Any]:
        if id(node) not in self._flat:  # an anchor's node is met at each alias; merging adds keys to it
            self._flat.add(id(node))
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            self.repeated += [(*where, key) for key in sorted({str(key) for key in keys if keys.count(key) > 1})]
            self._loader.flatten_mapping(node)
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._loader.construct_object(key_node, deep=True)
            self.lines[(*where, key)] = key_node.start_mark.line + 1
            result[key] = self.build(value_node, (*where, key))
        return result
