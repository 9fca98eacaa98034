"""Errors meant for a person, and the wording that their messages share.

Each carries one sentence that names the value, the place and what is accepted, and is shown without a traceback.
"""

from __future__ import annotations

import difflib
import re
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from pydantic_core import ErrorDetails


_SEPARATOR = re.compile(r"[^A-Za-z0-9]+")
# As of difflib.get_close_matches.
_NEAR = 0.6


class TidepoolError(Exception):
    """An error whose text is shown to the user as it is."""


class UsageError(TidepoolError):
    """A command line, a setting or a parameter is wrong; nothing was started."""


class InputError(TidepoolError, ValueError):
    """The data that a flow reads is not in the format it accepts; a retry would fail in the same way."""


class StorageError(TidepoolError):
    """An object cannot be read or written as requested."""


class MissingError(StorageError):
    """An object does not exist."""


class UnavailableError(StorageError):
    """A store does not answer; later it may."""


class ClusterError(TidepoolError):
    """A Dask cluster did not start, with what it waited for, or it is not what was requested."""


# Another try would end in the same way.
FOR_GOOD = (UsageError, InputError)


def did_you_mean(given: str, known: Collection[str], otherwise: str = "") -> str:
    """Return the end of a message about an unknown name: the nearest known one.

    Names are compared after the words that they begin with in common: `TIDEPOOL_TOKEN` is not near
    `TIDEPOOL_STORAGE_ROOT`. Where none is near, it is the advice `otherwise`, by default the list of the known names.
    """
    if known and (near := max(known, key=lambda each: _likeness(given, each))) and _likeness(given, near) >= _NEAR:
        return f"; did you mean {near}?"
    return f"; {otherwise or 'known: ' + (', '.join(known) or 'none')}"


def _likeness(given: str, known: str) -> float:
    """Return how alike two names are, from 0 to 1, without the whole words that both begin with."""
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(given, known, strict=False)))
    start = max((match.end() for match in _SEPARATOR.finditer(given[:common])), default=0)
    return difflib.SequenceMatcher(None, given[start:], known[start:]).ratio()


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return the place of the byte that is not UTF-8, from the error of decoding a whole file."""
    before = error.object[: error.start]
    return f"line {before.count(10) + 1}: byte {error.start - before.rfind(10)} of it is not UTF-8"


def reason(problem: ErrorDetails, *, show_input: bool = True) -> str:
    """Return the message of one of pydantic's errors as a part of a sentence, with the value unless it is secret."""
    text = problem["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    # A value error of our own words the value itself; a mapping is too long to repeat.
    shown = show_input and problem["type"] != "value_error" and not isinstance(problem["input"], dict)
    return f"{text}, not {problem['input']!r}" if shown else text
