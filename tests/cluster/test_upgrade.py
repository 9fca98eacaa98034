"""A chart upgrade while a flow runs, which also moves the flow runs to another namespace."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from installed import TOP, create, filled
from kube import Namespace, command

if TYPE_CHECKING:
    from installed import Platform


NAME = "kubernetes.io/metadata.name"


def upgrade(platform: Platform, *options: str) -> None:
    """Upgrade the release and wait until its pods are ready."""
    chart, namespace = str(TOP / "helm/tidepool"), platform.namespace.name
    command(
        "helm", "upgrade", "tidepool", chart, "--namespace", namespace, "--reuse-values", *options, "--wait",
        "--timeout=5m", timeout=330,
    )  # fmt: skip


def test_a_run_goes_on_when_everything_is_replaced_and_new_runs_start_elsewhere(platform: Platform) -> None:
    namespace, former = platform.namespace, platform.runs
    moved = replace(platform, runs=Namespace(f"{namespace.name}-moved", namespace))
    create(moved.runs, "flow-runs")
    moved.runs.apply(filled("flow-runs.yaml", store="store", team="", platform=namespace.name))
    store = namespace.get("networkpolicies", "app=store")[0]["spec"]
    store["ingress"][0]["from"] = [{"namespaceSelector": {"matchLabels": {NAME: moved.runs.name}}}]
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "store-moved"}}
    namespace.apply({**policy, "spec": store})
    run_id = platform.start("weekly-forecast/weekly-forecast", windows=52, horizon=1)
    platform.until(lambda: "is ready" in platform.logs(run_id), "its cluster is ready", 300)
    before = namespace.names("pods", "app.kubernetes.io/name=tidepool")
    try:
        upgrade(
            platform,
            f"--set=flowRuns.namespace={moved.runs.name}", f"--set=flowRuns.formerNamespaces={{{former.name}}}",
            "--set=server.env.PREFECT_SERVER_LOGGING_LEVEL=WARNING", "--set=operator.resources.requests.cpu=51m",
            "--set=worker.querySeconds=3",
        )  # fmt: skip
        after = namespace.names("pods", "app.kubernetes.io/name=tidepool")
        replaced = {name.split("/")[1].split("-")[1] for name in after - before}
        assert {"server", "worker", "operator"} <= replaced
        run = platform.wait(run_id)
        assert run["state_type"] == "COMPLETED", f"{run['state']}\n{platform.logs(run_id)}\n{namespace.report()}"
        assert run["run_count"] == 1
        platform.until(lambda: not former.dask(), "no Dask object is left in the former namespace", 60)

        next_id = moved.start("csv-etl/csv-etl")
        run = moved.wait(next_id)
        assert run["state_type"] == "COMPLETED", f"{run['state']}\n{moved.logs(next_id)}\n{moved.runs.report()}"
        assert moved.runs.get("jobs", f"prefect.io/flow-run-id={next_id}")

        upgrade(platform, "--set-json=flowRuns.formerNamespaces=[]")
        assert not former.names("roles,rolebindings,serviceaccounts,networkpolicies", "app.kubernetes.io/name=tidepool")
    finally:
        command("kubectl", "delete", "namespace", moved.runs.name, "--timeout=120s", timeout=180)
