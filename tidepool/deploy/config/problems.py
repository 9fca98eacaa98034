"""Problems in the files in Git, each with its file and line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection

    from tidepool.deploy.config.yaml_source import Place

Finding = tuple["Place", str]
"""A place in a file and what is wrong there."""


@dataclass(frozen=True, order=True)
class Problem:
    """One problem.

    Attributes:
        file: Path from the repository's root.
        line: From 1.
        message: What is wrong, and what is accepted.
    """

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


class InvalidFileError(UsageError):
    """A file that cannot be read, with the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def raise_if_any(problems: Collection[Problem]) -> None:
    """Refuse files that have problems.

    Raises:
        UsageError: all problems, one per line, below their number.
    """
    if problems:
        count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}; nothing was written:"
        raise UsageError("\n".join([count, *(f"  {problem}" for problem in problems)]))


def path(place: Place, data: Any = None) -> str:
    """Return a place as people write it: `deployments[csv-etl].work_pool.name`.

    Args:
        place: The place.
        data: The data; an item of a list that has a name is shown with it instead of its position.
    """
    text = ""
    for part in place:
        inside = (isinstance(data, dict) and part in data) or (isinstance(data, list) and part in range(len(data)))
        data = data[part] if inside else None
        if isinstance(part, int):
            name = data.get("name") if isinstance(data, dict) else None
            text += f"[{name}]" if name and isinstance(name, str) else f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text or "the file"


def place_in(data: Any, location: tuple[int | str, ...]) -> Place:
    """Return pydantic's location of an error as a place in the data: without the branches of unions.

    Args:
        data: The data that was validated.
        location: `loc` of the error.
    """
    place: list[int | str] = []
    current: Any = data
    for index, part in enumerate(location):
        item = isinstance(current, list) and isinstance(part, int) and part < len(current)
        if item or (isinstance(current, dict) and part in current):
            current = current[part]
        elif index == len(location) - 1 and isinstance(current, dict) and isinstance(part, str) and part.isidentifier():
            pass  # a missing key: the last part
        else:
            continue
        place.append(part)
    return tuple(place)
