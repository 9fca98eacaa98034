"""Lines of a YAML file: where each value is written, and where an author mends what is wrong with it.

An anchor (`&name`) gives a value to several places. A mistake that all of them have is one of the anchor. One that some
have is one of these places, where an alias (`*name`) or merge key (`<<: *name`) is written.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import yaml

# libyaml, where PyYAML was built with it: ten times as fast.
LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MERGE = "tag:yaml.org,2002:merge"

Place = tuple[str | int, ...]
"""The path of a value in a file: keys and list positions, from the top."""

Finding = tuple[Place, str]
"""A place in a file and what is wrong there."""

# Line and column of a text in the file.
_Mark = tuple[int, int]
# By a node and the position of an item or pair in it: the line of the alias that stands there, or 0.
_Aliases = dict[tuple[int, int], int]
_FRAME = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)
# Messages about a key, which is written beside an alias, and not about the value at the anchor.
_OF_THE_KEY = re.compile(r"unknown (key|input)|not allowed here|has no such|a parameter of its own")


@dataclass(frozen=True)
class _Spot:
    """The lines of a mistake: at the anchor, and at the alias or merge key by which it came, or 0; with the text."""

    anchor: int
    alias: int
    text: _Mark


@dataclass
class Lines:
    """The lines of a file, from 1.

    Attributes:
        of: Line of each key and list item; of a value that came by an anchor, the line at the anchor.
        duplicates: Place of each key that its mapping has already, with its line and that of the first one.
    """

    of: dict[Place, int] = field(default_factory=dict)
    duplicates: list[tuple[Place, int, int]] = field(default_factory=list)
    # Where each text is, the line of the alias or merge key by which a place has it, and the mapping or value at the
    # anchor of what a key, an item or a merge key names.
    _texts: dict[Place, _Mark] = field(default_factory=dict)
    _by: dict[Place, int] = field(default_factory=dict)
    _values: dict[Place, _Mark] = field(default_factory=dict)
    _merged: dict[Place, _Mark] = field(default_factory=dict)
    _visited: set[int] = field(default_factory=set)

    def add(self, node: yaml.Node, place: Place, by: int, aliases: _Aliases) -> None:
        """Add the lines of a node and of all that it holds; `by` is the line of the alias that it came by, or 0."""
        self.of.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                alias = by or aliases.get((id(node), index), 0)
                self._add_text((*place, index), item, alias)
                self.add(item, (*place, index), alias, aliases)
        elif isinstance(node, yaml.MappingNode):
            self._add_merged(node, place, by, aliases)
            first: dict[Place, int] = {}
            for index, (key, value) in enumerate(node.value):
                if key.tag == MERGE:
                    continue
                here = (*place, yaml.constructor.SafeConstructor().construct_object(key, deep=True))
                line = self.of[here] = key.start_mark.line + 1
                self._add_text(here, key, by)
                if here in first and id(node) not in self._visited:  # an anchor's node is visited at each alias
                    self.duplicates.append((here, line, first[here]))
                first.setdefault(here, line)
                self._values.pop(here, None)
                if alias := aliases.get((id(node), index), 0):
                    self._values[here] = _mark(value)
                self.add(value, here, by or alias, aliases)
            self._visited.add(id(node))

    def _add_merged(self, node: yaml.MappingNode, place: Place, by: int, aliases: _Aliases) -> None:
        """Add what a mapping merges: before its own keys, which win; of several merged ones, the first wins."""
        for index, (key, merged) in enumerate(node.value):
            if key.tag != MERGE:
                continue
            several = isinstance(merged, yaml.SequenceNode)
            for position, each in reversed([*enumerate(merged.value)] if several else [(index, merged)]):
                alias = aliases.get((id(merged if several else node), position), 0)
                if alias:
                    self._merged[place] = _mark(each)
                self.add(each, place, by or alias, aliases)

    def _add_text(self, place: Place, node: yaml.Node, by: int) -> None:
        self._texts[place] = _mark(node)
        self._by.pop(place, None)  # of a merged key that this one replaces
        if by:
            self._by[place] = by

    def nearest(self, place: Place) -> Place | None:
        """Return a place if it exists, and otherwise that of the value that would hold it."""
        return next((place[:end] for end in range(len(place), -1, -1) if place[:end] in self.of), None)

    def written(self, place: Place) -> int:
        """Return the line at which a value is written in its place: that of the alias or merge key, if it has one."""
        near = self.nearest(place)
        return 1 if near is None else self._by.get(near) or self.of[near]

    def edited(self, findings: list[Finding]) -> list[int]:
        """Return the line at which the author mends each of the findings, which are all of the file."""
        spots = [self._spot(*each) for each in findings]
        uses = Counter(
            (place[:1], mark) for marks in (self._texts, self._values, self._merged) for place, mark in marks.items()
        )
        wrong: Counter[tuple[Place, str, _Mark]] = Counter()
        for (place, message), spot in zip(findings, spots, strict=True):
            wrong[place[:1], message, spot.text] += 1
        return [
            spot.anchor
            if not spot.alias or wrong[place[:1], message, spot.text] >= uses[place[:1], spot.text]
            else spot.alias
            for (place, message), spot in zip(findings, spots, strict=True)
        ]

    def _spot(self, place: Place, message: str) -> _Spot:
        if (near := self.nearest(place)) is None:
            return _Spot(1, 0, (0, 0))
        line, alias = self.of[near], self._by.get(near, 0)
        of_the_key = near == place and _OF_THE_KEY.search(message) is not None
        if not of_the_key and (mark := self._values.get(near)):
            return _Spot(mark[0], alias or line, mark)
        # What a mapping lacks may be missing in the one that it merges: only there, if others lack it too.
        if near != place and (mark := self._merged.get(near)) and self._is_used_again(near[:1], mark):
            return _Spot(mark[0], alias or line, mark)
        return _Spot(line, alias, self._texts.get(near, (0, 0)))

    def _is_used_again(self, top: Place, mark: _Mark) -> bool:
        return sum(each == mark and place[:1] == top for place, each in self._merged.items()) > 1


def find(text: str, node: yaml.Node) -> Lines:
    """Return the lines of the text of a file, and of all that its node holds."""
    lines = Lines()
    lines.add(node, (), 0, _aliases(text, node))
    return lines


def _mark(node: yaml.Node) -> _Mark:
    return node.start_mark.line + 1, node.start_mark.column


def _aliases(text: str, node: yaml.Node) -> _Aliases:
    """Return the line of each alias, by the node that holds it and its position there: a node does not know it."""
    found: _Aliases = {}
    events = (each for each in yaml.parse(text, Loader=LOADER) if not isinstance(each, _FRAME))

    def follow(node: yaml.Node) -> int:
        event = next(events)
        if isinstance(event, yaml.AliasEvent):
            return event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(node, yaml.CollectionNode):
            for index, item in enumerate(node.value):
                for each in item if isinstance(item, tuple) else (item,):
                    found[id(node), index] = follow(each)
            next(events)  # its end
        return 0

    follow(node)
    return found
