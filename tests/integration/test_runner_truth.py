"""What a flow says when its workers or its scheduler die: five ways to use futures, three ways to die, and more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.config
import distributed
import pytest
from prefect import flow, get_client, runtime, task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from tests.polling import until
from tidepool import settings as settings_module
from tidepool.compute.clusters.local import set_dask_defaults
from tidepool.compute.limits import ArgumentRefusedError, ResultRefusedError
from tidepool.compute.runner import backlog, submission, task_runner, tracker
from tidepool.compute.runner.recorder import Recorder
from tidepool.compute.runner.task_runner import TidepoolTaskRunner
from tidepool.compute.runner.worker_loss import ReportingNanny, WorkerLostError
from tidepool.errors import InputError, StorageError, TidepoolError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prefect.client.schemas.objects import TaskRun

    from tidepool.compute.runner.recorder import Conclusion

# On a loaded machine the first task of a cluster takes minutes: its workers import Prefect.
pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def cluster() -> Iterator[distributed.LocalCluster]:
    """Workers that may be killed: their nannies bring them back for the next test."""
    set_dask_defaults(300)
    # Each test ends workers: the next ones are forked from a process that has imported Prefect.
    multiprocessing.set_forkserver_preload(["tidepool.compute.worker.engine"])
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            worker_class=ReportingNanny,
            scheduler_kwargs={"allowed_failures": 0},
            memory_limit="700MiB",
        ) as running,
    ):
        yield running


@pytest.fixture
def runner(cluster: distributed.LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[TidepoolTaskRunner]:
    monkeypatch.setenv("TIDEPOOL_COMPUTE_WORKER_LOSSES", "2")
    settings_module.settings.cache_clear()
    yield TidepoolTaskRunner(address=cluster.scheduler_address)
    settings_module.settings.cache_clear()


@task
def die(number: int, way: str = "kill") -> int:
    """The first of them takes its worker with it."""
    if number == 0:
        if way == "exit":
            os._exit(7)
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        hoard = []
        while True:
            hoard.append(os.urandom(1) * 20_000_000)
            time.sleep(0.01)
    return number


@task
def after() -> str:
    return "ran"


def _task_states(state: Any, count: int, *, crashed: bool = False) -> dict[str, list[str]]:
    """Names of states by task, when all are final on the server or will never run, and if asked for one is Crashed."""

    def settled(run: TaskRun) -> bool:
        return bool(run.state and (run.state.is_final() or run.state.name == "NotReady"))

    runs = until(
        lambda: _task_runs(state.state_details.flow_run_id),
        lambda runs: (
            len(runs) >= count
            and all(settled(run) for run in runs)
            and (not crashed or "Crashed" in {run.state_name for run in runs})
        ),
        seconds=90,
    )
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(run.name.rsplit("-", 1)[0], []).append(str(run.state_name))
    return {name: sorted(states) for name, states in found.items()}


def _task_runs(flow_run_id: Any) -> list[TaskRun]:
    with get_client(sync_client=True) as client:
        return client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))


def _not_collected() -> str:
    die.map([0, 1, 2])
    return "done"


def _waited() -> str:
    die.map([0, 1, 2]).wait()
    return "done"


def _returned() -> Any:
    return die.map([0, 1, 2])


def _result() -> list[int]:
    return die.map([0, 1, 2]).result()


def _downstream() -> Any:
    return after.submit(wait_for=die.map([0, 1, 2]))


@pytest.mark.parametrize("body", [_not_collected, _waited, _returned, _result], ids=lambda body: body.__name__[1:])
def test_a_killed_worker_is_never_green(runner: TidepoolTaskRunner, body: Callable[[], Any]) -> None:
    state = flow(task_runner=runner, name=body.__name__)(body)(return_state=True)

    assert state.is_failed()
    states = _task_states(state, 2 if body is _result else 3, crashed=body is _result)["die"]
    if body is _result:
        # The flow fails with the first error that it collects: by then, a task that shared both lost workers is in
        # flight, or has not begun and is unknown to the server.
        assert set(states) <= {"Completed", "Cancelled", "Crashed"}
        assert states.count("Crashed") == 1
    else:
        assert states == ["Completed", "Completed", "Crashed"]


def test_a_flow_run_that_prefect_completes_unasked_is_corrected(
    runner: TidepoolTaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade of Prefect may no longer ask; then the public client of the runner says Failed."""
    monkeypatch.setattr(task_runner, "TidepoolTaskRunner", int)  # the check finds no runner of ours

    flow_runs: list[Any] = []

    def body() -> str:
        flow_runs.append(runtime.flow_run.id)
        die.map([0, 1, 2])
        return "done"

    with pytest.raises(WorkerLostError, match="1 task runs did not survive"):
        flow(task_runner=runner, name="unasked")(body)()
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_runs[0]).state
    assert state is not None
    assert state.is_failed()
    assert "1 task runs did not survive" in str(state.message)


def test_what_waits_for_a_lost_task_does_not_run(runner: TidepoolTaskRunner) -> None:
    state = flow(task_runner=runner, name="downstream")(_downstream)(return_state=True)

    assert state.is_failed()
    assert _task_states(state, 4) == {"after": ["NotReady"], "die": ["Completed", "Completed", "Crashed"]}


@pytest.mark.parametrize(("way", "words"), [("exit", "exit code 7"), ("memory", "out of memory (137)")])
def test_the_reason_is_in_words(runner: TidepoolTaskRunner, way: str, words: str) -> None:
    @flow(task_runner=runner)
    def body() -> int:
        return die.submit(0, way).result()

    state = body(return_state=True)
    with pytest.raises(WorkerLostError, match="worker lost 2 times while running this task; last exit: ") as raised:
        state.result()
    assert words in str(raised.value)


class Deadly:
    """An argument that ends the process that reads it, before the task begins."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_what_dies_before_its_task_begins_is_not_sent_for_ever(runner: TidepoolTaskRunner) -> None:
    """Attempts were counted when the task had begun; one that never began took worker after worker."""

    @task
    def take(_value: Any) -> None:
        """Never reached."""

    state = flow(task_runner=runner, name="deadly")(lambda: take.submit(Deadly()).wait())(return_state=True)
    assert state.is_failed()
    assert "worker lost 2 times while running this task" in state.message
    # Not read from what was sent: that would be the end of this process, too.
    assert "item: _value=<Deadly>" in state.message


def test_a_lost_worker_is_another_try_elsewhere(runner: TidepoolTaskRunner, tmp_path: Path) -> None:
    @task
    def once(number: int) -> int:
        marker = tmp_path / "died"
        if number == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    @flow(task_runner=runner)
    def body() -> list[int]:
        return after_all.map(once.map(range(4))).result()

    @task
    def after_all(number: int) -> int:
        return number + 1

    state = body(return_state=True)
    assert state.result() == [1, 2, 3, 4]
    assert set(_task_states(state, 8)["once"]) == {"Completed"}


def test_a_task_with_more_retries_loses_more_workers(runner: TidepoolTaskRunner, tmp_path: Path) -> None:
    @task(retries=2)
    def at_last() -> int:
        deaths = len(list(tmp_path.iterdir()))
        if deaths < 2:
            (tmp_path / str(deaths)).touch()
            os._exit(1)
        return deaths

    state = flow(task_runner=runner, name="retries")(lambda: at_last.submit().result())(return_state=True)
    assert state.result() == 2


def test_who_looks_at_the_loss_may_go_on(runner: TidepoolTaskRunner) -> None:
    def body() -> str:
        return type(die.submit(0).result(raise_on_failure=False)).__name__

    state = flow(task_runner=runner, name="looks")(body)(return_state=True)
    assert state.result() == "WorkerLostError"


def test_a_failed_flow_leaves_no_task_run_open(runner: TidepoolTaskRunner) -> None:
    @task
    def long(_number: int) -> None:
        time.sleep(20)

    def body() -> None:
        futures = long.map(range(2))
        while not any(future.state.is_running() for future in futures):
            time.sleep(0.1)
        raise ValueError("enough")

    state = flow(task_runner=runner, name="fails")(body)(return_state=True)
    assert state.is_failed()
    assert set(_final_states(state.state_details.flow_run_id)) <= {"Cancelled"}


def _final_states(flow_run_id: Any) -> list[str]:
    runs = until(
        lambda: _task_runs(flow_run_id), lambda runs: runs and all(run.state and run.state.is_final() for run in runs)
    )
    return [str(run.state_name) for run in runs]


# --- a scheduler that dies ------------------------------------------------------------------------


WORKER = ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--death-timeout", "60"]


@pytest.fixture
def mortal_scheduler(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler in a process of its own with one worker: address and process."""
    announced = tmp_path / "scheduler.json"
    dask = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--no-dashboard",
        "--port",
        "0",
        "--host",
        "127.0.0.1",
    ]
    scheduler = subprocess.Popen([*dask, "--scheduler-file", str(announced)])
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(announced), *WORKER]
    )
    try:
        until(lambda: announced.exists() and announced.stat().st_size)
        address = dask_address(announced)
        yield address, scheduler
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()


def dask_address(announced: Path) -> str:
    import json

    return str(json.loads(announced.read_text())["address"])


def test_a_lost_scheduler_crashes_what_was_running(
    mortal_scheduler: tuple[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, scheduler = mortal_scheduler
    pid = scheduler.pid  # the flow travels with what its function refers to
    monkeypatch.setenv("TIDEPOOL_COMPUTE_CLOSE_SECONDS", "10")
    settings_module.settings.cache_clear()

    @task
    def long(_number: int) -> None:
        time.sleep(60)

    @flow(task_runner=TidepoolTaskRunner(address=address, client_kwargs={"timeout": 2}))
    def body() -> str:
        futures = long.map(range(2))
        while not any(future.state.is_running() for future in futures):
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        futures.wait()
        return "done"

    state = body(return_state=True)
    assert state.is_failed()
    assert f"the connection to the Dask scheduler at {address} was lost" in state.message
    assert set(_final_states(state.state_details.flow_run_id)) == {"Crashed"}
    settings_module.settings.cache_clear()


# --- what is too large, and the end ---------------------------------------------------------------


def test_large_arguments_and_results_are_refused_with_advice(cluster: distributed.LocalCluster) -> None:
    @task
    def take(number: int, frame: bytes = b"") -> int:
        return number + len(frame)

    @task(retries=3)
    def give(size: int) -> bytes:
        return b"x" * size

    @flow(task_runner=TidepoolTaskRunner(address=cluster.scheduler_address))
    def body() -> list[BaseException]:
        refused: list[BaseException] = []
        for call in (
            lambda: take.submit(1, b"x" * 400_000),
            lambda: take.map([1, 2], b"x" * 400_000),
            lambda: give.submit(400_000).result(),
        ):
            try:
                call()
            except (ArgumentRefusedError, ResultRefusedError) as error:
                refused.append(error)
        assert give.submit(100_000).result() == b"x" * 100_000
        return refused

    texts = [str(error) for error in body()]
    assert texts[0] == texts[1]
    assert texts[0].startswith(
        "argument `frame` of task `take` has 390.6 KiB, the limit is 256.0 KiB: write it to the store"
    )
    assert texts[2].startswith("the result of task `give` has 390.6 KiB")


@pytest.mark.parametrize(("kind", "tries"), [(InputError, 1), (UsageError, 1), (StorageError, 3)])
def test_an_error_that_another_try_does_not_change_is_not_retried(
    cluster: distributed.LocalCluster, tmp_path: Path, kind: type[TidepoolError], tries: int
) -> None:
    @task(retries=2)
    def refuse() -> None:
        with (tmp_path / "tries").open("a") as file:
            file.write("x")
        raise kind("line 3: 'x7' is not an integer")

    @flow(task_runner=TidepoolTaskRunner(address=cluster.scheduler_address))
    def body() -> None:
        refuse.submit().wait()

    body(return_state=True)
    assert (tmp_path / "tries").read_text() == "x" * tries


class FailingClose(distributed.LocalCluster):
    """A cluster that does not close as it should."""

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        raise OSError("cannot close")


def failing_cluster(**options: Any) -> FailingClose:
    return FailingClose(processes=False, dashboard_address="127.0.0.1:0", **options)


def test_a_failing_close_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    @flow(task_runner=TidepoolTaskRunner(cluster_class=failing_cluster, cluster_kwargs={"n_workers": 1}))
    def body() -> int:
        return after_error.submit().result()

    @task
    def after_error() -> int:
        raise ValueError("the flow's own")

    state = body(return_state=True)
    with pytest.raises(ValueError, match="the flow's own"):
        state.result()
    assert "Could not close the Dask cluster" in caplog.text


_made: list[distributed.LocalCluster] = []


def noted_cluster(**options: Any) -> distributed.LocalCluster:
    """Of the module, not of the test: a runner travels with what its `cluster_class` refers to."""
    _made.append(distributed.LocalCluster(processes=False, dashboard_address="127.0.0.1:0", **options))
    return _made[-1]


@pytest.mark.parametrize("used", [True, False])
def test_a_cluster_may_start_with_the_flow(used: bool) -> None:  # noqa: FBT001
    _made.clear()

    runner = TidepoolTaskRunner(cluster_class=noted_cluster, cluster_kwargs={"n_workers": 1}, start_early=True)

    @flow(task_runner=runner)
    def body() -> str:
        return after.submit().result() if used else "ran"

    assert body() == "ran"
    assert [cluster.status.name for cluster in _made] == ["closed"]


def test_a_terminated_process_closes_its_cluster_and_says_so(prefect_server: str, tmp_path: Path) -> None:
    script = tmp_path / "terminated.py"
    script.write_text(TERMINATED)
    child = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PREFECT_API_URL": prefect_server, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    begun = child.stdout.readline().split()
    os.kill(child.pid, signal.SIGTERM)
    rest, _ = child.communicate(timeout=120)
    assert begun[0] == "running"
    assert child.returncode != 0, rest
    worker_pid = int(begun[1])
    # No worker process is left behind.
    until(lambda: not Path(f"/proc/{worker_pid}").exists(), seconds=30)
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(begun[2]).state
    assert state is not None
    assert (state.name, state.message) == ("Crashed", "Execution was aborted by a termination signal.")
    assert _final_states(begun[2]) == ["Cancelled"]


TERMINATED = """
import os, sys, time
from pathlib import Path
from prefect import flow, runtime, task
from tidepool.compute.runner.task_runner import TidepoolTaskRunner

@task
def long(folder):
    (Path(folder) / "pid").write_text(str(os.getpid()))
    time.sleep(120)

@flow(task_runner=TidepoolTaskRunner(cluster_kwargs={"n_workers": 1, "dashboard_address": "127.0.0.1:0"}))
def body(folder):
    future = long.submit(folder)
    pid = Path(folder) / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.1)
    print("running", pid.read_text(), runtime.flow_run.id, flush=True)
    future.wait()

if __name__ == "__main__":
    import tempfile
    body(tempfile.mkdtemp())
"""


# --- a server that lags ---------------------------------------------------------------------------


@pytest.mark.parametrize("follows", [True, False])
def test_back_pressure_keeps_within_what_the_server_records(
    runner: TidepoolTaskRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, follows: bool
) -> None:
    """Of 10,000 no-op task runs, the server had dropped the ends of 4,600: it was more than 10,000 events behind."""
    monkeypatch.setattr(tracker, "_OPEN", 6)
    monkeypatch.setattr(backlog, "_AHEAD", 4)
    monkeypatch.setattr(submission, "_GRAPH_TASKS", 2)
    send, has_recorded, looked_at = tracker.Tracker._send, Recorder.has_recorded, Recorder._record_unsent
    open_at_once: list[int] = []
    waited: list[float] = []
    looked: list[int] = []

    def counted(self: tracker.Tracker, futures: list[Any]) -> None:
        open_at_once.append(len(self._open))
        send(self, futures)

    def ask(self: Recorder, ended: Conclusion, seconds: float) -> bool:
        waited.append(seconds)
        return follows and has_recorded(self, ended, seconds)

    def look(self: Recorder, ended: list[Conclusion], seconds: float) -> None:
        looked.append(len(ended))
        looked_at(self, ended, seconds)

    monkeypatch.setattr(tracker.Tracker, "_send", counted)
    monkeypatch.setattr(Recorder, "has_recorded", ask)
    monkeypatch.setattr(Recorder, "_record_unsent", look)

    @flow(task_runner=runner)
    def body() -> list[int]:
        return die.map(range(1, 25)).result()

    state = body(return_state=True)
    assert state.result() == list(range(1, 25))
    assert 4 < max(open_at_once) <= 7
    assert len(waited) >= 3
    # A server that does not follow is waited for once.
    assert waited == [60.0] * len(waited) if follows else waited == [60.0] + [0.0] * (len(waited) - 1)
    # What the server has not followed is looked for before the flow run is Completed.
    assert bool(looked) is not follows
    assert ("continuing without back-pressure" in caplog.text) is not follows
    assert _task_states(state, 24) == {"die": ["Completed"] * 24}


def test_a_task_that_holds_the_only_worker_does_not_wait_for_its_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "_OPEN", 1)
    monkeypatch.setattr(submission, "_GRAPH_TASKS", 1)

    @task
    def parent() -> str:
        die.map([1, 2, 3])
        return "submitted"

    @flow
    def body() -> str:
        return parent.submit().result()

    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as one:
        nested = body.with_options(task_runner=TidepoolTaskRunner(address=one.scheduler_address))
        assert nested() == "submitted"


class Unreadable:
    """Can be pickled, and not be read again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("x" * 10_000,)


def test_a_result_that_cannot_be_read_is_the_trouble_of_who_asks_for_it(runner: TidepoolTaskRunner) -> None:
    """It crashed the task runs whose states came together with it."""

    @task
    def give(number: int) -> Any:
        return Unreadable() if number == 1 else number

    @flow(task_runner=runner)
    def body() -> list[int]:
        futures = give.map(range(4))
        futures.wait()
        with pytest.raises(ValueError, match="invalid literal"):
            futures[1].result()
        return [futures[number].result() for number in (0, 2, 3)]

    state = body(return_state=True)
    assert state.result() == [0, 2, 3]
    assert _task_states(state, 4) == {"give": ["Completed"] * 4}


def test_finished_task_runs_take_little_room_in_the_driver(runner: TidepoolTaskRunner) -> None:
    @task
    def give(number: int) -> int:
        return number

    @flow(task_runner=runner)
    def body() -> list[bool]:
        futures: Any = give.map(range(4))
        assert futures.result() == [0, 1, 2, 3]
        kept = [len(future.outcome.header) + len(future.outcome.data) for future in futures]
        assert max(kept) < 1000
        return [future.submission is None and future.sent is None for future in futures]

    assert body() == [True] * 4
