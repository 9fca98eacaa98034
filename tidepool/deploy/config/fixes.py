"""`tidepool validate --fix`: mistakes in prefect.yaml that have exactly one right answer, mended in the file's text.

Only the text of a mistake is replaced, at the place where the parser found it: comments and layout stay as they are.
(ruamel.yaml writes a file again as a whole: of this repository's own, it changes 150 lines.) A change that would alter
anything else of what the file means is not made.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tidepool.deploy.config import flows, yaml_lines, yaml_source
from tidepool.deploy.config.checks import FILE, STEP
from tidepool.deploy.config.yaml_source import InvalidFileError, Problem
from tidepool.deploy.config.yaml_source import path as shown
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tidepool.deploy.config.yaml_lines import Place

_STEP = f"{STEP}: {{}}"
_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_TRUE = ("true", "yes", "on")
_COMMENT = re.compile(r"\s#")


@dataclass(frozen=True, order=True)
class _Edit:
    """A replacement of a part of the file's text."""

    start: int
    end: int
    text: str
    place: Place
    message: str


def fix(repository: Path) -> list[Problem]:
    """Mend prefect.yaml, and return what was changed, with the lines of the new file. The file is replaced as a whole.

    What is left has the sentence of `checks.check`.

    Raises:
        UsageError: the file cannot be replaced.
    """
    path = (repository / FILE).resolve()
    try:
        file = yaml_source.read(path, FILE)
    except InvalidFileError:
        return []
    text = path.read_bytes().decode("utf-8")  # with its own ends of lines
    if file.duplicates or not isinstance(file.data, dict):
        return []
    mended = _Mended(repository, text)
    # What an anchor gives to several deployments is found with each of them.
    once = {(each.start, each.end, each.text): each for each in reversed(list(mended.edits()))}
    new, made = text, []
    for edit in sorted(once.values(), reverse=True):  # from the end, so that positions stay right
        changed = f"{new[: edit.start]}{edit.text}{new[edit.end :]}"
        if mended.means_the_same(changed) and not _COMMENT.search(new, edit.start, edit.end):
            new = changed
            made.append(edit)
    if made:
        _replace(path, new)
    found, lines = [], 0
    for edit in reversed(made):
        line = text.count("\n", 0, edit.start) + lines + 1
        found.append(Problem(FILE, line, shown(edit.place, file.data), edit.message))
        lines += edit.text.count("\n") - text.count("\n", edit.start, edit.end)
    return found


def _replace(path: Path, text: str) -> None:
    """Write a file again, as a whole or not at all, with its owner and mode.

    Raises:
        UsageError: this user may not, or the disk is full.
    """
    try:
        before = path.stat()
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        new = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            new.chmod(before.st_mode)
            if (before.st_uid, before.st_gid) != (new.stat().st_uid, new.stat().st_gid):
                os.chown(new, before.st_uid, before.st_gid)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{FILE} cannot be replaced, and is as it was: {error.strerror}") from error


class _Mended:
    """The changes that a file needs, and what it means without its mistakes."""

    def __init__(self, repository: Path, text: str) -> None:
        self._repository = repository
        self._text = text
        self._newline = "\r\n" if "\r\n" in text else "\n"
        self._modules: dict[str, str] = {}
        self._meaning = self._without_mistakes(_load(text))

    def means_the_same(self, text: str) -> bool:
        """Return True if another text of the file means the same, but for the mistakes."""
        try:
            return repr(self._without_mistakes(_load(text))) == repr(self._meaning)
        except (yaml.YAMLError, ValueError, AttributeError):
            return False

    def _without_mistakes(self, data: Any) -> Any:
        """Return the content of the file as it is when all is mended."""
        data = _without_active(data)
        if isinstance(listed := data.get("deployments"), list):
            data["deployments"] = [self._deployment(each) if isinstance(each, dict) else each for each in listed]
        # What these say has a meaning only where a deployment uses it, so that the other uses are compared.
        data["definitions"] = self._everywhere(data.get("definitions"))
        build = data.pop("build", None) or []
        if isinstance(build, list) and build and isinstance(build[0], dict) and STEP in build[0]:
            build = build[1:]
        return {"pull": data.pop("pull", None) or [], "build": build, **data}

    def _everywhere(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self._deployment({key: self._everywhere(item) for key, item in value.items()})
        return [self._everywhere(each) for each in value] if isinstance(value, list) else value

    def _deployment(self, config: dict[str, Any]) -> dict[str, Any]:
        changed = {"entrypoint": self._module(config["entrypoint"])} if "entrypoint" in config else {}
        return {**config, **changed, **({"pull": config["pull"] or []} if "pull" in config else {})}

    def _module(self, entrypoint: Any) -> Any:
        """Return an entrypoint by its module, where it is clear which flow it means."""
        if isinstance(entrypoint, str) and entrypoint not in self._modules:
            flow, problem = flows.find(self._repository, entrypoint)
            module = flows.by_module(self._repository, entrypoint)
            # Whether a project that is not installed here is imported with its folder `src`, only its author knows.
            unclear = flows.in_source_folder(self._repository, module)
            self._modules[entrypoint] = module if flow is not None and problem and not unclear else entrypoint
        return self._modules[entrypoint] if isinstance(entrypoint, str) else entrypoint

    def edits(self) -> Iterator[_Edit]:
        """Yield the changes, in the file's order; again, where an anchor gives what is changed to another place."""
        top = yaml.compose(self._text, Loader=yaml.SafeLoader)
        keys = _pairs(top)
        if not isinstance(top, yaml.MappingNode) or top.flow_style or "deployments" not in keys:
            return
        yield from self._first_step(keys)
        deployments = [_pairs(each) for each in _items(keys["deployments"][1])]
        if "pull" in keys or not deployments or not all("pull" in each for each in deployments):
            yield from self._pull(keys, ("pull",))
        for index, deployment in enumerate(deployments):
            place: Place = ("deployments", index)
            if "entrypoint" in deployment:
                yield from self._entrypoint(deployment["entrypoint"][1], (*place, "entrypoint"))
            if "pull" in deployment:
                yield from self._pull(deployment, (*place, "pull"))
            schedules = _items(deployment["schedules"][1]) if "schedules" in deployment else []
            for position, schedule in enumerate(schedules):
                if active := _pairs(schedule).get("active"):
                    yield from self._active(active, (*place, "schedules", position, "active"))

    def _first_step(self, keys: Mapping[str, _Pair]) -> Iterator[_Edit]:
        message = f"added the first step {STEP}"
        if "build" not in keys:
            start = self._above_comments(keys["deployments"][0])
            text = f"build:{self._newline}  - {_STEP}{self._newline}"
            yield _Edit(start, start, text, ("build",), message)
            return
        key, value, _ = keys["build"]
        steps = _items(value)
        if any(STEP in _pairs(each) for each in steps) or value.start_mark.index < key.end_mark.index:
            return  # in another order, or the steps of an anchor
        start, end = value.start_mark.index, value.end_mark.index
        if isinstance(value, yaml.SequenceNode) and value.flow_style:
            after = self._text.index("[", start) + 1
            yield _Edit(after, after, f"{{{_STEP}}}{', ' if steps else ''}", ("build", 0), message)
        elif steps:
            start = self._above_comments(value)
            indent = " " * value.start_mark.column
            yield _Edit(start, start, f"{indent}- {_STEP}{self._newline}", ("build", 0), message)
        elif end > start:  # null, written out
            yield _Edit(start, end, f"[{{{_STEP}}}]", ("build",), message)
        else:
            start = self._below_comments(key)
            begin = "" if self._text[:start].endswith("\n") else self._newline
            yield _Edit(start, start, f"{begin}  - {_STEP}{begin or self._newline}", ("build",), message)

    def _pull(self, keys: Mapping[str, _Pair], place: Place) -> Iterator[_Edit]:
        message = "added `pull: []`: the image is the code"
        if "pull" not in keys:
            start = self._above_comments(keys["deployments"][0])
            yield _Edit(start, start, f"pull: []{self._newline}", place, message)
        elif (value := keys["pull"][1]).tag == _NULL:
            start, end = value.start_mark.index, value.end_mark.index
            yield _Edit(start, end, "[]" if end > start else " []", place, message)

    def _entrypoint(self, value: yaml.Node, place: Place) -> Iterator[_Edit]:
        module = self._module(value.value)
        if module != value.value and isinstance(value, yaml.ScalarNode):
            quote = value.style if value.style in ("'", '"') else ""
            start, end = value.start_mark.index, value.end_mark.index
            yield _Edit(start, end, f"{quote}{module}{quote}", place, f"{module}, which was {value.value!r}")

    def _active(self, pair: _Pair, place: Place) -> Iterator[_Edit]:
        key, value, following = pair
        if value.tag != _BOOL or str(value.value).lower() not in _TRUE:
            return
        message = "removed: a schedule is active unless it is paused"
        start, end = key.start_mark.index, value.end_mark.index
        line = self._text.rfind("\n", 0, start) + 1
        before, after = self._text[line:start], self._text[end:].partition("\n")[0]
        if not before.strip() and not after.strip():
            yield _Edit(line, end + len(after) + 1, "", place, message)
        elif not before.strip() and after.lstrip().startswith("#"):  # the comment stays
            yield _Edit(start, end + len(after) - len(after.lstrip()), "", place, message)
        elif following is not None and "#" not in self._text[end : following.start_mark.index]:
            yield _Edit(start, following.start_mark.index, "", place, message)
        elif before.rstrip().endswith(","):
            yield _Edit(line + before.rindex(","), end, "", place, message)

    def _above_comments(self, node: yaml.Node) -> int:
        """Return the beginning of a node's line, or of the comment above it that belongs to it.

        A comment that is indented further is one of what is before. One that begins the file is the file's.
        """
        start = first = self._text.rfind("\n", 0, node.start_mark.index) + 1
        while start:
            above = self._text.rfind("\n", 0, start - 1) + 1
            line = self._text[above:start]
            column = len(line) - len(line.lstrip())
            if not line.lstrip().startswith("#") or column > node.start_mark.column:
                return start
            start = above
        return first

    def _below_comments(self, key: yaml.Node) -> int:
        """Return the end of a key's line without a value, or of the comments below it that are indented further."""
        end = key.end_mark.index
        while True:
            line, newline, rest = self._text[end:].partition("\n")
            end += len(line) + len(newline)
            following = rest.partition("\n")[0]
            column = len(following) - len(following.lstrip())
            if not following.lstrip().startswith("#") or column <= key.start_mark.column:
                return end


def _load(text: str) -> Any:
    return yaml.load(text, Loader=yaml_lines.LOADER)  # noqa: S506 - it is the safe one


# Key, value, and the key that follows in the same mapping.
_Pair = tuple[yaml.Node, yaml.Node, yaml.Node | None]


def _pairs(node: yaml.Node | None) -> dict[str, _Pair]:
    """Return the pairs of a mapping, with those that it merges."""
    found: dict[str, _Pair] = {}
    if not isinstance(node, yaml.MappingNode):
        return found
    for key, value in node.value:
        if key.tag == yaml_lines.MERGE:
            for each in reversed(_items(value) or [value]):
                found |= _pairs(each)
    keys = [key for key, _ in node.value]
    for (key, value), following in zip(node.value, [*keys[1:], None], strict=True):
        if key.tag != yaml_lines.MERGE:
            found[str(key.value)] = (key, value, following)
    return found


def _items(node: yaml.Node) -> list[yaml.Node]:
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _without_active(value: Any) -> Any:
    """Return a value without each `active: true` in it."""
    if isinstance(value, dict):
        return {key: _without_active(item) for key, item in value.items() if not (key == "active" and item is True)}
    return [_without_active(each) for each in value] if isinstance(value, list) else value
