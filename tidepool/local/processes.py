"""Child processes that end together, locks between commands, and signals that end a command in order."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import psutil

from tidepool.errors import TidepoolError
from tidepool.settings import environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# Every process that one `Processes` started, and all their descendants, inherit it: the only trace that survives new
# sessions and dead parents. The underscore keeps it apart from the settings.
_MARK = "_TIDEPOOL_PROCESSES"
_STOP_SECONDS = 15
_TERMINATE_SECONDS = 5


class Processes:
    """Child processes that end together with all their descendants, in whatever session or process group.

    Args:
        logs: The folder of their logs.
        variables: Environment variables for all of them, on top of this process's; its `PREFECT_*` are left out.
        own_sessions: Start each in a session of its own: Ctrl-C in the terminal then reaches this process only, which
            ends them in order.
    """

    def __init__(self, logs: Path, variables: Mapping[str, str], *, own_sessions: bool = True) -> None:
        self.mark = uuid4().hex
        self._logs = logs
        self._own_sessions = own_sessions
        inherited = {name: value for name, value in environment().items() if not name.startswith("PREFECT_")}
        self._environment = {**inherited, **variables, _MARK: self.mark}
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
        """Start `python -m <arguments>`, its output in the log of that name."""
        with (self._logs / f"{name}.log").open("wb") as log:
            self._started[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=self._own_sessions,
            )
        return self._started[name]

    def wait(self, name: str, seconds: float) -> None:
        """Wait for a process that is expected to end.

        Raises:
            TidepoolError: it failed, or is still running after that many seconds.
        """
        try:
            code = self._started[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise TidepoolError(f"{name} still runs after {seconds:.0f} s; its output:\n{self.output(name)}") from None
        del self._started[name]
        if code != 0:
            raise TidepoolError(f"{name} failed with exit code {code}; its output:\n{self.output(name)}")

    def check(self) -> None:
        """Check that all of them still run.

        Raises:
            TidepoolError: one has ended.
        """
        for name, process in self._started.items():
            if (code := process.poll()) is not None:
                raise TidepoolError(f"{name} ended with exit code {code}; its output:\n{self.output(name)}")

    def stop(self, name: str) -> None:
        """Terminate a process and wait for its end; kill it when that takes too long."""
        process = self._started.pop(name)
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop_all(self) -> None:
        """Stop all of them, the last started first, and then every descendant that is left."""
        try:
            for name in reversed(list(self._started)):
                self.stop(name)
        finally:
            end_marked(self.mark)

    def output(self, name: str) -> str:
        """Return the end of a process's log."""
        return (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-3000:].strip()


def end_marked(mark: str) -> None:
    """Terminate every process with that mark; kill those that are left or that they have started meanwhile."""
    for number, seconds in [(signal.SIGTERM, _TERMINATE_SECONDS), *[(signal.SIGKILL, 1)] * _STOP_SECONDS]:
        # The environment of another user's process is None.
        marked = [each for each in psutil.process_iter(["environ"]) if (each.info["environ"] or {}).get(_MARK) == mark]
        if not marked:
            return
        for process in marked:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(marked, timeout=seconds)


@contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a file lock for the block; the system releases it when this process ends, however it ends.

    Args:
        path: The file, created if absent.
        wait: Wait until the lock is free.

    Yields:
        True if the lock is held, which with `wait` it always is.
    """
    with path.open("a") as file:
        held = False
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into KeyboardInterrupt, so that `finally` blocks run; ignore the rest.

    SIGINT also where it was ignored: a shell starts background jobs so, and a Prefect worker that inherits it never
    ends. An ignored SIGHUP (nohup) stays ignored.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def interrupt(_number: int, _frame: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
