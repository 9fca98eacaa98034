"""Parsing, increasing and rendering a CSV of integers. Pure functions."""

from __future__ import annotations

import csv
import io
import re
from typing import TYPE_CHECKING

from tidepool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = list[int]

# Python refuses to convert more than 4,300.
_MOST_DIGITS = 4_000
# int() alone would also take 1_000 and the digits of other scripts.
_INTEGER = re.compile(r"[+-]?[0-9]+")


def parse(text: str) -> list[Row]:
    """Parse the integers of each line.

    Args:
        text: CSV; lines may differ in length, an empty line is a row of none.

    Raises:
        InputError: a cell is not an integer; names its line and column, both counted from 1.
    """
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [
            [_integer(cell, lines.line_num, column) for column, cell in enumerate(cells, start=1)] for cells in lines
        ]
    except csv.Error as error:
        raise InputError(f"line {lines.line_num}: {error}; expected a CSV of integers") from None


def increase(rows: Sequence[Row], increment: int) -> list[Row]:
    """Add the increment to each integer."""
    return [[value + increment for value in row] for row in rows]


def render(rows: Sequence[Row]) -> str:
    """Render the rows as CSV, each line ended by a newline; no rows give an empty text."""
    return "".join(f"{','.join(map(str, row))}\n" for row in rows)


def key(destination: str, run_id: str) -> str:
    """Fill in the destination of one run.

    Args:
        destination: Key or URL; `{run_id}` in it stands for the flow run's id.
        run_id: The flow run's id.

    Raises:
        InputError: it has a placeholder other than `{run_id}`.
    """
    filled = destination.replace("{run_id}", run_id)
    if other := re.search(r"\{[^}]*\}?|\}", filled):
        raise InputError(f"destination: unknown placeholder {other[0]!r}; the only one is {{run_id}}")
    return filled


def preview(
    before: Sequence[Row], after: Sequence[Row], lines: int = 10, width: int = 80
) -> list[dict[str, str | int]]:
    """Tabulate the first lines before and after, each cut to `width` characters."""
    pairs = zip(before[:lines], after[:lines], strict=True)
    return [
        {"line": number, "before": _shown(old, width), "after": _shown(new, width)}
        for number, (old, new) in enumerate(pairs, start=1)
    ]


def _integer(cell: str, line: int, column: int) -> int:
    text = cell.strip()
    if not _INTEGER.fullmatch(text):
        raise InputError(f"line {line}, column {column}: {cell!r} is not an integer")
    if len(text) > _MOST_DIGITS:
        raise InputError(f"line {line}, column {column}: an integer of {len(text):,} digits; at most {_MOST_DIGITS:,}")
    return int(text)


def _shown(row: Row, width: int) -> str:
    text = ",".join(map(str, row))
    return text if len(text) <= width else f"{text[: width - 1]}…"
