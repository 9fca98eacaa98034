"""Errors meant for a person, and the wording that their messages share.

Each carries one sentence that names the value, the place and what is accepted, and is shown without a traceback.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from pydantic_core import ErrorDetails


class TidepoolError(Exception):
    """An error whose text is shown to the user as it is."""


class UsageError(TidepoolError):
    """A command line, a setting or a parameter is wrong; nothing was started, exit code 2."""


class InputError(TidepoolError, ValueError):
    """The data that a flow reads is not in the format it accepts; a retry would fail in the same way."""


class StorageError(TidepoolError):
    """An object cannot be read or written as requested."""


class ClusterError(TidepoolError):
    """A Dask cluster did not start, with what it waited for, or it is not what was requested."""


def did_you_mean(given: str, known: Collection[str], otherwise: str = "") -> str:
    """Return the end of a message about an unknown name: the nearest known one.

    Where none is similar, it is the advice `otherwise`, by default the list of the known names.
    """
    if near := difflib.get_close_matches(given, known, n=1):
        return f"; did you mean {near[0]}?"
    return f"; {otherwise or 'known: ' + (', '.join(known) or 'none')}"


def reason(problem: ErrorDetails, *, show_input: bool = True) -> str:
    """Return the message of one of pydantic's errors as a part of a sentence, with the value unless it is secret."""
    text = problem["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    # A value error of our own words the value itself; a mapping is too long to repeat.
    shown = show_input and problem["type"] != "value_error" and not isinstance(problem["input"], dict)
    return f"{text}, not {problem['input']!r}" if shown else text
