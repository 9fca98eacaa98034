"""The cost of the proxy between flow runs and the Prefect API: the same calls and the same flow, with and without it.

`python -m benchmarks.flow_run_api [ROUNDS]` (needs haproxy and helm). Both ways are measured in turns, on one server.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from benchmarks.task_runner_flows import MARK
from tests.integration import flow_run_api
from tests.integration.flow_run_api import PASSWORD, TOKENS
from tidepool.settings import environment

if TYPE_CHECKING:
    import httpx

CALLS = 300
ITEMS = 1000
MOST_MILLISECONDS = 2.0
LEAST_RATIO = 0.95


def call_milliseconds(client: httpx.Client, flow_run_id: str) -> list[float]:
    """Measure one round of calls: one without and one with a rule for its body."""
    ids = {"id": {"any_": [flow_run_id]}, "state": {"type": {"any_": ["CANCELLING"]}}}
    nothing = dict.fromkeys(("task_runs", "deployments", "work_pools", "work_pool_queues", "sort", "limit"))
    begun = time.perf_counter()
    assert client.get(f"/flow_runs/{flow_run_id}").status_code == 404
    then = time.perf_counter()
    answer = client.post("/flow_runs/filter", json={"flows": None, "flow_runs": ids, **nothing, "offset": 0})
    assert answer.status_code == 200, answer.text
    return [1000 * (then - begun), 1000 * (time.perf_counter() - then)]


def map_seconds(api: str, secret: str) -> float:
    """Map no-op tasks in a flow of its own process; return the seconds until their results are there."""
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.task_runner_flows", "tidepool", "map", str(ITEMS)],
        env={**environment(), **flow_run_api.variables(api, secret)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in child.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RuntimeError(child.stderr[-3000:])
    return float(json.loads(lines[0].removeprefix(MARK))["seconds"])


def main() -> None:
    """Measure, print the figures, and fail above the limits."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with (
        tempfile.TemporaryDirectory(prefix="tidepool-bench-", ignore_cleanup_errors=True) as folder,
        flow_run_api.server(Path(folder) / "server") as server,
        flow_run_api.proxy(Path(folder) / "proxy", server.port) as proxy,
    ):
        ways = {"direct": (server.api, PASSWORD), "proxy": (proxy.api, TOKENS[0])}
        times: dict[str, list[list[float]]] = {way: [] for way in ways}
        flow_run_id = str(uuid4())
        with flow_run_api.client(*ways["direct"]) as direct, flow_run_api.client(*ways["proxy"]) as through:
            for _ in range(CALLS):
                times["direct"].append(call_milliseconds(direct, flow_run_id))
                times["proxy"].append(call_milliseconds(through, flow_run_id))
        added = []
        for number, name in enumerate(("GET", "POST with a rule")):
            each = {way: statistics.median(measured[number] for measured in times[way]) for way in ways}
            added.append(each["proxy"] - each["direct"])
            print(f"{name}: {each['direct']:.2f} ms, with proxy {each['proxy']:.2f} ms, {added[-1]:+.2f} ms")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in sorted(ways, reverse=bool(number % 2)):
                seconds[way].append(map_seconds(*ways[way]))
                print(f"{ITEMS} mapped tasks, {way}: {seconds[way][-1]:.2f} s", flush=True)
        ratio = statistics.median(seconds["direct"]) / statistics.median(seconds["proxy"])
        print(f"throughput with the proxy: {ratio:.3f} of without; refused calls: {len(proxy.refused())}")
    if max(added) > MOST_MILLISECONDS or ratio < LEAST_RATIO:
        sys.exit(f"above {MOST_MILLISECONDS} ms per call, or below {LEAST_RATIO} of the throughput")


if __name__ == "__main__":
    main()
