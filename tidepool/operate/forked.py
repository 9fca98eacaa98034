"""A child process that is forked before it is needed: it has imported what its parent has, and waits for its orders.

Only a process with one thread may fork: in the child the other threads are missing, with the locks that they held.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import anyio

from tidepool.settings import environment, replace_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_READY = b"."
# A child whose imports hang is not waited for longer.
_PREPARED_SECONDS = 30.0


@dataclass(frozen=True)
class Orders:
    """The environment variables and the working directory of a process that has waited for them."""

    environment: dict[str, str]
    folder: str

    def take(self, program: str) -> None:
        """Make this process what `python -m` would have started with these variables in this folder.

        Args:
            program: File of the module.
        """
        former = set(_python_path())
        begin = [] if sys.flags.safe_path else [sys.path.pop(0)]
        replace_environment(self.environment)
        os.chdir(self.folder)
        first = [] if sys.flags.safe_path else [os.getcwd()]  # noqa: PTH109 - as Python itself
        kept = (each for each in sys.path if each not in former)
        # The folder of the parent's start comes last: a .pth file may name it, which has had no effect there.
        sys.path[:] = dict.fromkeys([*first, *_python_path(), *kept, *begin])
        sys.argv = [program]


def _python_path() -> Iterable[str]:
    entries = environment().get("PYTHONPATH", "")
    return [os.path.abspath(each) for each in entries.split(os.pathsep)] if entries else []  # noqa: PTH100 - as site.py


class Child:
    """A forked process: one that waits for its orders, and then executes them. Leader of a session of its own.

    Args:
        pid: Its process id.
        channel: The parent's end; when it is closed without orders, the process ends.

    Attributes:
        has_orders: Whether it has taken its orders.
    """

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.has_orders = False
        self._channel = channel
        self._returncode: int | None = None

    @property
    def returncode(self) -> int | None:
        """Its exit status; negative: the signal that killed it. None: it still runs."""
        if self._returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # where SIGCHLD is ignored the system forgets it: 255, as asyncio says
                self._returncode = 255
            else:
                self._returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self._returncode

    def start(self, environment: dict[str, str], folder: str) -> bool:
        """Give the process its orders, once; return whether it takes them. One that does not is ended."""
        orders = Orders(environment, folder)
        if self.returncode is None:
            with suppress(OSError):
                self._channel.settimeout(_PREPARED_SECONDS)
                self._channel.sendall(json.dumps(asdict(orders)).encode() + b"\n")
                if self._channel.recv(1) == _READY:
                    self._channel.close()
                    self.has_orders = True
                    return True
        self.dismiss()
        return False

    def dismiss(self) -> None:
        """End the process, which has no orders."""
        self._channel.close()
        self.kill()
        if self._returncode is None:
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)  # killed, so at once
            self._returncode = -signal.SIGKILL

    async def wait(self) -> int:
        """Wait for the end of the process; return its exit status."""
        while (status := self.returncode) is None:
            try:
                descriptor = os.pidfd_open(self.pid)  # readable when it has ended
            except ProcessLookupError:
                continue  # the system has just forgotten it
            try:
                await anyio.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        return status

    def kill(self) -> None:
        """Kill the process, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def fork(prepare: Callable[[], None]) -> Child | Orders | None:
    """Fork this process; the child returns when it is told to start, and ends with its parent if it is not.

    Args:
        prepare: Called in the child while it waits: imports that only the child needs.

    Returns:
        In this process, its child; in the child, its orders. None where it cannot be: the system is not Linux with
        pidfds, it has no room for another process, or this process has threads.
    """
    if not _can_fork():
        return None
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what is left in a buffer would be written by both
    # Memory that no collection looks at stays shared: a collection writes to each object.
    gc.freeze()
    try:
        ours, its = socket.socketpair()
    except OSError:
        return None
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        its.close()
        return None
    if pid == 0:
        ours.close()
        return _wait(its, prepare)
    its.close()
    # Once it leads its session, a signal to its process group reaches it and nothing else.
    if ours.recv(1) != _READY:
        ours.close()
        os.waitpid(pid, 0)
        return None
    return Child(pid, ours)


def _can_fork() -> bool:
    # An interpreter that was built on an older system has no such function.
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
        # Also those of libraries, which Python does not know.
        return len(list(Path("/proc/self/task").iterdir())) == 1
    except OSError:
        return False


def _wait(channel: socket.socket, prepare: Callable[[], None]) -> Orders:
    # Whatever happens here must not continue with what the parent does after the fork.
    try:
        os.setsid()
        with suppress(OSError):  # the process's own input is the parent's
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)
        channel.sendall(_READY)
        prepare()
        with channel, channel.makefile("rb") as orders:
            line = orders.readline()
            if not line.endswith(b"\n"):
                _end(0)
            channel.sendall(_READY)
        return Orders(**json.loads(line))
    except BaseException:  # noqa: BLE001 - in the parent, the process is missing then
        traceback.print_exc()
        _end(1)


def _end(status: int) -> NoReturn:
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)
