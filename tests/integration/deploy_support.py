"""A small repository to deploy from, and a proxy that writes down what a Prefect server is asked."""

# ruff: noqa: N815 - JSON; names that http.server wants

from __future__ import annotations

import asyncio
import io
import re
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import yaml
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tidepool import settings as settings_module
from tidepool.deploy.reconcile import actual, apply, comparison

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pytest
    from prefect.client.orchestration import SyncPrefectClient

# Calls that read, although they are POSTs.
_READS = re.compile(r"/(filter|paginate|count|get_scheduled_flow_runs|history)(/|$)|/csrf-token|/logs/|/events")
_FLOWS = '''"""Flows of a test."""

from prefect import flow


@flow(name="{name}")
def sell(count: int = 1, shop: str = "corner") -> int:
    """Sells something."""
    return count
'''


class Proxy:
    """Passes requests on to a server and writes them down."""

    def __init__(self, target: str) -> None:
        self.requests: list[tuple[str, str, int]] = []
        self.refuse_after: int | None = None  # writes that still pass; then the "server" is gone
        requests, proxy = self.requests, self
        client = httpx.Client(timeout=60)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.refuse_after is not None and len(proxy.writes) >= proxy.refuse_after:
                    self.close_connection = True
                    self.connection.close()
                    return
                headers = {k: v for k, v in self.headers.items() if k.lower() not in {"host", "content-length"}}
                url = target + self.path.removeprefix("/api")
                reply = client.request(self.command, url, content=body, headers=headers)
                requests.append((self.command, self.path, reply.status_code))
                self.send_response(reply.status_code)
                for key, value in reply.headers.items():
                    if key.lower() not in {"content-length", "transfer-encoding", "content-encoding", "connection"}:
                        self.send_header(key, value)
                self.send_header("Content-Length", str(len(reply.content)))
                self.end_headers()
                self.wfile.write(reply.content)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._client = client
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/api"

    @property
    def writes(self) -> list[tuple[str, str, int]]:
        """The requests that changed something, or tried to."""
        return [each for each in self.requests if each[0] != "GET" and not _READS.search(each[1])]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._client.close()


@contextmanager
def recorded(api: str) -> Iterator[Proxy]:
    """A proxy in front of the server, which PREFECT_API_URL points to meanwhile."""
    proxy = Proxy(api)
    try:
        with temporary_settings({PREFECT_API_URL: proxy.url}):
            yield proxy
    finally:
        proxy.close()


class Shop:
    """A repository of its own owner, flow and work pool: tests share one server and do not meet."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.root = root
        self.mark = f"t{uuid4().hex[:8]}"
        self.owner, self.module, self.flow, self.pool = (
            self.mark,
            f"shop_{self.mark}",
            f"sell-{self.mark}",
            f"p-{self.mark}",
        )
        (root / "docs" / "runbooks").mkdir(parents=True)
        (root / f"{self.module}.py").write_text(_FLOWS.format(name=self.flow))
        self.manifest: dict[str, Any] = {
            "name": "shop",
            "build": [{"tidepool.deploy.steps.validate": {}}],
            "pull": [],
            "deployments": [],
        }
        self.server_file: dict[str, Any] = {}
        if monkeypatch is not None:
            monkeypatch.setenv("TIDEPOOL_DEPLOY_OWNER", self.owner)
            settings_module.settings.cache_clear()

    def deployment(self, name: str, *schedules: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """Adds a deployment to the manifest."""
        (self.root / "docs" / "runbooks" / f"{name}.md").touch()
        config = {
            "name": name,
            "description": f"Sells. docs/runbooks/{name}.md",
            "entrypoint": f"{self.module}.sell",
            "tags": [f"managed-by:{self.owner}"],
            "schedules": list(schedules),
            "parameters": {"count": 1},
            "work_pool": {"name": self.pool},
            **changes,
        }
        self.manifest["deployments"].append(config)
        return config

    def write(self) -> Shop:
        """Writes the files."""
        (self.root / "prefect.yaml").write_text(yaml.safe_dump(self.manifest, sort_keys=False))
        for entry in self.server_file.get("automations", []):
            (self.root / "docs" / "runbooks" / f"{entry['name']}.md").touch()
        (self.root / "automations.yaml").write_text(yaml.safe_dump(self.server_file, sort_keys=False))
        return self

    def look(self, client: SyncPrefectClient) -> comparison.Situation:
        """The plan."""
        return comparison.look(client, self.root, "production", self.owner)

    def apply(self, deploy: Any = None, say: Callable[[str], None] = lambda _: None) -> list[str]:
        """Writes the files and applies them; what was written."""
        self.write()
        with actual.connect() as client:
            found = self.look(client)
            return apply.apply(
                client, found.plan, found.desired, found.state, self.owner, deploy=deploy or in_process, say=say
            )

    def plan(self) -> Any:
        """Writes the files and compares."""
        self.write()
        with actual.connect() as client:
            return self.look(client).plan

    def live(self) -> dict[str, dict[str, Any]]:
        """The deployments of this owner, by name, as the API has them."""
        with actual.connect() as client:
            found = actual.read_deployments(client, f"managed-by:{self.owner}", [])
            return {each["name"]: each for each in found.values()}

    def create_pool(self) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect.workers.process import ProcessWorker

        with actual.connect() as client:
            template = ProcessWorker.get_default_base_job_template()
            client.create_work_pool(WorkPoolCreate(name=self.pool, type="process", base_job_template=template))

    def future_runs(self) -> set[str]:
        """Ids of this flow's scheduled runs."""
        with actual.connect() as client:
            body = {"flows": {"name": {"any_": [self.flow]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
            return {each["id"] for each in actual.pages(client, "/flow_runs/filter", body)}

    def stock(self) -> subprocess.CompletedProcess[str]:
        """A bare `prefect deploy --all` on the written file, as the command."""
        self.write()
        return subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=self.root,
            env={
                **settings_module.environment(),
                "PREFECT_API_URL": str(PREFECT_API_URL.value()),
                "PREFECT_CLIENT_MAX_RETRIES": str(PREFECT_CLIENT_MAX_RETRIES.value()),
                "TIDEPOOL_DEPLOY_OWNER": self.owner,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


def in_process(manifest: dict[str, Any], written: Callable[[str], None]) -> str:
    """What `prefect deploy --all` runs, in this process: a start of the command costs seconds."""
    from prefect.cli.deploy._config import _load_deploy_configs_and_actions
    from prefect.cli.deploy._core import _run_multi_deploy
    from rich.console import Console

    output = io.StringIO()
    console = Console(file=output, width=1000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(yaml.safe_dump(manifest, sort_keys=False))
        configs, actions = _load_deploy_configs_and_actions(path, console=console)
        reason = ""
        try:
            asyncio.run(
                _run_multi_deploy(
                    configs, actions, deploy_all=True, prefect_file=path, console=console, is_interactive=lambda: False
                )
            )
        except Exception as error:  # noqa: BLE001 - as the command: any error becomes its last line
            reason = str(error)
    for name in re.findall(r"Deployment '([^']+)' successfully created with id", output.getvalue()):
        written(name)
    return reason


NIGHTLY = {"slug": "nightly", "cron": "15 3 * * *", "timezone": "Europe/Paris"}
HOURLY = {"slug": "hourly", "interval": 3600, "anchor_date": "2026-01-01T00:00:00+00:00", "timezone": "UTC"}


def now() -> datetime:
    return datetime.now(UTC)


def paths(writes: Sequence[tuple[str, str, int]]) -> list[str]:
    """`PATCH /deployments/{id}`: requests without their ids."""
    return [f"{method} {re.sub('[0-9a-f-]{36}', '{id}', path)}" for method, path, _ in writes]
