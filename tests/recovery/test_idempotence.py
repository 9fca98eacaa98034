"""Each flow twice with one flow run id, and killed half-way and retried: the same files, and nothing done twice."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.states import Pending

from tests.polling import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun

pytestmark = [pytest.mark.usefixtures("prefect_server", "storage_root"), pytest.mark.timeout(400)]

TOP = Path(__file__).parents[2]
TAXI = "samples/nyc_taxi_2019-03_sample.csv"


@dataclass(frozen=True)
class Case:
    """A flow with real input.

    Attributes:
        entrypoint: As in prefect.yaml.
        parameters: Enough to take some seconds.
        items: Folder with a file for each finished item.
        present: Task runs of a retry that the flow itself makes Cached: a download that is complete.
        environment: Further settings.
    """

    entrypoint: str
    parameters: dict[str, Any]
    items: str = "results"
    present: int = 0
    environment: dict[str, str] = field(default_factory=dict)


CASES = {
    "csv-etl": Case("flows.csv_etl.flow.csv_etl", {"source": "samples/integers.csv"}, items="csv_etl"),
    "image-etl": Case(
        "flows.image_etl.flow.image_etl", {"data_url": "samples/image-data.img", "n_workers": 2}, present=1
    ),
    "most-generous-riders": Case("flows.taxi.flow.most_generous_riders", {"source": TAXI, "nrows": 300}),
    "taxi-tip-amounts": Case("flows.taxi.flow.taxi_tip_amounts", {"source": TAXI}),
    "ticket-model-evaluation": Case(
        "flows.tickets.flow.ticket_model_evaluation",
        {"source": "samples/incident_event_log.csv", "resamples": 2000, "seed": 7},
        environment={"TIDEPOOL_COMPUTE_INLINE_ROWS": "1"},
    ),
    "weekly-forecast": Case(
        "flows.forecast.flow.weekly_forecast", {"models": ["last-value", "theta", "holt-winters"], "horizon": 4}
    ),
}


@dataclass
class Run:
    """A flow run that is executed several times, each time by a process of its own, as in a pod."""

    case: Case
    flow_run: FlowRun
    root: Path

    @classmethod
    def create(cls, name: str, root: Path) -> Run:
        """Create a deployment of the flow and a run of it."""
        case = CASES[name]
        with get_client(sync_client=True) as client:
            deployment = client.create_deployment(
                flow_id=client.create_flow_from_name(name),
                name=name,
                entrypoint=case.entrypoint,
                parameters=case.parameters,
            )
            return cls(case, client.create_flow_run_from_deployment(deployment, state=Pending()), root)

    def start(self) -> subprocess.Popen[bytes]:
        """Execute it; its cluster is in processes of this machine."""
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(self.flow_run.id, Pending(), force=True)
        environment = {
            **os.environ,
            "PREFECT__FLOW_RUN_ID": str(self.flow_run.id),
            "PREFECT__FLOW_ENTRYPOINT": self.case.entrypoint,
            "TIDEPOOL_COMPUTE_PROVIDER": "local",
            **self.case.environment,
        }
        with self.root.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "prefect.engine"],
                cwd=TOP, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def execute(self) -> None:
        """Execute it to its end."""
        assert self.start().wait(200) == 0, self.root.with_suffix(".log").read_text()
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(self.flow_run.id).state
        assert state is not None
        assert state.is_completed(), f"{state}\n{self.root.with_suffix('.log').read_text()}"

    def kill_half_way(self) -> None:
        """Execute it until its first item is finished, and kill the process and its Dask workers."""
        process = self.start()
        deadline = time.monotonic() + 120
        while not self.items():
            assert process.poll() is None, self.root.with_suffix(".log").read_text()
            assert time.monotonic() < deadline, self.root.with_suffix(".log").read_text()
            time.sleep(0.002)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        for each in family:
            if each.is_running():
                each.kill()
        process.wait()
        psutil.wait_procs(family, timeout=20)

    def items(self) -> dict[str, int]:
        """Return the finished items, and when each was finished (ns)."""
        files = (path for path in (self.root / self.case.items).rglob("*") if path.is_file())
        return {path.name: path.stat().st_mtime_ns for path in files if not path.name.startswith(".")}

    def outputs(self) -> dict[str, str]:
        """Return hashes of its files by name, without what is its own id in either, or the time of its schedule."""
        ids = (str(self.flow_run.id), str(uuid5(UUID(str(self.flow_run.id)), "ticket-model-evaluation")))
        with get_client(sync_client=True) as client:
            due = client.read_flow_run(self.flow_run.id).expected_start_time
        assert due is not None

        def neutral(text: str) -> str:
            for each in ids:
                text = text.replace(each, "ID")
            return text.replace(f"{due:%Y-%m-%d %H:%M:%S}", "TIME")

        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if path.is_file() and not name.startswith("results/"):
                content = path.read_bytes()
                if path.suffix == ".json":
                    content = neutral(content.decode()).encode()
                found[neutral(name)] = hashlib.sha256(content).hexdigest()
        return found

    def cached(self) -> int:
        """Return how many of its task runs were taken from an earlier attempt."""
        query = {
            "flow_runs": {"id": {"any_": [str(self.flow_run.id)]}},
            "task_runs": {"state": {"name": {"any_": ["Cached"]}}},
        }
        with get_client(sync_client=True) as client:
            return int(client.request("POST", "/task_runs/count", json=query).json())


@pytest.fixture
def root(storage_root: str) -> Iterator[Path]:
    path = Path(storage_root.removeprefix("file://"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("name", CASES)
def test_a_flow_that_is_killed_and_retried_gives_the_same_and_does_nothing_twice(name: str, root: Path) -> None:
    whole = Run.create(name, root)
    whole.execute()
    expected, finished = whole.outputs(), whole.items()
    assert expected
    whole.execute()
    assert whole.outputs() == expected, "executed twice with one id"
    assert whole.items() == finished, "an item was done again"
    if whole.case.items == "results":
        # Of the second execution: all that was kept.
        until(whole.cached, lambda count: count == len(finished) + whole.case.present)

    shutil.rmtree(root)
    killed = Run.create(name, root)
    killed.kill_half_way()
    before = killed.items()
    killed.execute()
    after = killed.items()
    assert killed.outputs() == expected
    assert {item: after[item] for item in before} == before, "a finished item was done again"
    if killed.case.items == "results":
        until(killed.cached, lambda count: count == len(before) + killed.case.present)
