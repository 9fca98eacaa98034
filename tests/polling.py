"""Polling with a deadline: the server records task runs, logs and artifacts some time after they were created."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def until(look: Callable[[], T], want: Callable[[T], object] = bool, *, seconds: float = 60) -> T:
    """Poll `look` until `want` accepts its result; return the result.

    Raises:
        AssertionError: not accepted within that many seconds; shows the last result.
    """
    deadline = time.monotonic() + seconds
    while not want(found := look()):
        assert time.monotonic() < deadline, f"still not accepted after {seconds:g} s: {found}"
        time.sleep(0.1)
    return found
