"""A chart upgrade while a flow runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from installed import TOP
from kube import command

if TYPE_CHECKING:
    from installed import Platform


def test_a_run_goes_on_when_server_worker_and_operator_are_replaced(platform: Platform) -> None:
    namespace = platform.namespace
    run_id = platform.start("weekly-forecast/weekly-forecast", windows=52, horizon=1)
    namespace.until(lambda: "is ready" in platform.logs(run_id), "its cluster is ready", 300)
    before = namespace.names("pods", "app.kubernetes.io/name=tidepool")
    command(
        "helm", "upgrade", "tidepool", str(TOP / "helm/tidepool"), "--namespace", namespace.name, "--reuse-values",
        "--set=server.env.PREFECT_SERVER_LOGGING_LEVEL=WARNING", "--set=operator.resources.requests.cpu=51m",
        "--set=worker.querySeconds=3", "--wait", "--timeout=5m", timeout=330,
    )  # fmt: skip
    after = namespace.names("pods", "app.kubernetes.io/name=tidepool")
    replaced = {name.split("/")[1].split("-")[1] for name in after - before}
    assert {"server", "worker", "operator"} <= replaced
    run = platform.wait(run_id)
    assert run["state_type"] == "COMPLETED", f"{run['state']}\n{platform.logs(run_id)}\n{namespace.report()}"
    assert run["run_count"] == 1
