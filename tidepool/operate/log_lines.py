"""One line of log for each record, whatever foreign text is in it.

Names of runs, clusters and their refusals come from flow runs. With a newline in it, such a text could write records
of its own into the log; with an escape sequence or a bidirectional control, change what a terminal shows.
"""

from __future__ import annotations

import copy
import logging
import unicodedata

# Control characters, line and paragraph separators, and format characters, which the bidirectional controls are.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def escaped(text: str) -> str:
    r"""Return a text in one line: `\n` instead of a newline, and so on for all that is not printed as it is."""
    if text.isprintable():
        return text
    return "".join(
        each.encode("unicode_escape").decode() if unicodedata.category(each) in _ESCAPED else each for each in text
    )


class OneLine(logging.Formatter):
    """Another formatter, with the message of each record in one line and each line of its traceback indented."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the lines of the traceback, none of which can be taken for a record."""
        safe = copy.copy(record)
        safe.msg, safe.args = escaped(record.getMessage()), ()
        first, *rest = self.inner.format(safe).split("\n")
        return "\n".join([escaped(first), *(f"  | {escaped(each)}" for each in rest)])


def install() -> None:
    """Have all handlers of the root logger write so; those that are added later do not."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, OneLine):
            handler.setFormatter(OneLine(handler.formatter or logging.Formatter()))
