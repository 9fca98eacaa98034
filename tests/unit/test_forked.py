"""A child process that waits for its orders. Each test forks a Python process of its own: pytest's has threads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.polling import until
from tidepool.operate import forked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# PARENT has `child`, or None; CHILD has `orders`.
PROGRAM = """
import json, os, signal, sys, time
from tidepool.operate.forked import Orders, fork

def wait_for_orders():
    import select
    sockets = [each for each in os.listdir("/proc/self/fd") if "socket:" in os.path.realpath("/proc/self/fd/" + each)]
    select.select([int(each) for each in sockets], [], [], 60)

def prepare():
    {prepare}

print("before the fork")
child = fork(prepare)
if isinstance(child, Orders):
    orders = child
    {child}
else:
    {parent}
"""
STARTS = """
    import anyio
    assert child.start({**os.environ, "GIVEN": "x", "PYTHONPATH": os.environ["NEXT"]}, os.environ["FOLDER"])
    print(anyio.run(child.wait), child.returncode)
"""


def program(parent: str = STARTS, child: str = "pass", prepare: str = "pass") -> str:
    return PROGRAM.format(parent=parent.strip(), child=child, prepare=prepare)


def run(tmp_path: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folder, following = tmp_path / "folder", tmp_path / "next"
    for each in (folder, following):
        each.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "FOLDER": str(folder), "NEXT": str(following), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_child_becomes_what_a_new_process_would_be(tmp_path: Path) -> None:
    """Environment, folder, module path and arguments of the child are those of `python -m` there."""
    shown = "json.dumps([os.environ.get('GIVEN'), os.environ.get('GONE'), os.getcwd(), sys.path, sys.argv])"
    former = tmp_path / "former"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "shown.py").write_text(f"import json, os, sys\nprint({shown})")
    drop = "os.environ.pop('GONE'); "
    done = run(
        tmp_path,
        program(parent=f"{drop}{STARTS.strip()}", child=f"orders.take('shown.py'); print({shown})"),
        PYTHONPATH=str(former),
        GONE="x",
    )
    before, *lines, end = done.stdout.splitlines()
    assert (before, end) == ("before the fork", "0 0"), done.stderr
    new = subprocess.run(
        [sys.executable, "-m", "shown"],
        cwd=tmp_path / "folder",
        env={**os.environ, "GIVEN": "x", "PYTHONPATH": str(tmp_path / "next")},
        capture_output=True,
        text=True,
        check=True,
    )
    [found], expected = lines, json.loads(new.stdout)
    given, gone, folder, path, _ = json.loads(found)
    assert [given, gone, folder] == expected[:3]
    assert str(former) not in path
    # The parent's own first entry is kept as the last one.
    assert path[: len(expected[3])] == expected[3]
    assert len(path) <= len(expected[3]) + 1


@pytest.mark.parametrize(
    ("child", "status"),
    [("sys.exit(3)", 3), ("raise ValueError('x')", 1), ("os.kill(os.getpid(), 9)", -9), ("os.abort()", -6)],
)
def test_the_exit_status_is_the_childs(tmp_path: Path, child: str, status: int) -> None:
    done = run(tmp_path, program(child=child))
    assert done.stdout.splitlines() == ["before the fork", f"{status} {status}"], done.stderr


def test_a_child_leads_a_session_of_its_own_and_reads_nothing(tmp_path: Path) -> None:
    child = "print(os.getsid(0) == os.getpgid(0) == os.getpid(), repr(sys.stdin.read()), flush=True)"
    assert "True ''" in run(tmp_path, program(child=child)).stdout


def test_an_end_that_is_known_can_be_waited_for(tmp_path: Path) -> None:
    parent = """
    import anyio
    child.start(dict(os.environ), ".")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    print(child.returncode, anyio.run(child.wait), anyio.run(child.wait))
    child.kill()
    """
    done = run(tmp_path, program(parent=parent, child="sys.exit(3)"))
    assert done.stdout.splitlines() == ["before the fork", "3 3 3"], done.stderr


def test_where_the_system_forgets_children_the_end_is_known_all_the_same(tmp_path: Path) -> None:
    ignored = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    done = run(tmp_path, f"{ignored}\n{program(child='sys.exit(3)')}")
    assert done.stdout.splitlines() == ["before the fork", "255 255"], done.stderr


@pytest.mark.parametrize("prepare", ["raise ImportError('missing')", "os.kill(os.getpid(), 15)", "sys.exit(0)"])
def test_a_child_that_ended_early_takes_no_orders(tmp_path: Path, prepare: str) -> None:
    parent = """
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    print(child.start(dict(os.environ), "."))
    """
    done = run(tmp_path, program(parent=parent, child="print('began')", prepare=prepare))
    assert done.stdout.splitlines() == ["before the fork", "False"]


def test_a_child_that_fails_after_its_orders_were_sent_has_not_taken_them(tmp_path: Path) -> None:
    """They are in the channel while it still imports."""
    prepare = "wait_for_orders(); raise ImportError('late')"
    done = run(
        tmp_path, program(parent="print(child.start(dict(os.environ), '.'), child.returncode is None)", prepare=prepare)
    )
    assert done.stdout.splitlines() == ["before the fork", "False False"], done.stderr
    assert "ImportError: late" in done.stderr


@pytest.mark.parametrize("prepare", ["pass", "signal.alarm(60); signal.pause()"])
def test_a_dismissed_child_has_ended(tmp_path: Path, prepare: str) -> None:
    parent = "child.dismiss(); print(os.path.exists(f'/proc/{child.pid}'), child.returncode)"
    done = run(tmp_path, program(parent=parent, child="print('began')", prepare=prepare))
    assert done.stdout.splitlines() == ["before the fork", "False -9"]


def test_a_process_with_a_thread_is_not_forked(tmp_path: Path) -> None:
    thread = "import threading; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    done = run(tmp_path, f"import time; {thread}\n{program(parent='print(child)')}")
    assert done.stdout.splitlines() == ["before the fork", "None"]


@pytest.mark.parametrize(("name", "value"), [("sys.platform", "darwin"), ("os.pidfd_open", OSError())])
def test_a_system_without_pidfds_has_no_child(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    def refuse(_pid: int) -> int:
        raise value

    monkeypatch.setattr(f"tidepool.operate.forked.{name}", refuse if isinstance(value, OSError) else value)
    assert forked.fork(lambda: None) is None


def test_an_interpreter_without_pidfds_has_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tidepool.operate.forked.os.pidfd_open")
    assert forked.fork(lambda: None) is None


@pytest.mark.parametrize("what", ["os.fork", "socket.socketpair"])
def test_a_system_without_room_has_no_child(tmp_path: Path, what: str) -> None:
    refuse = f"def refuse(*_): raise BlockingIOError(11, 'x')\nimport socket, os\n{what} = refuse"
    done = run(tmp_path, f"{refuse}\n{program(parent='print(child)')}")
    assert done.stdout.splitlines() == ["before the fork", "None"], done.stderr


@pytest.fixture
def waiting() -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A parent that does nothing, and its child that waits."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            program(parent="print(child.pid, flush=True); sys.stdin.read()"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(next(int(line) for line in parent.stdout if line.strip().isdigit()))
        yield psutil.Process(parent.pid), child
        parent.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_waiting_child_ends_with_its_parent(
    waiting: tuple[psutil.Process, psutil.Process], number: signal.Signals
) -> None:
    parent, child = waiting
    assert child.is_running()
    parent.send_signal(number)
    until(lambda: not child.is_running())
