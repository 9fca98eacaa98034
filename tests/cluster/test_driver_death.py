"""A driver that dies while a mapped task computes: no Dask pod stays, and pod, Job and run have one colour."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from processes import SIGNAL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from installed import Platform

# The promise; what it took is printed.
SECONDS = 60


@dataclass
class Death:
    """A running flow run with a cluster, whose driver is about to die."""

    platform: Platform
    run_id: str
    pod: str

    def kill(self, which: str) -> None:
        """Kill a process of the driver's container; a container that ends with it is not an error."""
        try:
            self.platform.runs.kubectl("exec", self.pod, "--", "python", "-c", SIGNAL, which, str(int(signal.SIGKILL)))
        except RuntimeError as error:
            assert "Traceback" not in str(error), error  # noqa: PT017 - the script's own failure is one

    def job(self) -> str:
        """Return the final condition of the run's Job, or nothing."""
        [job] = self.platform.runs.get("jobs", f"prefect.io/flow-run-id={self.run_id}")
        conditions = {each["type"] for each in job["status"].get("conditions", []) if each["status"] == "True"}
        return next(iter(conditions & {"Complete", "Failed"}), "")

    def ended(self) -> dict[str, Any]:
        """Return how the driver's container ended."""
        [pod] = self.platform.runs.get("pods", f"prefect.io/flow-run-id={self.run_id}")
        assert pod["status"]["phase"] == "Failed", pod["status"]
        return dict(pod["status"]["containerStatuses"][0]["state"]["terminated"])

    def nothing_is_left(self, what: str) -> None:
        """Wait until no Dask object exists, the run is Crashed and its Job Failed; print how long it took."""
        began, platform, took = time.monotonic(), self.platform, {}
        wanted = {
            "no Dask object": lambda: not platform.runs.dask(),
            "run Crashed": lambda: platform.state(self.run_id) == "CRASHED",
            "Job Failed": lambda: self.job() == "Failed",
        }

        def reached() -> bool:
            for name, condition in wanted.items():
                if name not in took and condition():
                    took[name] = time.monotonic() - began
            return took.keys() == wanted.keys()

        platform.until(reached, f"{what}: {', '.join(wanted)}", SECONDS)
        figures = ", ".join(f"{name} after {seconds:.1f} s" for name, seconds in took.items())
        sys.__stderr__.write(f"{what}: {figures}: {platform.run(self.run_id)['state']['message']}\n")


@pytest.fixture
def death(platform: Platform) -> Iterator[Death]:
    run_id = platform.start("weekly-forecast/weekly-forecast", windows=52, horizon=1)
    platform.until(lambda: "is ready" in platform.logs(run_id), "its cluster is ready", 300)
    task_runs = {"flow_runs": {"id": {"any_": [run_id]}}, "task_runs": {"name": {"like_": "backtest-"}}}
    platform.until(lambda: platform.post("task_runs/count", task_runs), "mapped tasks compute", 120)
    [pod] = platform.runs.get("pods", f"prefect.io/flow-run-id={run_id}")
    yield Death(platform, run_id, pod["metadata"]["name"])
    platform.until(lambda: not platform.runs.dask(), "no Dask object is left", 700)


def test_the_process_of_the_flow_is_killed(death: Death) -> None:
    death.kill("engine")
    death.nothing_is_left("engine killed")
    assert death.ended()["exitCode"] == 137
    assert "deleted: the process of its flow run ended without closing it" in death.platform.logs(death.run_id)


def test_the_process_that_supervises_is_killed(death: Death) -> None:
    """Nothing in the pod can act; the operator does."""
    death.kill("main")
    death.nothing_is_left("supervisor killed")
    assert death.ended()["exitCode"] == 137


def test_the_pod_is_deleted_by_force(death: Death) -> None:
    death.platform.runs.kubectl("delete", "pod", death.pod, "--force", "--grace-period=0")
    death.nothing_is_left("pod deleted by force")


def test_a_flow_that_fails_by_itself_is_red_in_kubectl(platform: Platform) -> None:
    run_id = platform.start("csv-etl/csv-etl", source="samples/absent.csv")
    assert platform.wait(run_id)["state_type"] == "FAILED"
    failed = Death(platform, run_id, "")
    assert platform.until(failed.job, "its Job has ended", 60) == "Failed"
    assert failed.ended()["exitCode"] == 1
    assert platform.state(run_id) == "FAILED", "it stays what the flow reported"
