"""A new deployment in the text of prefect.yaml: lines are added, and no other one is changed, comments included."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import yaml

from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tidepool.deploy.config.yaml_source import YamlFile


def usual(text: str, file: YamlFile, key: str, accepted: Callable[[Any], bool] = lambda _: True) -> str:
    """Return the value that most deployments of the file have for a key, as YAML: its alias if they use one.

    Args:
        text: The file's text.
        file: The file, as it was read.
        key: Key of a deployment.
        accepted: Whether a value may be used; the others are not counted.

    Returns:
        One line; empty if no deployment has an accepted value.
    """
    lines, found = text.splitlines(), Counter[str]()
    for index, deployment in enumerate(file.data["deployments"]):
        if (value := deployment.get(key)) is None or not accepted(value):
            continue
        line = lines[file.line(("deployments", index, key)) - 1]
        alias = re.search(rf"\b{key}:\s*(\*[\w-]+)", line)
        found[alias[1] if alias else json.dumps(value)] += 1  # YAML, too
    return found.most_common(1)[0][0] if found else ""


def add(text: str, file: YamlFile, entry: str) -> str:
    """Return the file's text with one more deployment, before the first one whose name is later in the alphabet.

    Args:
        text: The file's text.
        file: The file, as it was read.
        entry: The deployment as an item of a list, without indentation.

    Raises:
        UsageError: the deployments are not written as a list of blocks.
    """
    deployments, added = file.data["deployments"], yaml.safe_load(re.sub(r"(?m): (\*.*)$", r': "\1"', entry))[0]
    names = [str(each.get("name")) for each in deployments]
    position = next((index for index, name in enumerate(names) if name > added["name"]), len(names))
    lines = text.splitlines(keepends=True)
    starts = [file.line(("deployments", index)) - 1 for index in range(len(names))]
    if len({*starts}) != len(names) or not all(re.match(r"\s*- ", lines[each]) for each in starts):
        raise UsageError(f"{file.name}: the deployments are not a list of blocks that begin with `- `, as this needs")
    indent = lines[starts[0]].partition("-")[0]
    end = "\r\n" if "\r\n" in text else "\n"
    block = "".join(f"{indent}{line}".rstrip() + end for line in entry.splitlines())
    if position < len(names):
        place = _with_comments_above(lines, starts[position])
        parts = [*lines[:place], f"{block}{end}", *lines[place:]]
    else:
        place = _end(lines, starts[-1], len(indent))
        before = "".join(lines[:place])
        parts = [before, "" if before.endswith("\n") else end, f"{end}{block}", *lines[place:]]
    new = "".join(parts)
    # What the lines mean is what counts: an anchor or an unusual form could make them mean something else.
    wanted: list[Mapping[str, Any]] = [*deployments[:position], yaml.safe_load(new)["deployments"][position]]
    if yaml.safe_load(new) != {**file.data, "deployments": [*wanted, *deployments[position:]]}:
        raise UsageError(f"{file.name}: a deployment cannot be added to it automatically; write it there yourself")
    return new


def _with_comments_above(lines: list[str], place: int) -> int:
    """Return the line of the comments that stand directly above a deployment."""
    while lines[place - 1].lstrip().startswith("#"):
        place -= 1
    return place


def _end(lines: list[str], start: int, indent: int) -> int:
    """Return the line after the last deployment, which begins at `start`, without the empty lines that follow it."""
    end = start + 1
    for number in range(start + 1, len(lines)):
        stripped = lines[number].strip()
        if stripped and len(lines[number]) - len(lines[number].lstrip()) <= indent:
            break
        end = number + 1 if stripped else end
    return end
