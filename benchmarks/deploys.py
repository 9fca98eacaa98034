"""Deploys with stock Prefect and with tidepool, against a real server whose requests are recorded.

- `python -m benchmarks.deploys rows`: the nine ways in which a stock deploy goes wrong;
- `python -m benchmarks.deploys hundred`: a plan, and an apply with nothing to do, of 100 deployments;
- `python -m benchmarks.deploys kill`: the server is killed in the middle of an apply of 20.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.integration.deploy_support import HOURLY, NIGHTLY, Proxy, Shop, recorded
from tidepool.deploy.client import connect
from tidepool.local.processes import Processes
from tidepool.local.server import Home, Server, free_port, running_server
from tidepool.settings import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_SECONDS = 120


@contextmanager
def running() -> Iterator[tuple[Server, Proxy, Path]]:
    """Run a server on SQLite, behind a proxy that records; give a folder for shops too."""
    with (
        tempfile.TemporaryDirectory(prefix="tidepool-deploys-", ignore_cleanup_errors=True) as folder,
        running_server(Home(Path(folder) / "server")) as server,
        recorded(server.api) as proxy,
    ):
        yield server, proxy, Path(folder)


def command(shop: Shop, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `tidepool …` in the shop's folder."""
    shop.write()
    return subprocess.run(
        [sys.executable, "-m", "tidepool.cli", *arguments], cwd=shop.root, env=_variables(shop), capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def _variables(shop: Shop) -> dict[str, str]:
    return {
        **environment(),
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "TIDEPOOL_DEPLOY_OWNER": shop.owner,
        "TIDEPOOL_DEPLOY_DELETE_SHARE": "1",
    }


class Deploy:
    """One way to deploy: the stock command on a file without the veto, or tidepool."""

    def __init__(self, proxy: Proxy, *, ours: bool, bare: bool) -> None:
        self.proxy, self.ours, self._bare = proxy, ours, bare

    def __call__(self, shop: Shop) -> int:
        """Deploy; return the exit code."""
        if self.ours and not self._bare:
            return command(shop, "apply").returncode
        if not self.ours:
            shop.manifest["build"] = []
        return shop.stock().returncode


def _six(shop: Shop, count: int = 3) -> None:
    for index in range(count):
        shop.deployment(f"d{index}", NIGHTLY, HOURLY)


def unknown_key(shop: Shop, deploy: Deploy) -> str:
    """Misspell a key."""
    _six(shop)
    shop.manifest["deployments"][0]["concurency_limit"] = 1
    return f"exit {deploy(shop)}, {len(shop.deployments())} deployments written"


def bad_second(shop: Shop, deploy: Deploy) -> str:
    """Deploy three, of which the second cannot be imported."""
    _six(shop)
    shop.manifest["deployments"][1]["entrypoint"] = f"{shop.module}.nothing"
    return f"exit {deploy(shop)}, {len(shop.deployments())} of 3 written"


def bad_job_variable(shop: Shop, deploy: Deploy) -> str:
    """Give the last of six a job variable of the wrong type."""
    _six(shop, 6)
    shop.manifest["deployments"][5]["work_pool"]["job_variables"] = {"stream_output": "perhaps"}
    return f"exit {deploy(shop)}, {len(shop.deployments())} of 6 written"


def no_op(shop: Shop, deploy: Deploy) -> str:
    """Deploy again without a change."""
    _six(shop)
    deploy(shop)
    before = _settled(shop)
    deploy.proxy.requests.clear()
    deploy(shop)
    writes = len(deploy.proxy.writes)
    return f"{writes} writes, {len(before & shop.future_runs())} of {len(before)} future runs kept"


def ui_pause(shop: Shop, deploy: Deploy) -> str:
    """Pause a deployment in the UI, then deploy a change of it."""
    _six(shop)
    deploy(shop)
    with connect() as client:
        client.pause_deployment(shop.deployments()["d0"]["id"])
    shop.manifest["deployments"][0]["parameters"] = {"count": 2}
    deploy(shop)
    live = shop.deployments()["d0"]
    return "still paused" if live["paused"] else "running again"


def deployment_removed(shop: Shop, deploy: Deploy) -> str:
    """Remove a deployment from the file."""
    _six(shop)
    deploy(shop)
    shop.manifest["deployments"].pop()
    deploy(shop)
    return "gone" if "d2" not in shop.deployments() else "still there, still scheduled"


def schedule_removed(shop: Shop, deploy: Deploy) -> str:
    """Remove a schedule from the file."""
    _six(shop)
    deploy(shop)
    shop.manifest["deployments"][0]["schedules"] = [NIGHTLY]
    deploy(shop)
    return _schedules(shop, {"nightly"})


def schedules_empty(shop: Shop, deploy: Deploy) -> str:
    """Replace the schedules by `schedules: []`."""
    _six(shop)
    deploy(shop)
    shop.manifest["deployments"][0]["schedules"] = []
    deploy(shop)
    return _schedules(shop, set())


def schedule_renamed(shop: Shop, deploy: Deploy) -> str:
    """Give a schedule a new slug."""
    _six(shop)
    deploy(shop)
    ids = {each["slug"]: each["id"] for each in shop.deployments()["d0"]["schedules"]}
    new = {**NIGHTLY, "slug": "early", **({"replaces": "nightly"} if deploy.ours else {})}
    shop.manifest["deployments"][0]["schedules"] = [new, HOURLY]
    deploy(shop)
    after = {each["slug"]: each["id"] for each in shop.deployments()["d0"]["schedules"]}
    return _schedules(shop, {"early", "hourly"}) + (", same id" if after.get("early") == ids["nightly"] else "")


ROWS: dict[str, tuple[Callable[[Shop, Deploy], str], bool]] = {
    "unknown key": (unknown_key, True),
    "bad second of three": (bad_second, True),
    "bad job variable in the last of six": (bad_job_variable, True),
    "no-op redeploy": (no_op, False),
    "UI pause, then redeploy": (ui_pause, False),
    "deployment removed": (deployment_removed, False),
    "schedule removed": (schedule_removed, False),
    "`schedules: []`": (schedules_empty, False),
    "schedule renamed": (schedule_renamed, False),
}


def _schedules(shop: Shop, wanted: set[str]) -> str:
    there = {each["slug"] for each in shop.deployments()["d0"]["schedules"]}
    return "as in the file" if there == wanted else f"{', '.join(sorted(there - wanted))} still there"


def _settled(shop: Shop) -> set[str]:
    """Return ids of the future runs, once the scheduler has created them."""
    deadline, seen = time.monotonic() + DEADLINE_SECONDS, shop.future_runs()
    while time.monotonic() < deadline:
        time.sleep(8)  # the scheduler's loop is five seconds
        now = shop.future_runs()
        if now and now == seen:
            return now
        seen = now
    return seen


def rows() -> None:
    """Print the nine rows."""
    with running() as (_, proxy, folder):
        print("| what | stock | writes | ours | writes |\n|---|---|---|---|---|", flush=True)
        for name, (row, bare) in ROWS.items():
            cells = []
            for ours in (False, True):
                shop = Shop(folder / f"shop-{len(list(folder.iterdir()))}")
                shop.create_pool()
                proxy.requests.clear()
                result = row(shop, Deploy(proxy, ours=ours, bare=bare))
                cells += [result, str(len(proxy.writes))]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def hundred() -> None:
    """Print the seconds of a plan and of an apply with nothing to do."""
    with running() as (server, proxy, folder):
        shop = Shop(folder / "shop")
        shop.create_pool()
        for index in range(100):
            shop.deployment(f"d{index:03}", NIGHTLY, HOURLY)
        start = time.monotonic()
        print(f"first apply: exit {command(shop, 'apply').returncode}, {time.monotonic() - start:.1f} s", flush=True)
        with temporary_settings({PREFECT_API_URL: server.api}):  # the server itself: the proxy has its own cost
            for arguments in (("plan",), ("apply",)) * 3:
                start = time.monotonic()
                done = command(shop, *arguments)
                print(f"{arguments[0]}: exit {done.returncode}, {time.monotonic() - start:.2f} s", flush=True)
        proxy.requests.clear()
        command(shop, "apply")
        print(f"apply, nothing to do: {len(proxy.writes)} writes, {len(proxy.requests)} reads")


def kill() -> None:
    """Kill the server in the middle of an apply, and restart it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        server = Server(Home(Path(folder) / "server"), free_port())
        processes = Processes(server.home.logs, server.variables)
        stack.callback(processes.stop_all)
        stack.enter_context(temporary_settings({PREFECT_API_URL: server.api}))
        started = server.start(processes, "--no-ui")
        shop = Shop(Path(folder) / "shop")
        shop.create_pool()
        for index in range(20):
            shop.deployment(f"d{index:02}", NIGHTLY)
        shop.write()
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tidepool.cli", "apply"], cwd=shop.root, env=_variables(shop), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        for line in process.stdout or ():
            if re.search(r"created deployment \S+/d08", line):
                os.killpg(started.pid, signal.SIGKILL)  # as the loss of its node would: the command and its server
                started.wait()
                break
        start = time.monotonic()
        errors = process.communicate()[1]
        print(f"exit {process.returncode} after {time.monotonic() - start:.0f} s:\n{errors}")
        server.start(processes, "--no-ui")
        print(f"on the server: {len(shop.deployments())} of 20")
        again = command(shop, "apply")
        live = shop.deployments()
        names: list[Any] = [each["name"] for each in live.values()]
        print(f"again: exit {again.returncode}, {again.stdout.splitlines()[-1]}")
        print(f"on the server: {len(live)} of 20, {len(names) - len(set(names))} duplicates")
        print(f"plan: exit {command(shop, 'plan').returncode}")


if __name__ == "__main__":
    {"rows": rows, "hundred": hundred, "kill": kill}[sys.argv[1]]()
