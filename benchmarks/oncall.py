"""What the tools of on-call cost: the exporter beside Prefect's own, `tidepool status`, the report of a run.

`python -m benchmarks.oncall [--deployments 200] [--runs 50000] [--database postgresql] [--upstream FOLDER]`

FOLDER is a checkout of PrefectHQ/prometheus-prefect-exporter, which is not on PyPI. Both exporters ask the same server
through a proxy that counts requests; where its requests are counted, an exporter pays for the proxy, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx

from benchmarks.servers import prefect_server
from benchmarks.task_runner import code
from tidepool.local.server import free_port
from tidepool.operate.metrics import PREFIX
from tidepool.report.run_record import Item, RunRecord
from tidepool.settings import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results"
REPEATS = 7
ITEMS = 1000
COPIED = 1000
# Most runs of a day have ended well; some fail, crash, are running or late.
STATES = ("COMPLETED",) * 15 + ("FAILED", "FAILED", "CRASHED", "RUNNING", "PENDING")


class Proxy(ThreadingHTTPServer):
    """Passes requests on, and counts them.

    Args:
        api: The API that it passes them on to.
    """

    daemon_threads = True

    def __init__(self, api: str) -> None:
        self.client = httpx.Client(base_url=api.removesuffix("/api"), timeout=60)
        self.count = 0
        super().__init__(("127.0.0.1", 0), _Pass)

    @property
    def api(self) -> str:
        """Its own address."""
        return f"http://127.0.0.1:{self.server_port}/api"


class _Pass(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.count += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        answer = self.server.client.request(self.command, self.path, content=body, headers=kind)
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("content-type", "application/json"))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def fill(api: str, deployments: int, runs: int, writers: int) -> list[str]:
    """Give a server deployments, and runs in all states, by so many writers; return the ids of the runs."""
    client = httpx.Client(base_url=api, timeout=60)

    def post(path: str, body: Any) -> Any:
        answer = client.post(path, json=body).raise_for_status()
        return answer.json() if answer.content else None

    post("/work_pools/", {"name": "bench", "type": "process"})
    post("/work_pools/bench/workers/heartbeat", {"name": "w"})
    flow = post("/flows/", {"name": "bench"})["id"]
    schedule = {"schedule": {"interval": 3600, "anchor_date": "2026-01-01T00:00:00Z", "timezone": "UTC"}}
    ids = [
        post(
            "/deployments/",
            {
                "name": f"deployment-{number}", "flow_id": flow, "work_pool_name": "bench",
                "tags": ["tier:1", "owner:bench"], "schedules": [{**schedule, "active": True}],
            },
        )["id"]
        for number in range(deployments)
    ]  # fmt: skip

    def run(number: int) -> str:
        state = STATES[number % len(STATES)]
        first = {"state": {"type": "PENDING" if state == "PENDING" else "RUNNING"}}
        made = str(post(f"/deployments/{ids[number % deployments]}/create_flow_run", first)["id"])
        if state not in ("PENDING", "RUNNING"):
            post(f"/flow_runs/{made}/set_state", {"state": {"type": state, "message": "no rows"}, "force": True})
        return made

    with ThreadPoolExecutor(writers) as pool:
        return list(pool.map(run, range(runs)))


async def multiply(database: str, runs: int) -> None:
    """Copy the flow runs of a PostgreSQL server, with their states, until there are as many as that.

    Through the API, 50,000 take as long as everything that is measured afterwards, twice.

    Args:
        database: URL of the server's database.
        runs: How many there are to be.
    """
    import asyncpg

    connection = await asyncpg.connect(database.replace("+asyncpg", ""))

    async def copy(table: str, on: str, **changed: str) -> None:
        found = await connection.fetch(
            "select column_name from information_schema.columns where table_name = $1 and is_generated = 'NEVER'", table
        )
        names = [each["column_name"] for each in found]
        values = ", ".join(changed.get(each, f"o.{each}") for each in names)
        into = f"insert into {table} ({', '.join(names)})"
        await connection.execute(f"{into} select {values} from n join {table} o on {on} = n.old")  # noqa: S608 - names of Prefect's own columns

    counted = "select count(*) from flow_run where not auto_scheduled"
    try:
        await connection.execute("create temp table n (run uuid, old uuid)")
        while (missing := runs - await connection.fetchval(counted)) > 0:
            await connection.execute("delete from n")
            await connection.execute(
                "insert into n select gen_random_uuid(), id from flow_run where not auto_scheduled limit $1", missing
            )
            await copy("flow_run", "o.id", id="n.run", state_id="null", idempotency_key="null")
            await copy("flow_run_state", "o.flow_run_id", id="gen_random_uuid()", flow_run_id="n.run")
            await connection.execute(
                "update flow_run f set state_id = s.id from n, flow_run_state s, flow_run o where f.id = n.run "
                "and o.id = n.old and s.flow_run_id = n.run and s.timestamp = o.state_timestamp"
            )
        await connection.execute("analyze")
    finally:
        await connection.close()


@contextmanager
def exporter(command: list[str], api: str, cwd: Path | None = None) -> Iterator[str]:
    """Run an exporter; yield the address of its page once it answers."""
    port = free_port()
    variables = {**environment(), "PREFECT_API_URL": api, "METRICS_PORT": str(port), "METRICS_ADDR": "127.0.0.1"}
    whole = [each.replace("PORT", str(port)) for each in command]
    process = subprocess.Popen(whole, env=variables, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/metrics"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(url, timeout=60).is_success:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} does not answer")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def scraped(url: str, proxy: Proxy) -> dict[str, Any]:
    """Scrape a page some times; return seconds, and of the last one series, bytes and requests at the server."""
    seconds = []
    # As Prometheus, which keeps its connection.
    with httpx.Client(timeout=60) as client:
        for _ in range(REPEATS):
            before, begun = proxy.count, time.perf_counter()
            page = client.get(url).text
            seconds.append(time.perf_counter() - begun)
            requests = proxy.count - before
    series = sum(bool(line) and not line.startswith("#") for line in page.splitlines())
    return {"scrape_seconds": seconds, "requests_per_scrape": requests, "series": series, "bytes": len(page)}


def next_reading(url: str, last: dict[str, str]) -> dict[str, str]:
    """Wait until our exporter has read the server once more; return its figures about itself."""
    changes, deadline = f"{PREFIX}exporter_last_read_timestamp_seconds", time.monotonic() + 120
    while True:
        lines = httpx.get(url, timeout=60).text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line.startswith(f"{PREFIX}exporter_"))
        if found[changes] != last.get(changes):
            return found
        if time.monotonic() > deadline:
            raise RuntimeError("the exporter does not read the server again")
        time.sleep(0.5)  # between two looks


def measure_exporters(api: str, upstream: Path | None) -> dict[str, Any]:
    """Return the figures of our exporter, and of Prefect's."""
    found: dict[str, Any] = {}
    with Proxy(api) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        own = [sys.executable, "-m", "tidepool.cli", "exporter", "--port=PORT"]
        with exporter(own, proxy.api) as url:
            refreshes, requests = [], []
            figures: dict[str, str] = {}
            for _ in range(REPEATS):
                figures = next_reading(url, figures)
                refreshes.append(float(figures["tidepool_exporter_refresh_seconds"]))
                requests.append(float(figures["tidepool_exporter_refresh_requests"]))
            found["tidepool"] = {"refresh_seconds": refreshes, "requests": max(requests), **scraped(url, proxy)}
        if upstream:
            with exporter([sys.executable, "main.py"], proxy.api, upstream) as url:
                found["upstream"] = scraped(url, proxy)
        proxy.shutdown()
    return found


def measure_status(api: str, run: str) -> dict[str, list[float]]:
    """Return the seconds of `tidepool status`, without and with a run, as a user waits for them."""
    variables = {**environment(), "PREFECT_API_URL": api, "KUBECONFIG": os.devnull}
    found: dict[str, list[float]] = {"overview": [], "run": []}
    for _ in range(REPEATS):
        for name, arguments in (("overview", []), ("run", [run])):
            begun = time.perf_counter()
            command = [sys.executable, "-m", "tidepool.cli", "status", "--json", *arguments]
            done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
            found[name].append(time.perf_counter() - begun)
            if not done.stdout:
                raise RuntimeError(f"tidepool status: {done.stderr}")
            json.loads(done.stdout)
    return found


def measure_report(api: str, runs: list[str]) -> dict[str, Any]:
    """Return what the report costs a run of 1,000 items: microseconds of each, and seconds at the end."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tidepool.report import run_report

    published, noted = [], []
    with temporary_settings({PREFECT_API_URL: api}):
        for run in runs[: REPEATS + 1]:
            record = RunRecord()
            begun = time.perf_counter()
            record.submit(ITEMS)
            for number in range(ITEMS):
                record.end(Item(f"item: number={number}", time.time(), 0.01, "tcp://127.0.0.1:1", 1, ""))
            noted.append((time.perf_counter() - begun) / ITEMS)
            begun = time.perf_counter()
            run_report.publish(UUID(run), record)
            published.append(time.perf_counter() - begun)
    # The first one imports.
    return {"seconds_per_item": noted[1:], "publish_seconds": published[1:], "first_publish_seconds": published[0]}


def page(found: dict[str, Any]) -> str:
    """Return the table as Markdown."""

    def median(values: list[float], unit: float = 1.0) -> str:
        low, middle, high = (f(values) * unit for f in (min, statistics.median, max))
        return f"{middle:.3g} ({low:.3g}-{high:.3g})"

    own, upstream = found["exporters"]["tidepool"], found["exporters"].get("upstream")
    lines = [
        "# What on-call's tools cost",
        "",
        (
            f"`python -m benchmarks.oncall`: {found['deployments']} deployments with hourly schedules, "
            f"{found['runs']:,} runs, {found['database']}, {os.cpu_count()} cores shared by all. Median of {REPEATS}, "
            f"lowest and highest. Code measured: {found['code']}; load {found['load']}."
        ),
        "",
        "| exporter | a scrape (ms) | requests of a scrape | reading in the background (s) | its requests | series |",
        "|---|---|---|---|---|---|",
        (
            f"| tidepool | {median(own['scrape_seconds'], 1000)} | {own['requests_per_scrape']} "
            f"| {median(own['refresh_seconds'])} | {own['requests']:.0f} | {own['series']} |"
        ),
    ]
    if upstream:
        lines.append(
            f"| prometheus-prefect-exporter | {median(upstream['scrape_seconds'], 1000)} "
            f"| {upstream['requests_per_scrape']} | - | - | {upstream['series']} |"
        )
    status, report = found["status"], found["report"]
    lines += [
        "",
        "| tool | seconds |",
        "|---|---|",
        f"| `tidepool status`, with the start of Python | {median(status['overview'])} |",
        f"| `tidepool status RUN` | {median(status['run'])} |",
        f"| the report of a run of {ITEMS:,} items, at its end | {median(report['publish_seconds'])} |",
        f"| the same, the first of a process | {report['first_publish_seconds']:.3g} |",
        f"| a mapped item, for the report | {median(report['seconds_per_item'], 1e6)} microseconds |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, writes and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--deployments", type=int, default=200)
    options.add_argument("--runs", type=int, default=50_000)
    options.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    options.add_argument("--upstream", type=Path)
    chosen = options.parse_args()
    with prefect_server(chosen.database) as server:
        print("filling the server", flush=True)
        # Copies of some runs of each deployment in each state are as good as more of them.
        made = min(chosen.runs, COPIED) if server.database else chosen.runs
        runs = fill(server.api, chosen.deployments, made, 4 if server.database else 1)
        if server.database:
            asyncio.run(multiply(server.database, chosen.runs))
        print("measuring", flush=True)
        found = {
            "database": chosen.database,
            "deployments": chosen.deployments,
            "runs": chosen.runs,
            "code": code(),
            "load": round(os.getloadavg()[0], 1),
            "report": measure_report(server.api, runs),
            "status": measure_status(server.api, runs[0]),
            "exporters": measure_exporters(server.api, chosen.upstream),
        }
    (RESULTS / "oncall.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "oncall.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
