"""A Prefect server of this repository on this machine, on SQLite, and the processes that belong to it.

Everything it leaves is in `.tidepool/`: `prefect/` (the database: the history of runs), `logs/`, `storage/`. The demo
keeps a server up for people and for `tidepool run`; without a demo `tidepool run` has one for the time of the run.
"""

from __future__ import annotations

import fcntl
import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import psutil

from tidepool.errors import TidepoolError, UsageError
from tidepool.settings import environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

USUAL_PORT = 4200
# Prefect's default is a transaction per event: a flow of a thousand tasks keeps SQLite locked for minutes, and others
# get 503. In batches the server needs a quarter of the CPU (docs/decisions/0013-*.md).
RECORD_IN_BATCHES = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    **{
        f"PREFECT_SERVER_SERVICES_{service}_{size}": "200"
        for service in ("TASK_RUN_RECORDER", "EVENT_PERSISTER")
        for size in ("BATCH_SIZE", "READ_BATCH_SIZE")
    },
}
# Every process that one `Processes` started, and all that these started, carry it: the only trace that survives new
# sessions and dead parents. The underscore keeps it apart from the settings.
_MARK = "_TIDEPOOL_PROCESSES"
_START_SECONDS = 180
_STOP_SECONDS = 15


@dataclass(frozen=True)
class Home:
    """The folder that holds everything local; not in Git."""

    path: Path

    @classmethod
    def of(cls, repository: Path) -> Home:
        """The home of a repository, which exists then."""
        path = repository / ".tidepool"
        for folder in ("prefect", "logs"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        return cls(path)

    @property
    def prefect(self) -> Path:
        """PREFECT_HOME: the database, and what Prefect keeps beside it."""
        return self.path / "prefect"

    @property
    def logs(self) -> Path:
        """The output of each process, in a file of its name."""
        return self.path / "logs"

    @property
    def record(self) -> Path:
        """What a running demo says of itself."""
        return self.path / "demo.json"

    def running_demo_port(self) -> int | None:
        """The port of the demo's server, if one is up."""
        with _lock(self.path / "demo.lock") as free:
            if free or not self.record.is_file():
                return None
        port = int(json.loads(self.record.read_text())["port"])
        return port if is_healthy(port) else None

    @contextmanager
    def only_demo(self) -> Iterator[None]:
        """Keeps every other demo of this repository out, and clears away what a killed one left behind.

        Raises:
            UsageError: another one is up.
        """
        with _lock(self.path / "demo.lock") as free:
            if not free:
                port = self.running_demo_port()
                where = f" at http://127.0.0.1:{port}" if port else ""
                raise UsageError(f"a demo of this repository is up already{where}: end it with Ctrl-C where it runs")
            if self.record.is_file():
                end_marked(str(json.loads(self.record.read_text())["mark"]))
                self.record.unlink()
            try:
                yield
            finally:
                self.record.unlink(missing_ok=True)


class Processes:
    """Child processes that end together, with all that they started, in whatever session or process group.

    Args:
        home: Where their logs go.
        variables: Environment variables for all of them, on top of this process's; its `PREFECT_*` are left out.
    """

    def __init__(self, home: Home, variables: Mapping[str, str]) -> None:
        self.mark = uuid4().hex
        self._logs = home.logs
        inherited = {name: value for name, value in environment().items() if not name.startswith("PREFECT_")}
        self._environment = {**inherited, **variables, _MARK: self.mark}
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
        """Starts `python -m <arguments>`, its output in the log of that name."""
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal is for us: we end them in order.
                start_new_session=True,
            )
        self._started[name] = process
        return process

    def wait(self, name: str, seconds: float) -> None:
        """Waits for the end of a process that ends by itself.

        Raises:
            TidepoolError: it failed, or took longer.
        """
        process = self._started[name]
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TidepoolError(f"{name} was not done after {seconds:.0f} s; its output:\n{self._tail(name)}") from None
        del self._started[name]
        if code != 0:
            raise TidepoolError(f"{name} failed with exit code {code}; its output:\n{self._tail(name)}")

    def check(self) -> None:
        """Looks whether all still run.

        Raises:
            TidepoolError: one ended by itself.
        """
        for name, process in self._started.items():
            if (code := process.poll()) is not None:
                raise TidepoolError(f"{name} ended with exit code {code}; its output:\n{self._tail(name)}")

    def stop(self, name: str) -> None:
        """Asks a process to end, and waits."""
        process = self._started.pop(name, None)
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop_all(self) -> None:
        """Ends them, the last started first, and then whatever they left."""
        try:
            for name in reversed(list(self._started)):
                self.stop(name)
        finally:
            end_marked(self.mark)

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _tail(self, name: str) -> str:
        return self._log(name).read_text(encoding="utf-8", errors="replace")[-3000:].strip()


def prefect_variables(home: Home, port: int) -> dict[str, str]:
    """The variables of a server on that port and of its clients."""
    return {
        "PREFECT_HOME": str(home.prefect),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        # Links that Prefect writes lead to the default user interface.
        "PREFECT_UI_URL": f"http://127.0.0.1:{port}/v2",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        **RECORD_IN_BATCHES,
        # A loaded machine is no reason to crash a run.
        "PREFECT_CLIENT_MAX_RETRIES": "15",
    }


def server_arguments(port: int, *options: str) -> list[str]:
    """What follows `python -m` to start a Prefect server that only this machine can reach."""
    # Collects garbage as seldom as in the image (docs/decisions/0069-*.md).
    server = ["tidepool.garbage", "prefect", "server", "start"]
    return [*server, "--host", "127.0.0.1", "--port", str(port), *options]


def start_server(processes: Processes, home: Home, port: int, *options: str) -> None:
    """Starts the server and waits until it answers; one start at a time, because it may have to migrate the database.

    Raises:
        TidepoolError: it ended, or did not answer in time.
    """
    with _lock(home.path / "start.lock", wait=True):
        processes.start("server", *server_arguments(port, *options), cwd=home.path)
        deadline = time.monotonic() + _START_SECONDS
        while not is_healthy(port):
            processes.check()
            if time.monotonic() > deadline:
                raise TidepoolError(
                    f"the Prefect server did not answer within {_START_SECONDS} s; see {home.logs / 'server.log'}"
                )
            time.sleep(0.1)


def is_healthy(port: int) -> bool:
    """Whether a Prefect server of this machine answers at that port."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/api/health", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def free_port(usual: int = 0) -> int:
    """The usual port if it is free, otherwise any free one."""
    try:
        return _probe(usual)
    except OSError:
        return _probe(0)


def is_free(port: int) -> bool:
    """Whether nobody listens on the port."""
    try:
        _probe(port)
    except OSError:
        return False
    return True


def _probe(port: int) -> int:
    with socket.socket() as probe:
        # As servers do: a port whose last connections still time out is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return int(probe.getsockname()[1])


def end_marked(mark: str) -> None:
    """Ends every process with that mark: politely, then not."""
    found = _marked(mark)
    for process in found:
        _send(process, signal.SIGTERM)
    psutil.wait_procs(found, timeout=5)
    deadline = time.monotonic() + _STOP_SECONDS
    # A process may have started another one meanwhile.
    while (found := _marked(mark)) and time.monotonic() < deadline:
        for process in found:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(found, timeout=1)


def _marked(mark: str) -> list[Any]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # gone, or another user's: not ours
    return found


def _send(process: Any, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


@contextmanager
def _lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a file lock for the block; the system releases it when this process ends, however it ends.

    Yields:
        Whether we have it; always when we wait for it.
    """
    with path.open("a") as file:
        yield _take(file, wait=wait)


def _take(file: IO[str], *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turns the first SIGINT, SIGTERM or SIGHUP into KeyboardInterrupt, so that `finally` blocks run; ignores the rest.

    SIGINT also where it was ignored: a shell starts background jobs so, and a Prefect worker that inherits it never
    ends. An ignored SIGHUP (nohup) stays ignored.
    """
    told = False

    def end(_number: int, _frame: object) -> None:
        nonlocal told
        if not told:
            told = True
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
