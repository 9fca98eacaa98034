"""The engine that a flow run's first process has forked: as one that was started, and gone when it is not needed."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.states import Cancelling

from tests.integration.flow_run_process import Pod
from tests.polling import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun

PULL = [{"prefect.deployments.steps.set_working_directory": {"directory": "."}}]
# Of one run, or of one process.
OWN = {"PREFECT__FLOW_RUN_ID", "TIDEPOOL_REPORT_RECORD", "HOOK", "PROCESSES", "PYTHONPATH", "WITH_A_THREAD"}


@pytest.fixture
def pod(tmp_path: Path, prefect_server: str) -> Pod:
    return Pod(tmp_path, prefect_server)


def told(pod: Pod) -> dict[str, Any]:
    executed = pod.execute("tells")
    assert executed.code == 0, executed.output
    found: dict[str, Any] = json.loads(executed.hook)
    return found


def test_a_forked_engine_is_what_a_started_one_is(tmp_path: Path, prefect_server: str) -> None:
    more = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "PREFECT_LOGGING_EXTRA_LOGGERS": "x"}
    forked = told(Pod(tmp_path / "forked", prefect_server, **more))
    started = told(Pod(tmp_path / "started", prefect_server, WITH_A_THREAD="1", **more))
    for each, name in ((forked, "forked"), (started, "started")):
        assert each["environment"]["TIDEPOOL_REPORT_RECORD"] in each.pop("tidepool")
        assert each["leads"]
        assert each["name"] == "tidepool-engine\n"
        folder = each.pop("folder")
        # Python and Prefect name the folder more than once.
        paths = dict.fromkeys(path.replace(folder, "FOLDER").replace(f"/{name}/", "/") for path in each["path"])
        each["path"] = list(paths)
        path = each["environment"]["PYTHONPATH"]
        each["PYTHONPATH"] = path.replace(folder, "FOLDER").replace(f"/{name}/", "/")
        each["environment"] = {key: value for key, value in each["environment"].items() if key not in OWN}
    # Its parent's folder is the last one, in case a .pth file names it.
    assert forked.pop("path")[:-1] == started.pop("path")
    assert forked == started


def test_a_run_is_cancelled_in_a_forked_engine(pod: Pod) -> None:
    flow_run = pod.create("waits")
    process = pod.start(flow_run)
    until(pod.hook.exists, seconds=120)
    [engine] = psutil.Process(process.pid).children()
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Cancelling())
    executed = pod.end(flow_run, process)
    assert (executed.flow_run.state_name, executed.code) == ("Cancelled", 0), executed.output
    assert not engine.is_running()


def test_an_engine_that_could_not_wait_is_started(tmp_path: Path, prefect_server: str) -> None:
    executed = Pod(tmp_path, prefect_server, FORKED_WITHOUT="prefect.task_engine").execute("completes")
    assert (executed.flow_run.state_name, executed.code) == ("Completed", 0), executed.output
    assert executed.processes == ["-m tidepool.operate.flow_run", "-m tidepool.operate.engine"]
    assert "ModuleNotFoundError" in executed.output, "the reason is in the pod's log"


def test_a_run_with_pull_steps_has_no_waiting_engine(pod: Pod) -> None:
    flow_run = pod.create("waits", PULL)
    process = pod.start(flow_run)
    until(pod.hook.exists, seconds=120)
    children = [each.cmdline()[1:3] for each in psutil.Process(process.pid).children()]
    process.send_signal(signal.SIGTERM)
    pod.end(flow_run, process)
    assert children == [["-m", "prefect.engine"]]


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of an API that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/api"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_waiting_engine_ends_with_the_process_that_would_start_it(
    tmp_path: Path, silent: str, number: signal.Signals
) -> None:
    pod = Pod(tmp_path, silent)
    with pod.start(cast("FlowRun", SimpleNamespace(id=uuid4()))) as process:
        [engine] = until(psutil.Process(process.pid).children, seconds=120)
        process.send_signal(number)
    until(lambda: not engine.is_running())


def test_a_run_goes_on_without_the_process_that_supervises_it(pod: Pod) -> None:
    """As it did when that had started the engine; in a pod, the container ends with it."""
    flow_run = pod.create("goes_on")
    go = Path(f"{pod.hook}.go")
    os.mkfifo(go)
    process = pod.start(flow_run)
    until(pod.hook.exists, seconds=120)
    [engine] = psutil.Process(process.pid).children()
    process.kill()
    process.wait()

    def is_read() -> bool:
        with suppress(OSError):  # the flow does not read it yet
            os.close(os.open(go, os.O_WRONLY | os.O_NONBLOCK))
            return True
        return False

    try:
        until(is_read)
        until(pod.hook.read_text, lambda text: text == "goes on")
    finally:
        engine.kill()
    process.communicate()
