"""`tidepool demo`: a server, a worker and runs through a work pool, and afterwards nothing of them."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from io import StringIO
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Crashed, Failed
from rich.console import Console

from tests.integration.small_repository import command, make, processes_of, variables
from tests.polling import until
from tidepool.errors import TidepoolError, UsageError
from tidepool.local.demo import _summary
from tidepool.local.processes import Processes
from tidepool.local.server import Home, free_port

if TYPE_CHECKING:
    from pathlib import Path

    from prefect.client.schemas.objects import State

pytestmark = pytest.mark.timeout(900)


def test_every_deployment_runs_through_the_work_pool_and_nothing_is_left(tmp_path: Path) -> None:
    repository = make(tmp_path / "repository", "good", "bad")
    port = free_port()
    done = subprocess.run(
        command("demo", "--port", str(port)),
        cwd=repository,
        # A person's own Prefect settings must not lead the demo anywhere.
        env=variables(PREFECT_API_URL="http://127.0.0.1:1/api", PREFECT_API_KEY="a key of theirs"),
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) == 4 and line[0] in {"good", "bad"}}
    assert (table["good"][0], table["bad"][0]) == ("Completed", "Failed")
    assert table["good"][2].startswith(f"http://127.0.0.1:{port}/v2/runs/flow-run/")
    assert "line 3, column 2: 'x7' is not an integer" in done.stdout
    assert "1 of 2 Completed" in done.stdout
    assert processes_of(repository) == []
    assert not Home.of(repository).record.exists()
    with sqlite3.connect(repository / ".tidepool" / "prefect" / "prefect.db") as database:
        assert {"good-run", "bad-run"} <= {row[0] for row in database.execute("select key from artifact")}
        rows = database.execute("select name, version is not null, path, pull_steps from deployment order by name")
        # The version is from Git; no path of this machine, no step that fetches code.
        assert rows.fetchall() == [("bad", 1, None, "[]"), ("good", 1, None, "[]")]
    database.close()


def test_ctrl_c_in_the_middle_leaves_nothing_even_from_a_background_job(
    tmp_path: Path, migrated_database: Path
) -> None:
    """A shell starts a background job with SIGINT ignored; Prefect's worker would then never end."""
    repository = make(tmp_path / "repository", "good", "slow")
    shutil.copy(migrated_database, Home.of(repository).prefect / "prefect.db")
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    output = tmp_path / "output"
    with output.open("wb") as stream:
        demo = subprocess.Popen(
            [sys.executable, "-c", ignoring, *command("demo")],
            cwd=repository,
            env=variables(),
            stdout=stream,
            stderr=stream,
        )
    try:
        until(lambda: "slow: Running" in output.read_text() or demo.poll() is not None, seconds=400)
        assert demo.poll() is None, output.read_text()
        port = json.loads((repository / ".tidepool" / "demo.json").read_text())["port"]

        second = subprocess.run(
            command("demo"), cwd=repository, env=variables(), capture_output=True, text=True, check=False, timeout=300
        )
        assert second.returncode == 1
        there = f"at http://127.0.0.1:{port}; stop it with Ctrl-C there"
        assert second.stderr == f"tidepool: a demo of this repository is already running {there}\n"

        run = subprocess.run(
            command("run", "good", "--json"),
            cwd=repository,
            env=variables(PREFECT_HOME=str(tmp_path / "elsewhere")),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        identity = json.loads(run.stdout)["flow_run_id"]
        assert httpx.get(f"http://127.0.0.1:{port}/api/flow_runs/{identity}").status_code == httpx.codes.OK
        assert len(processes_of(repository)) >= 4  # server, worker, run, and the run's own child
    finally:
        demo.send_signal(signal.SIGINT)
        demo.wait(300)
    assert demo.returncode == 130, output.read_text()
    assert processes_of(repository) == []
    with sqlite3.connect(repository / ".tidepool" / "prefect" / "prefect.db") as database:
        states = database.execute("select f.name, r.state_type from flow_run r join flow f on f.id = r.flow_id")
        assert ("slow-flow", "CANCELLED") in states.fetchall()
    database.close()


def test_a_port_in_use_is_refused_and_the_usual_one_replaced(tmp_path: Path) -> None:
    repository = make(tmp_path / "repository", "good")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert free_port(port) != port
        done = subprocess.run(
            command("demo", "--port", str(port)),
            cwd=repository,
            env=variables(),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    problem = f"port {port} is already in use; choose another one, or omit --port for any free one"
    assert done.stderr == f"tidepool: {problem}\n"


def test_a_demo_ends_the_orphaned_processes_of_a_killed_one(tmp_path: Path) -> None:
    """The grandchild has a session of its own and no parent: only the mark finds it."""
    home = Home.of(tmp_path)
    (tmp_path / "leave.py").write_text(
        "import subprocess, sys, time\n"
        "code = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'\n"
        "subprocess.Popen([sys.executable, '-c', code], start_new_session=True)\n"
    )
    processes = Processes(home.logs, {"PREFECT_HOME": str(home.prefect)})
    processes.start("leave", "leave", cwd=tmp_path)
    processes.wait("leave", 60)
    assert len(processes_of(tmp_path)) == 1
    home.record.write_text(json.dumps({"port": 1, "mark": processes.mark}))
    with home.only_demo():
        assert processes_of(tmp_path) == []
        with pytest.raises(UsageError, match="a demo of this repository is already running; stop it"), home.only_demo():
            pass
    assert not home.record.exists()


def test_a_process_that_fails_shows_its_output(tmp_path: Path) -> None:
    processes = Processes(Home.of(tmp_path).logs, {})
    processes.start("deploy", "no_such_module", cwd=tmp_path)
    with pytest.raises(TidepoolError, match=r"^deploy failed with exit code 1; its output:\n.*no_such_module"):
        processes.wait("deploy", 60)
    processes.start("server", "no_such_module", cwd=tmp_path)
    with pytest.raises(TidepoolError, match=r"^server ended with exit code 1"):
        until(lambda: processes.check() is not None)  # type: ignore[func-returns-value]
    processes.stop_all()


def _ended(state: State) -> FlowRun:
    return FlowRun(flow_id=uuid4(), state=state, state_name=state.name, state_type=state.type)


def _printed(runs: dict[str, FlowRun]) -> tuple[int, list[str]]:
    out = Console(file=StringIO(), width=160)
    code = _summary(runs, {run.id: uuid4() for run in runs.values()}, "http://127.0.0.1", out)
    return code, [line.strip() for line in out.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_summary_is_green_only_if_all_are() -> None:
    good = {"a": _ended(Completed())}
    bad = {"b": _ended(Crashed(message="exit code -9 [bold]"))}
    for runs, code, last in ((good, 0, "1 of 1 Completed"), (good | bad, 1, "1 of 2 Completed")):
        found, lines = _printed(runs)
        assert (found, lines[-1]) == (code, last)
        assert ("b: Crashed: exit code -9 [bold]" in lines) is (code == 1)


def test_an_incident_is_green_only_if_it_ended_as_it_was_meant_to() -> None:
    good = {"a": _ended(Completed())}
    said = "samples/x.csv: line 1, column 1: 'number' is not an integer"
    name = "csv-etl: bad input"
    for state, code in ((Failed(message=said), 0), (Failed(message="disk full"), 1), (Completed(message=said), 1)):
        found, lines = _printed(good | {name: _ended(state)})
        assert found == code
        assert lines[-2:] == ["1 of 1 Completed", f"{1 - code} of 1 incidents ended as they were meant to"]
        assert (f"{name}: {state.name}: {state.message}" in lines) is (code == 1)
        assert lines[lines.index("meant to go wrong") + 2] == state.message
        assert lines[lines.index("meant to go wrong") + 3].startswith("http://127.0.0.1/v2/artifacts/artifact/")
