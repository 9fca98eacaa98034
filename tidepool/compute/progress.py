"""Progress of mapped task runs on the run's log, and into the run's record."""

from __future__ import annotations

import reprlib
import threading
import time
from datetime import date
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from tidepool.report import run_record

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping

    from tidepool.report.run_record import Item

# A run of an hour has 360 lines, one of a minute six.
_SECONDS = 10.0
_SHOWN = 80
# Also of a list of a million numbers.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _SHOWN
_PLAIN = (str, int, float, bool, type(None), date, PurePath)


class ItemProgress:
    """Counts items as they are submitted and end, and logs it at most every ten seconds, and at the end.

    Args:
        log: The run's log.
        workers: Returns the number of workers now, or None if it is unknown; may take a second.
    """

    def __init__(
        self, log: logging.Logger | logging.LoggerAdapter[logging.Logger], workers: Callable[[], int | None]
    ) -> None:
        self._log = log
        self._workers = workers
        self._record = run_record.current()
        self._lock = threading.Lock()
        self._submitted = self._done = self._failed = self._retried = 0
        self._logged, self._at = "", time.monotonic()

    def submit(self, count: int) -> None:
        """Count items that were submitted."""
        with self._lock:
            self._submitted += count
        self._record.submit(count)

    def end(self, item: Item) -> None:
        """Count an item that has ended; of one that failed, the error is logged by the task run itself."""
        with self._lock:
            self._done += not item.error
            self._failed += bool(item.error)
            self._retried += max(item.tries - 1, 0)
        self._record.end(item)

    def show(self) -> None:
        """Log the progress, if the last line is ten seconds old."""
        if time.monotonic() - self._at >= _SECONDS:
            self._show()

    def finish(self) -> None:
        """Log the progress, unless the last line is still true."""
        if self._submitted:
            self._show()

    def _show(self) -> None:
        with self._lock:
            self._at = time.monotonic()
            text = f"{self._done} of {self._submitted} done"
            text += f", {self._failed} failed" if self._failed else ""
            text += f", {self._retried} retried" if self._retried else ""
            if text == self._logged:
                return
            self._logged = text
        workers = self._workers()
        run_record.save()
        count = "" if workers is None else f", {workers} worker{'' if workers == 1 else 's'}"
        self._log.info("Mapped tasks: %s%s", text, count)


def described(parameters: Mapping[str, Any]) -> str:
    """Return the arguments of one mapped task run as text, shortened: the item, for people."""
    text = ", ".join(f"{name}={_short.repr(value)}" for name, value in parameters.items())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def sketched(parameters: Mapping[str, Any]) -> str:
    """Return the same without a `repr` of what is large or the author's: cheap for each of many task runs."""
    return described({name: value if isinstance(value, _PLAIN) else _Name(value) for name, value in parameters.items()})


class _Name:
    """Stands for a value, with the name of its type."""

    def __init__(self, value: object) -> None:
        self._name = type(value).__name__

    def __repr__(self) -> str:
        return f"<{self._name}>"
