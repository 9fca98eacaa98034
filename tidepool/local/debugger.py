"""The debugger of `tidepool run --debug`."""

from __future__ import annotations

import signal
import sys
import threading
from pdb import Pdb
from typing import TYPE_CHECKING, Any, NoReturn

from tidepool.compute.worker.breakpoints import at_breakpoint

if TYPE_CHECKING:
    from types import FrameType, TracebackType


class _Debugger(Pdb):
    """Python's debugger, whose `quit` ends the run: by itself it fails the task, and opens again with each retry."""

    def interaction(self, frame: FrameType | None, traceback: TracebackType | None) -> None:
        super().interaction(frame, traceback)
        if self.quitting:
            sys.breakpointhook = _end
            main = threading.main_thread()
            if threading.current_thread() is not main and main.ident:
                signal.pthread_kill(main.ident, signal.SIGINT)  # the flow, as with Ctrl-C; not only this item
            raise KeyboardInterrupt


def _end(*_arguments: Any, **_options: Any) -> NoReturn:
    raise KeyboardInterrupt  # in the next item, if it begins before the flow ends


def _stop(*_arguments: Any, **_options: Any) -> None:
    _Debugger(nosigint=True).set_trace(sys._getframe(1))  # noqa: SLF001 - as pdb.set_trace() itself: the frame of breakpoint()


def quit_ends_the_run() -> None:
    """Have `quit` at the prompt of `breakpoint()` end the run."""
    at_breakpoint(_stop)
