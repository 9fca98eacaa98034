"""Waiting for what comes later: the server learns of task runs, logs and artifacts some time after they were made."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def until(look: Callable[[], T], want: Callable[[T], object] = bool, *, seconds: float = 60) -> T:
    """What `look` finds, as soon as it is as wanted.

    Raises:
        AssertionError: it is not within that many seconds; with what was found last.
    """
    deadline = time.monotonic() + seconds
    while not want(found := look()):
        assert time.monotonic() < deadline, f"not as wanted after {seconds:g} s: {found}"
        time.sleep(0.1)
    return found
