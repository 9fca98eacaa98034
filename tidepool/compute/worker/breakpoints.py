"""`breakpoint()` in the process of a Dask worker, which has no terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

from tidepool.errors import UsageError
from tidepool.settings import environment

if TYPE_CHECKING:
    from collections.abc import Callable


def refuse_breakpoints() -> None:
    """Have `breakpoint()` raise a sentence that says what to do; pdb would read an empty input, and raise `BdbQuit`."""
    at_breakpoint(_refuse)


def at_breakpoint(call: Callable[..., Any]) -> None:
    """Have `breakpoint()` call this; a debugger of the user's own (PYTHONBREAKPOINT, `sys.breakpointhook`) stays."""
    if sys.breakpointhook is sys.__breakpointhook__ and not environment().get("PYTHONBREAKPOINT"):
        sys.breakpointhook = call


def _refuse(*_args: object, **_options: object) -> NoReturn:
    raise UsageError(
        "breakpoint() needs a terminal, and a Dask worker has none: `tidepool run --debug NAME` runs everything in one "
        "process; so does a script of your own with TIDEPOOL_COMPUTE_PROVIDER=threads"
    )
