"""A small repository to deploy from, and a proxy that records the requests to a Prefect server."""

# ruff: noqa: N815 - JSON; names that http.server wants

from __future__ import annotations

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
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tidepool import settings as settings_module
from tidepool.deploy import steps
from tidepool.deploy.client import connect, pages
from tidepool.deploy.config import environments
from tidepool.deploy.config.yaml_source import raise_if_any
from tidepool.deploy.reconcile import apply, comparison
from tidepool.deploy.reconcile.actual import read_deployments

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.testing.cli import CycloptsResult

    from tidepool.deploy.reconcile.plan import Plan

# Requests that read, although they are POSTs.
_READS = re.compile(r"/(filter|paginate|count|get_scheduled_flow_runs|history)(/|$)|/csrf-token|/logs/|/events")
_FLOWS = '''"""Flows of a test."""

from prefect import flow


@flow(name="{name}")
def sell(count: int = 1, shop: str = "corner") -> int:
    """Sell something."""
    return count
'''


class Proxy:
    """Passes requests on to a server and records them."""

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
        """Requests that wrote something, or tried to."""
        return [each for each in self.requests if each[0] != "GET" and not _READS.search(each[1])]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._client.close()


@contextmanager
def recorded(api: str) -> Iterator[Proxy]:
    """Put a proxy in front of the server, and point PREFECT_API_URL to it."""
    proxy = Proxy(api)
    try:
        with temporary_settings({PREFECT_API_URL: proxy.url}):
            yield proxy
    finally:
        proxy.close()


class Shop:
    """A repository with its own owner, flow and work pool, so that tests can share one server."""

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
        """Add a deployment to the manifest."""
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
        """Write the files."""
        (self.root / "prefect.yaml").write_text(yaml.safe_dump(self.manifest, sort_keys=False))
        for entry in self.server_file.get("automations", []):
            (self.root / "docs" / "runbooks" / f"{entry['name']}.md").touch()
        (self.root / "automations.yaml").write_text(yaml.safe_dump(self.server_file, sort_keys=False))
        return self

    def compare(self, client: SyncPrefectClient) -> comparison.Comparison:
        """Check the files, and compare them with the server."""
        raise_if_any(comparison.check(client, self.root, "production", self.owner, deploying=True))
        return comparison.compare(client, self.root, "production", self.owner)

    def apply(self, deploy: apply.Deploy | None = None) -> list[str]:
        """Write the files and apply them; return what was written."""
        self.write()
        with connect() as client:
            found, deploy = self.compare(client), deploy or deploy_in_process
            return apply.apply(client, found, self.root, self.owner, report=lambda _: None, deploy=deploy)

    def plan(self) -> Plan:
        """Write the files and compare."""
        self.write()
        with connect() as client:
            return self.compare(client).plan

    def deployments(self) -> dict[str, dict[str, Any]]:
        """Return the deployments of this owner, by name, as the API returns them."""
        with connect() as client:
            found = read_deployments(client, f"managed-by:{self.owner}", [])
            return {each["name"]: each for each in found.values()}

    def create_pool(self) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect.workers.process import ProcessWorker

        with connect() as client:
            template = ProcessWorker.get_default_base_job_template()
            client.create_work_pool(WorkPoolCreate(name=self.pool, type="process", base_job_template=template))

    def future_runs(self) -> set[str]:
        """Return ids of this flow's scheduled runs."""
        with connect() as client:
            body = {"flows": {"name": {"any_": [self.flow]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
            return {each["id"] for each in pages(client, "/flow_runs/filter", body)}

    def stock(self) -> subprocess.CompletedProcess[str]:
        """Run a bare `prefect deploy --all` on the written file, as a process."""
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


def prefect_deploy(repository: Path, manifest: environments.Manifest) -> CycloptsResult:
    """Run `prefect deploy --all` in this process: starting the command takes seconds.

    A veto in the manifest, `tidepool.deploy.steps.validate`, reads the repository's own prefect.yaml.
    """
    from prefect.testing.cli import CycloptsCliRunner

    steps._validate.cache_clear()  # once per command
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        path = Path(folder) / "prefect.yaml"
        path.write_text(environments.to_yaml(manifest))
        patched.chdir(repository)
        patched.syspath_prepend(repository)
        return CycloptsCliRunner().invoke(["--no-prompt", "deploy", "--all", "--prefect-file", str(path)])


def deploy_in_process(repository: Path, manifest: environments.Manifest) -> Iterator[str]:
    """Write deployments in this process. See `apply.Deploy`."""
    done = prefect_deploy(repository, manifest)
    yield from re.findall(r"Deployment '([^']+)' successfully created with id", done.output)
    if done.exit_code:
        raise apply.DeployError(f"exit code {done.exit_code}")


NIGHTLY = {"slug": "nightly", "cron": "15 3 * * *", "timezone": "Europe/Paris"}
HOURLY = {"slug": "hourly", "interval": 3600, "anchor_date": "2026-01-01T00:00:00+00:00", "timezone": "UTC"}


def now() -> datetime:
    return datetime.now(UTC)


def paths(writes: Sequence[tuple[str, str, int]]) -> list[str]:
    """Return requests without their ids: `PATCH /deployments/{id}`."""
    return [f"{method} {re.sub('[0-9a-f-]{36}', '{id}', path)}" for method, path, _ in writes]
