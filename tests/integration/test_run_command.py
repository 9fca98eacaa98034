"""`tidepool run`: the result on standard output, the exit code, and the server that records the run."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import sqlite3
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
import pytest
import yaml

from tests.integration.small_repository import command, make, processes_of, variables
from tests.polling import until
from tidepool.local.server import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make(tmp_path / "repository", "good", "bad")


def _run(repository: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("run", *arguments),
        cwd=repository,
        env=variables(**more),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def test_json_is_the_only_thing_on_standard_output(repository: Path, prefect_server: str) -> None:
    done = _run(repository, "good", "-p", "count=4", "--json", PREFECT_API_URL=prefect_server)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run == {
        "flow_run_id": run["flow_run_id"],
        "state": "Completed",
        "result": {"total": 12, "word": "a"},
        "outputs": [f"file://{repository}/.tidepool/storage/good/total.txt"],
        "artifacts": ["good-flow-outputs", "good-flow-rows", "good-flow-run"],
    }
    assert "printed by the flow" in done.stderr
    assert "printed by a child" in done.stderr
    recorded = httpx.get(f"{prefect_server}/flow_runs/{run['flow_run_id']}").json()
    assert (recorded["state"]["type"], recorded["parameters"]["count"]) == ("COMPLETED", 4)


def test_a_failed_run_is_exit_code_1_and_one_sentence(repository: Path, prefect_server: str) -> None:
    done = _run(repository, "bad", "--json", PREFECT_API_URL=prefect_server)
    assert done.returncode == 1
    run = json.loads(done.stdout)
    assert (run["state"], run["result"], run["outputs"], run["artifacts"]) == ("Failed", None, [], ["bad-flow-run"])
    assert done.stderr.splitlines()[-1] == "tidepool: bad ended Failed: line 3, column 2: 'x7' is not an integer"


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("variadic", ["-p", "others=[2, 3]"], [1, [2, 3], "a", {"x": 4}]),
        ("variadic", ["-p", 'labels={"y": 5}'], [1, [2], "a", {"y": 5}]),
        ("later", [], 2),
        ("several", [], [0, 1, 2]),
        ("several-later", [], None),
    ],
)
def test_any_kind_of_flow_function_runs(
    tmp_path: Path, prefect_server: str, name: str, arguments: list[str], result: object
) -> None:
    """`*args` and `**kwargs` were passed by name, and a coroutine was taken for a state."""
    repository = make(tmp_path / "repository", name.replace("-", "_"))
    done = _run(repository, name, *arguments, "--json", PREFECT_API_URL=prefect_server)
    run = json.loads(done.stdout)
    assert (run["result"], done.returncode) == (result, 0 if run["state"] == "Completed" else 1), done.stderr
    if result is None:
        assert done.stderr.splitlines()[-1] == "tidepool: several-later ended Failed: ValueError: no more"


def test_without_json_it_prints_the_result_and_the_outputs(repository: Path, prefect_server: str) -> None:
    done = _run(repository / "environments", "good", "--provider", "threads", PREFECT_API_URL=prefect_server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("good: Completed (flow run ")
    assert '"total": 6' in done.stdout
    assert done.stdout.endswith(f"output: file://{repository}/.tidepool/storage/good/total.txt\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["-p", "count=11"],
            "good-flow: parameter count: input should be less than or equal to 10, not 11 (accepted: an ",
        ),
        (["-p", "cuont=1"], "good-flow: parameter cuont: the flow has no such parameter; did you mean count?"),
    ],
)
def test_a_bad_parameter_runs_nothing(repository: Path, arguments: list[str], sentence: str) -> None:
    """Not even a server: there is none here."""
    done = _run(repository, "good", *arguments, "--json", PREFECT_API_URL="http://127.0.0.1:1/api")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tidepool: {sentence}")
    assert not (repository / ".tidepool").exists()


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"entrypoint": "small_flows:good"}, "'small_flows:good' has a colon; name the function by its module"),
        ({"entrypoint": None}, "deployments[good].entrypoint: must be a module's function, not None"),
        ({"parameters": [3]}, "deployments[good].parameters: must be a mapping, not [3]"),
        (
            {"parameters": {"count": 3, "word": "{{ $SMALL_WORD | default('y') }}"}},
            "parameter word: {{ $SMALL_WORD | default('y') }} has no value here; pass it with -p word=…",
        ),
        (
            {"parameters": {"count": 3, "word": "{{ $SMALL_WORD }}"}},
            "parameter word: {{ $SMALL_WORD }} has no value here; pass it with -p word=…",
        ),
    ],
)
def test_a_deployment_that_cannot_run_is_one_sentence(
    repository: Path, entry: dict[str, object], sentence: str
) -> None:
    manifest = yaml.safe_load((repository / "prefect.yaml").read_text())
    manifest["deployments"][0].update(entry)
    (repository / "prefect.yaml").write_text(yaml.safe_dump(manifest))
    done = _run(repository, "good", PREFECT_API_URL="http://127.0.0.1:1/api")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tidepool: {sentence}")


def test_environment_variables_are_filled_in_as_a_deploy_does(repository: Path, prefect_server: str) -> None:
    manifest = yaml.safe_load((repository / "prefect.yaml").read_text())
    manifest["deployments"][0]["parameters"]["word"] = "{{ $SMALL_WORD }}!"
    (repository / "prefect.yaml").write_text(yaml.safe_dump(manifest))
    done = _run(repository, "good", "--json", PREFECT_API_URL=prefect_server, SMALL_WORD="b")
    assert json.loads(done.stdout)["result"]["word"] == "b!", done.stderr


def test_a_flow_that_cannot_be_imported_is_named(repository: Path) -> None:
    (repository / "small_flows.py").write_text("import no_such_library\n")
    done = _run(repository, "good")
    assert done.returncode == 1
    assert "cannot import flow small_flows.good: ModuleNotFoundError" in done.stderr


def test_an_unreachable_configured_server_is_reported_at_once(repository: Path) -> None:
    done = _run(repository, "good", PREFECT_API_URL="http://127.0.0.1:1/api")
    assert done.returncode == 1
    assert "the Prefect API http://127.0.0.1:1/api (PREFECT_API_URL) does not answer" in done.stderr


def test_without_a_server_it_starts_one_which_ends_and_whose_history_stays(
    repository: Path, migrated_database: Path
) -> None:
    shutil.copy(migrated_database, Home.of(repository).prefect / "prefect.db")
    # PREFECT_HOME elsewhere: the user's own Prefect profile must have no effect. Neither has a proxy: this one is dead.
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "localhost"}
    done = _run(repository, "good", "--json", PREFECT_HOME=str(repository / "elsewhere"), **proxy)
    assert done.returncode == 0, done.stderr
    identity = json.loads(done.stdout)["flow_run_id"].replace("-", "")
    assert processes_of(repository) == []
    with sqlite3.connect(repository / ".tidepool" / "prefect" / "prefect.db") as database:
        states = database.execute("select state_type from flow_run where replace(id, '-', '') = ?", [identity])
        assert states.fetchall() == [("COMPLETED",)]
        logs = database.execute("select count(*) from log where replace(flow_run_id, '-', '') = ?", [identity])
        assert logs.fetchone()[0] > 0
    database.close()


def test_a_flow_runs_by_its_module_without_a_deployment(repository: Path, prefect_server: str) -> None:
    done = _run(repository, "small_flows.later", "-p", "count=5", "--json", PREFECT_API_URL=prefect_server)
    run = json.loads(done.stdout)
    assert (run["result"], run["state"], done.returncode) == (5, "Completed", 0), done.stderr
    done = _run(repository, "small_flows.latre", "--json", PREFECT_API_URL=prefect_server)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("tidepool: cannot import flow small_flows.latre: ")
    done = _run(repository, "small_flows.py:later", PREFECT_API_URL=prefect_server)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Dask workers import it: small_flows.later" in done.stderr


def test_a_breakpoint_in_a_dask_worker_says_what_to_do(tmp_path: Path, prefect_server: str) -> None:
    """Pdb read an empty input there, and the item failed with `BdbQuit`."""
    repository = make(tmp_path / "repository", "stopping")
    done = _run(repository, "stopping", PREFECT_API_URL=prefect_server, TIDEPOOL_COMPUTE_PROVIDER="local")
    assert done.returncode == 1
    reason = done.stderr.splitlines()[-1]
    assert reason.startswith(
        "tidepool: stopping ended Failed: breakpoint() needs a terminal, and a Dask worker has none"
    )
    assert "`tidepool run --debug NAME` runs everything in one process" in reason
    assert " - Retry 1/1 will start" not in done.stderr
    assert "Traceback" not in done.stderr


class _Terminal:
    """`tidepool run --debug` on a terminal of its own."""

    def __init__(self, repository: Path, server: str, name: str) -> None:
        self._terminal, theirs = pty.openpty()
        self.child = subprocess.Popen(
            command("run", name, "--debug", "-p", "word=deep"),
            cwd=repository,
            env=variables(PREFECT_API_URL=server, TIDEPOOL_COMPUTE_PROVIDER="local", TERM="dumb"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._seen: list[bytes] = []

    def write(self, line: bytes) -> None:
        os.write(self._terminal, line)

    def seen(self) -> bytes:
        if select.select([self._terminal], [], [], 0.1)[0]:
            with suppress(OSError):  # the child has ended
                self._seen.append(os.read(self._terminal, 65536))
        return b"".join(self._seen)

    def prompts(self) -> int:
        return self.seen().count(b"(Pdb) ")

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self._terminal)


@pytest.fixture
def terminal(tmp_path: Path, prefect_server: str, request: pytest.FixtureRequest) -> Iterator[_Terminal]:
    name = getattr(request, "param", "stopping")
    opened = _Terminal(make(tmp_path / "repository", name.replace("-", "_")), prefect_server, name)
    yield opened
    opened.close()


def test_debug_stops_at_a_breakpoint_in_a_mapped_task(terminal: _Terminal) -> None:
    for stop in (1, 2):  # one item after the other
        until(terminal.prompts, lambda count, stop=stop: count == 2 * stop - 1, seconds=300)
        terminal.write(b"p word * 2\n")
        until(terminal.prompts, lambda count, stop=stop: count == 2 * stop, seconds=60)
        assert terminal.seen().count(b"'deepdeep'") == stop
        terminal.write(b"continue\n")
    until(terminal.seen, lambda text: b"stopping: Completed" in text and terminal.child.poll() is not None, seconds=120)
    assert terminal.child.returncode == 0


def test_quitting_the_debugger_ends_the_run(terminal: _Terminal) -> None:
    """It failed the item with `BdbQuit`, and opened again for each of its retries, then for the next item."""
    until(terminal.prompts, lambda count: count == 1, seconds=300)
    terminal.write(b"quit\n")
    until(terminal.seen, lambda _: terminal.child.poll() is not None, seconds=60)
    said = terminal.seen()
    assert (terminal.child.returncode, said.count(b"(Pdb) ")) == (130, 1)
    assert b"BdbQuit" not in said
    assert b"Traceback" not in said


def test_an_error_of_the_library_is_logged_as_a_sentence_with_the_flows_line(
    repository: Path, prefect_server: str
) -> None:
    flow = repository / "small_flows.py"
    flow.write_text(
        f"{flow.read_text()}\n\n@flow\ndef missing(name: str = 'nothing.csv') -> int:\n"
        "    from tidepool import storage\n\n    return len(storage.read(name))\n"
    )
    done = _run(repository, "small_flows.missing", PREFECT_API_URL=prefect_server)
    line = len(flow.read_text().splitlines())
    sentence = f"file://{repository}/.tidepool/storage/nothing.csv does not exist"
    assert f"Encountered exception during execution: {sentence} (small_flows.py:{line})" in done.stderr
    assert done.stderr.splitlines()[-1] == f"tidepool: small_flows.missing ended Failed: {sentence}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("terminal", ["stopping-twice"], indirect=True)
def test_quitting_ends_the_run_after_a_breakpoint_of_the_flow_itself(terminal: _Terminal) -> None:
    """The debugger of the main thread kept Ctrl-C for itself, and opened there in place of ending the run."""
    until(terminal.prompts, lambda count: count == 1, seconds=300)
    terminal.write(b"continue\n")
    until(terminal.prompts, lambda count: count == 2, seconds=60)
    terminal.write(b"quit\n")
    until(terminal.seen, lambda _: terminal.child.poll() is not None, seconds=60)
    assert (terminal.child.returncode, terminal.prompts()) == (130, 2)


def test_debug_and_another_provider_exclude_each_other(repository: Path) -> None:
    done = _run(repository, "good", "--debug", "--provider", "local")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tidepool: --debug runs everything in one process: omit --provider local\n"
