"""What a flow run may ask of the Prefect API through the proxy: HAProxy as the chart configures it.

Two servers are behind it: one that repeats what it got, for what passes the proxy; a real one, for what a run needs.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from threading import Thread
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
import pytest
import yaml
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    LogFilter,
    LogFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterId,
)
from prefect.client.schemas.objects import StateType
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectAlreadyExists
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Pending
from websockets import Subprotocol
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.integration import flow_run_api
from tests.integration.deploy_support import NIGHTLY, Shop, now
from tests.integration.flow_run_api import CHART, PASSWORD, TOKENS, client
from tests.polling import until
from tidepool.deploy import pauses
from tidepool.deploy.client import connect as connect_to_server
from tidepool.deploy.reconcile.actual import Pause
from tidepool.web_server import WebServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from websockets.sync.client import ClientConnection

ID = UUID(int=7)
CALLS = yaml.safe_load((CHART / "files" / "flow-run-api.yaml").read_text())["calls"]
CREATE = f"/deployments/{ID}/create_flow_run"


class Echo(BaseHTTPRequestHandler):
    """Repeats the request."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        got = {"method": self.command, "path": self.path, "headers": dict(self.headers), "body": body.decode()}
        text = json.dumps(got).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = answer  # noqa: N815 - the base class's names

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def echo() -> Iterator[int]:
    with WebServer(("127.0.0.1", 0), Echo) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def proxy(echo: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[flow_run_api.Proxy]:
    with flow_run_api.proxy(tmp_path_factory.mktemp("proxy"), echo) as running:
        yield running


@pytest.fixture
def api(proxy: flow_run_api.Proxy) -> str:
    return proxy.api


def basic(secret: str) -> str:
    return f"Basic {base64.b64encode(secret.encode()).decode()}"


def raw(api: str, *lines: str, body: bytes = b"", token: str | None = TOKENS[0]) -> str:
    """Send these lines as they are, with the token, and return the first line of the answer; empty without one."""
    host, port = api.removeprefix("http://").removesuffix("/api").split(":")
    extra = [f"Authorization: {basic(token)}"] if token else []
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall("\r\n".join([*lines, "Host: x", *extra, "Connection: close", "", ""]).encode() + body)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer.decode(errors="replace").split("\r\n", 1)[0]


def test_every_call_has_a_reason_and_a_known_form() -> None:
    fields = {"call", "why", "websocket", "keys", "body", "only"}
    for each in CALLS:
        assert each.keys() <= fields, each
        assert each["why"], each
        assert not {"keys", "body"} <= each.keys(), each
        assert each.get("only", "blocks") in {"default-team", "variables", "blocks"}
    assert len({each["call"] for each in CALLS}) == len(CALLS)


def test_a_call_of_the_list_passes_with_the_servers_own_password(api: str) -> None:
    with client(api) as run:
        got = run.get(f"/flow_runs/{ID}", headers={"X-Forwarded-For": "10.0.0.1", "X-Tidepool-Flow-Run": "9"}).json()
    assert got["path"] == f"/api/flow_runs/{ID}"
    headers = {name.lower(): value for name, value in got["headers"].items()}
    assert headers["authorization"] == basic(PASSWORD)
    assert headers["host"] == "tidepool-flow-run-api.flows.svc:4201"
    assert headers["x-tidepool-flow-run"] == "a+pool"
    with client(api, TOKENS[1]) as run:
        got = run.get(f"/flow_runs/{ID}").json()["headers"]
    assert {name.lower(): value for name, value in got.items()}["x-tidepool-flow-run"] == "media"
    assert "x-forwarded-for" not in headers


def test_a_refused_call_answers_with_a_sentence_that_names_it(proxy: flow_run_api.Proxy) -> None:
    before = len(proxy.refused())
    with client(proxy.api) as run:
        assert run.get(f"/flow_runs/{ID}").status_code == 200
        answer = run.post("/work_pools/", json={"name": "mine"})
    assert answer.status_code == 403
    sentence = "POST /api/work_pools/ is not a call that a flow run may make; see helm/tidepool/files/flow-run-api.yaml"
    assert answer.json() == {"detail": sentence}
    [line] = until(lambda: proxy.refused()[before:])
    assert line.endswith('team=0 127.0.0.1 403 LR "POST /api/work_pools/ HTTP/1.1"')


def test_a_connection_without_a_request_is_not_logged_as_a_refused_call(proxy: flow_run_api.Proxy) -> None:
    """A flow run that is killed leaves one now and then; on-call reads these lines."""
    before = len(proxy.refused())
    port = int(proxy.api.rpartition(":")[2].partition("/")[0])
    for sent in (b"", b"GET /api/hea"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(sent)
    with client(proxy.api) as run:
        assert run.post("/work_pools/", json={"name": "mine"}).status_code == 403
    [begun, refused] = until(lambda: proxy.refused()[before:], lambda lines: len(lines) > 1)
    assert begun.endswith('400 CR "<BADREQ>"')
    assert "POST /api/work_pools/" in refused


@pytest.mark.parametrize("token", [None, PASSWORD, "runs:", ":", "runs:of the default team", TOKENS[0] + "x"])
def test_only_the_tokens_of_flow_runs_are_accepted(api: str, token: str | None) -> None:
    with client(api, token) as run:
        assert run.get(f"/flow_runs/{ID}").status_code == 401
        assert run.get("/health").status_code == 200


@pytest.mark.parametrize(
    "call",
    [
        *(f"{method} /deployments/" for method in ("GET", "POST", "PUT", "DELETE")),
        f"PATCH /deployments/{ID}",
        f"DELETE /deployments/{ID}",
        f"POST /deployments/{ID}/pause_deployment",
        f"POST /deployments/{ID}/resume_deployment",
        f"POST /deployments/{ID}/schedules",
        "POST /work_pools/",
        "PATCH /work_pools/kubernetes",
        "POST /work_pools/kubernetes/get_scheduled_flow_runs",
        "POST /work_pools/kubernetes/workers/heartbeat",
        "POST /block_types/",
        "POST /block_documents/",
        "POST /block_schemas/",
        f"GET /block_documents/{ID}",
        "POST /automations/",
        f"DELETE /automations/{ID}",
        "POST /variables/",
        "PATCH /variables/name/shared",
        "DELETE /variables/name/shared",
        "GET /variables/name/of-media",
        "GET /variables/name/other",
        "GET /block_types/slug/secret/block_documents/name/of-media?include_secrets=true",
        "GET /block_types/slug/secret/block_documents/name/other?include_secrets=true",
        "GET /block_types/slug/json/block_documents/name/shared",
        "POST /v2/concurrency_limits/",
        "DELETE /v2/concurrency_limits/x",
        "POST /concurrency_limits/",
        f"DELETE /flow_runs/{ID}",
        f"POST /flow_runs/{ID}/resume",
        "POST /flow_runs/paginate",
        "POST /flow_runs/history",
        "POST /logs/filter",
        "POST /events/filter",
        "POST /task_runs/paginate",
        "POST /admin/database/drop",
        "POST /admin/database/clear",
        "GET /admin/settings",
        "POST /ui/flow_runs/history",
        "POST /bulk_delete",
        "GET /logs/out",
        "GET /task_runs/subscriptions/scheduled",
    ],
)
def test_what_is_not_on_the_list_is_refused(api: str, call: str) -> None:
    method, path = call.split()
    with client(api) as run:
        assert run.request(method, path, json={}).status_code == 403


@pytest.mark.parametrize(
    "target",
    [
        f"/api//flow_runs/{ID}",
        f"//api/flow_runs/{ID}",
        f"/api/./flow_runs/{ID}",
        f"/api/flow_runs/../flow_runs/{ID}",
        f"/api/flow_runs/%2e%2e/flow_runs/{ID}",
        f"/api/flow%5fruns/{ID}",
        f"/api/flow_runs%2F{ID}",
        f"/api/flow_runs/{ID};x=1",
        f"/api/flow_runs/{ID}#x",
        f"/api/flow_runs/{ID}?x=#/y",
        f"/api/flow_runs/{ID}/",
        f"/api/flow_runs/{ID}%00",
        f"/API/flow_runs/{ID}",
        f"/api/Flow_runs/{ID}",
        f"/api/flow_runs/{str(ID).replace('-', '')}",
        f"/api\\flow_runs\\{ID}",
        f"http://x/api/flow_runs/{ID}",
        f"api/flow_runs/{ID}",
        "*",
    ],
)
def test_another_spelling_of_a_call_is_refused(api: str, target: str) -> None:
    assert raw(api, f"GET {target} HTTP/1.1").split()[1] in {"400", "403"}


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        ([f"get /api/flow_runs/{ID} HTTP/1.1"], b""),
        ([f"HEAD /api/flow_runs/{ID} HTTP/1.1"], b""),
        ([f"CONNECT /api/flow_runs/{ID} HTTP/1.1"], b""),
        ([f"GET /api/flow_runs/{ID} HTTP/1.0"], b""),
        ([f"GET /api/flow_runs/{ID} HTTP/1.1", "X-HTTP-Method-Override: DELETE", "Upgrade: h2c"], b""),
        ([f"GET /api/flow_runs/{ID} HTTP/1.1", "Upgrade: websocket"], b""),
        (["GET /api/events/in HTTP/1.1"], b""),
        (["POST /api/logs/ HTTP/1.1", "Content-Encoding: gzip", "Content-Length: 2"], b"[]"),
        (["POST /api/logs/ HTTP/1.1", "Content-Type: a", "Content-Type: b", "Content-Length: 2"], b"[]"),
        (["POST /api/logs/ HTTP/1.1", "Content-Length: 2", "Content-Length: 3"], b"[]"),
        (["POST /api/logs/ HTTP/1.1", "Content-Length: +2"], b"[]"),
        (["POST /api/logs/ HTTP/1.1", "Transfer-Encoding: chunked, identity"], b"0\r\n\r\n"),
        (["POST /api/logs/ HTTP/1.1", "Transfer-Encoding : chunked"], b"0\r\n\r\n"),
        ([f"GET /api/flow_runs/{ID} HTTP/1.1", "Authorization: Basic eDp5"], b""),
        (["PRI * HTTP/2.0", "", "SM", ""], b""),
    ],
)
def test_an_odd_request_is_refused(api: str, lines: list[str], body: bytes) -> None:
    status = raw(api, *lines, body=body)
    assert not status or status.split()[1] in {"400", "403", "405", "501"}, status


def test_a_smuggled_second_request_is_one_of_its_own(api: str) -> None:
    """Both lengths are given: the server gets one, and what follows is another request, which is refused."""
    inner = b"DELETE /api/work_pools/x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    lines = ["POST /api/logs/ HTTP/1.1", f"Content-Length: {5 + len(inner)}", "Transfer-Encoding: chunked"]
    assert raw(api, *lines, body=b"0\r\n\r\n" + inner).split()[1] in {"400", "413"}
    with client(api) as run:
        assert run.get(f"/flow_runs/{ID}").json()["method"] == "GET"


ORDINARY: dict[str, Any] = {"name": "x", "parameters": {"job_variables": {"a": [1, -2.5e3, None, True, "ü\n\\"]}}}


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(ORDINARY).encode(),
        json.dumps(ORDINARY, ensure_ascii=False, separators=(",", ":")).encode(),
        json.dumps(ORDINARY, indent=2).encode(),
        json.dumps(ORDINARY | {"job_variables": None, "idempotency_key": "mine"}).encode(),
        json.dumps(ORDINARY | {"job_variables": {}, "idempotency_key": None}).encode(),
        json.dumps({"parameters": {"rows": [{"a": i, "b": "c"} for i in range(5000)]}}).encode(),
        b"{}",
    ],
)
def test_a_run_of_a_deployment_without_job_variables_is_created(api: str, body: bytes) -> None:
    with client(api) as run:
        answer = run.post(CREATE, content=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["body"].encode() == body


@pytest.mark.parametrize(
    "body",
    [
        b'{"job_variables": {"image": "x"}}',
        b'{"job_variables": {}, "job_variables": {"image": "x"}}',
        b'{"job_variables": {"image": "x"}, "job_variables": {}}',
        b'{"\\u006aob_variables": {"image": "x"}}',
        b'{"name": "x"} {"job_variables": {"image": "x"}}',
        b'{"name": "x"}\x00,"job_variables": {"image": "x"}}',
        b'\xef\xbb\xbf{"name": "x"}',
        *('{"job_variables": {"image": "x"}}'.encode(code) for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        b'{"work_queue_name": "other"}',
        b'{"infrastructure_document_id": null}',
        b'{"parameters": {"a": {"__prefect_kind": "workspace_variable", "variable_name": "other"}}}',
        b'{"parameters": [[{"x": 1, "__prefect_kind" : "jinja", "template": "{{ 1 }}"}]]}',
        b'{"parameters": {"a": {"\\u005f_prefect_kind": "jinja"}}}',
        b'{"context": {"__prefect_kind": "json"}}',
        b'{"name": "a\\u0000"}',
        b'{"idempotency_key": "scheduled 00000000 2026"}',
        b'{"idempotency_key": "\\u0073cheduled 00000000 2026"}',
        b'{"name": NaN}',
        b"{'name': 'x'}",
        b'{"name": "x",}',
        b'{"name": "x" // comment\n}',
        b'[{"name": "x"}]',
        b"",
    ],
)  # fmt: skip
def test_a_run_of_a_deployment_with_job_variables_is_refused(api: str, body: bytes) -> None:
    with client(api) as run:
        answer = run.post(CREATE, content=body)
    assert answer.status_code in {403, 413}, answer.text
    assert "create_flow_run" in answer.json()["detail"]


def test_a_run_names_no_job(api: str) -> None:
    """The Prefect worker deletes the Job that a cancelled run names."""
    with client(api) as run:
        assert run.patch(f"/flow_runs/{ID}", json={"name": "x", "infrastructure_pid": None}).status_code == 200
        assert run.patch(f"/flow_runs/{ID}", json={"infrastructure_pid": "media:driver"}).status_code == 403


def by(criteria: str) -> bytes:
    """Return the body of a filter of deployments, as `tidepool drift` sends it, with these criteria."""
    return ('{"deployments":{' + criteria + '},"limit":200,"offset":0}').encode()


MANAGED = '"operator":"or_","tags":{"all_":["managed-by:shop"]},"name":{"any_":["one"]}'


@pytest.mark.parametrize("path", ["/deployments/filter", "/flows/filter"])
def test_deployments_are_found_by_owner_and_name_only(api: str, path: str) -> None:
    with client(api) as run:
        assert run.post(path, content=by(MANAGED)).status_code == 200
        for body in (
            by(MANAGED + ',"id":{"any_":[]}'),
            by(MANAGED.replace('["one"]', "null")),
            by(MANAGED.replace('["one"]', '[["one"]]')),
            by('"name":{"any_":["one"]}'),
            by(MANAGED).replace(b"managed-by:shop", b"tier:1"),
            by(MANAGED).replace(b',"limit"', b',"flow_runs":{"state":{"name":{"any_":["x"]}}},"limit"'),
            by(MANAGED).replace(b',"limit"', b',"task_runs":{},"limit"'),
            b"{}",
        ):
            assert run.post(path, content=body).status_code == 403, body
        for other in ("/v2/concurrency_limits/filter", "/automations/filter"):
            assert run.post(other, json={"limit": 200, "offset": 0}).status_code == 200
            assert run.post(other, json={"flow_runs": {}}).status_code == 403
        assert run.post("/work_pools/filter", json={"work_pools": {"type": {"any_": ["x"]}}}).status_code == 403
        every = b'{"work_pools":{"name":{"any_":null}},"limit":200,"offset":0}'
        assert run.post("/work_pools/filter", content=every).status_code == 403


@pytest.mark.parametrize(
    ("state", "allowed"),
    [
        (FlowRunFilterState(type={"any_": ["CANCELLING"]}), True),
        (FlowRunFilterState(type={"any_": ["CANCELLED"]}, name={"any_": ["Cancelling"]}), True),
        (FlowRunFilterState(type={"any_": ["PAUSED"]}, name={"any_": ["Suspended"]}), True),
        (FlowRunFilterState(type={"any_": ["COMPLETED"]}), False),
        (FlowRunFilterState(name={"any_": ["Cancelling"]}), False),
    ],
)
def test_a_run_asks_for_the_states_that_prefects_runner_asks_for(
    api: str, state: FlowRunFilterState, *, allowed: bool
) -> None:
    flow_runs = FlowRunFilter(id=FlowRunFilterId(any_=[ID]), state=state).model_dump(mode="json", exclude_unset=True)
    others = dict.fromkeys(("task_runs", "deployments", "work_pools", "work_pool_queues", "sort", "limit"))
    with client(api) as run:
        body = {"flows": None, "flow_runs": flow_runs, **others, "offset": 0}
        assert run.post("/flow_runs/filter", json=body).status_code == (200 if allowed else 403)


def test_a_run_has_the_label_that_prefect_sets(api: str) -> None:
    with client(api) as run:
        trace = {"__OTEL_TRACEPARENT": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        assert run.patch(f"/flow_runs/{ID}/labels", json=trace).status_code == 200
        others: list[dict[str, Any]] = [{"mine": "x"}, {"__OTEL_TRACEPARENT": "x" * 81}, {"__OTEL_TRACEPARENT": {}}]
        for other in others:
            assert run.patch(f"/flow_runs/{ID}/labels", json=other).status_code == 403


def test_one_pod_cannot_take_all_connections(api: str) -> None:
    host, port = api.removeprefix("http://").removesuffix("/api").split(":")

    def refused() -> bool:
        """The proxy resets or ends what is one too many, at once or a moment later."""
        try:
            with socket.create_connection((host, int(port)), timeout=1) as one_more:
                return not one_more.recv(1)
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    with ExitStack() as stack:
        for _ in range(250):
            with suppress(ConnectionError):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
        until(refused)

    def served() -> bool:
        with client(api) as run, suppress(httpx.TransportError):
            return run.get(f"/flow_runs/{ID}").status_code == 200
        return False

    until(served)


def test_a_body_that_the_proxy_cannot_read_whole_is_refused(api: str) -> None:
    large = json.dumps({"parameters": {"x": "y" * 140_000}, "job_variables": {"image": "x"}}).encode()
    with client(api) as run:
        assert run.post(CREATE, content=large).status_code == 413
        assert run.post(CREATE, content=iter([b'{"name"', b': "x"}'])).status_code == 413  # chunked
        # A batch of log lines has no rule for its body, and may be larger.
        assert run.post("/logs/", content=large).status_code == 200
        assert run.post("/logs/", content=b" " * (5 << 20)).status_code == 200
        assert run.post("/logs/", content=b" " * (5 << 20) + b" ").status_code == 413
        assert run.post("/logs/", content=iter([b"[", b"]"])).status_code == 413
    # Nor one that ends too early.
    short = raw(api, f"POST /api{CREATE} HTTP/1.1", "Content-Length: 99", body=b'{"name": "x"}')
    assert not short or short.split()[1] in {"400", "408", "413"}


# --- a real server -------------------------------------------------------------------------------------------------

FLOWS = """
import os
import time
from pathlib import Path
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.blocks.system import Secret
from prefect.concurrency.sync import concurrency, rate_limit
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.flow_runs import wait_for_flow_run
from prefect.variables import Variable
from tidepool import report
from tidepool.compute import dask_runner

@task(retries=1, retry_delay_seconds=0, tags=["limited"])
def add(one):
    get_run_logger().info("adds %s", one)
    return one + 1

@flow
def below(n: int = 1):
    return n

@flow(name="does everything", flow_run_name="everything of {n}", task_runner=dask_runner("small"), retries=1)
def everything(n: int = 2):
    assert sum(add.map(list(range(n))).result()) == n * (n + 1) // 2
    assert below(3) == 3
    report.table("everything-table", [{"a": 1}], "a table")
    report.Progress("everything-progress", n, "items").update(1)
    with concurrency("shared", strict=False):
        rate_limit("rate", strict=False)
    emit_event("tidepool.test.happened", resource={"prefect.resource.id": "tidepool.test"})
    assert Variable.get("shared") == "v"
    assert Secret.load("shared").get() == "s"
    started = run_deployment("below/below", parameters={"n": 5}, timeout=0)
    assert started.state.is_scheduled()

@flow
def is_killed():
    os.kill(os.getpid(), 9)

@flow
def is_cancelled():
    Path(os.environ["BEGAN"]).touch()
    time.sleep(300)
"""


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[Restricted]:
    """A real server with a password, the proxy before it, and deployments of FLOWS."""
    flow_run_api.files(*flow_run_api.VALUES.items())  # skips before a server is started
    folder = tmp_path_factory.mktemp("restricted")
    (folder / "flows.py").write_text(FLOWS)
    with (
        flow_run_api.server(folder / "server", migrated_database) as server,
        flow_run_api.proxy(folder / "proxy", server.port) as proxy,
    ):
        yield Restricted(folder, server.api, proxy)
        # Send what is still queued while there is a server: at the end of the process it is tried for a minute.
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)


@dataclass
class Restricted:
    """A server behind the proxy."""

    folder: Path
    api: str
    proxy: flow_run_api.Proxy

    @contextmanager
    def platform(self) -> Iterator[SyncPrefectClient]:
        """A client with the server's own password."""
        settings = {PREFECT_API_URL: self.api, PREFECT_API_AUTH_STRING: PASSWORD}
        with temporary_settings(settings), get_client(sync_client=True) as platform:
            yield platform

    def client(self, token: str = TOKENS[0]) -> httpx.Client:
        """A client through the proxy that asks again, as Prefect's does, while the server's SQLite is locked."""
        return client(self.proxy.api, token, transport=AsksAgain())

    def create(self, name: str, pool: str = "a pool") -> FlowRun:
        """Create a run of a flow of FLOWS, of the default team."""
        with self.platform() as platform:
            flow = client_flow(platform, name)
            with suppress(ObjectAlreadyExists):  # the events of a run name its work pool and queue
                platform.create_work_pool(WorkPoolCreate(name=pool, type="process"))
            deployment = platform.create_deployment(
                flow_id=flow,
                name=name if pool == "a pool" else pool,
                entrypoint=f"flows.py:{name}",
                path=".",
                pull_steps=None,
                work_pool_name=pool,
            )
            return platform.create_flow_run_from_deployment(deployment, state=Pending())

    def start(self, flow_run: FlowRun) -> subprocess.Popen[str]:
        """Start the process of a flow run, as its pod does."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return subprocess.Popen(
            [sys.executable, "-m", "tidepool.operate.flow_run"],
            cwd=self.folder,
            env={
                **environment,
                **flow_run_api.variables(self.proxy.api),
                "PREFECT_HOME": str(self.folder / "home"),
                "PREFECT__FLOW_RUN_ID": str(flow_run.id),
                "PREFECT_LOGGING_LEVEL": "INFO",
                "TIDEPOOL_COMPUTE_PROVIDER": "local",
                "BEGAN": str(self.folder / "began"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def read(self, flow_run: FlowRun) -> FlowRun:
        """Read a flow run."""
        with self.platform() as platform:
            return platform.read_flow_run(flow_run.id)


class AsksAgain(httpx.HTTPTransport):
    """Sends a request again that was answered with 503."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request."""

        def ask() -> httpx.Response:
            answer = super(AsksAgain, self).handle_request(request)
            if answer.status_code == 503:
                answer.close()  # its connection is free again
            return answer

        return until(ask, lambda answer: answer.status_code != 503)


def client_flow(platform: SyncPrefectClient, name: str) -> UUID:
    return platform.create_flow_from_name("does everything" if name == "everything" else name.replace("_", "-"))


def test_a_flow_run_does_everything_through_the_proxy(restricted: Restricted) -> None:
    with restricted.platform() as platform:
        platform._client.post("/variables/", json={"name": "shared", "value": "v"}).raise_for_status()
        with temporary_settings({PREFECT_API_URL: restricted.api, PREFECT_API_AUTH_STRING: PASSWORD}):
            Secret(value="s").save("shared")  # type: ignore[arg-type]
        platform._client.post("/v2/concurrency_limits/", json={"name": "shared", "limit": 1}).raise_for_status()
    restricted.create("below")
    flow_run = restricted.create("everything")
    with restricted.start(flow_run) as process:
        output = process.communicate(timeout=120)[0]
    ended = restricted.read(flow_run)
    assert ended.state is not None
    assert ended.state.is_completed(), output
    assert ended.name == "everything of 2"
    assert restricted.proxy.refused() == []
    assert "a flow run may" not in output
    assert "polling" not in output.lower(), output
    with restricted.platform() as platform:
        runs = platform.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
        assert sorted(run.name[:3] for run in runs if run.state and run.state.is_completed()) == ["add", "add", "bel"]
        logs = platform.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
        assert any("adds 1" in log.message for log in logs)
    # What the task runner asks when a Dask worker was lost.
    through = {PREFECT_API_URL: restricted.proxy.api, PREFECT_API_AUTH_STRING: TOKENS[0]}
    with temporary_settings(through), get_client(sync_client=True) as run:
        wanted = TaskRunFilter(id=TaskRunFilterId(any_=[each.id for each in runs]))
        assert {each.id for each in run.read_task_runs(task_run_filter=wanted)} == {each.id for each in runs}


def test_a_killed_flow_runs_report_is_written_through_the_proxy(restricted: Restricted) -> None:
    flow_run = restricted.create("is_killed")
    with restricted.start(flow_run) as process:
        output = process.communicate(timeout=120)[0]
    assert restricted.proxy.refused() == []
    assert "was not published" not in output
    with restricted.platform() as platform:
        only = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]))
        (found,) = platform.read_artifacts(artifact_filter=only)
    assert found.key == "is-killed-run", output


def test_a_flow_run_writes_only_its_own_teams_runs(restricted: Restricted) -> None:
    mine, theirs = restricted.create("below"), restricted.create("below", "media")
    with restricted.client() as run, restricted.client(TOKENS[1]) as other:
        for team, own, foreign in ((run, mine, theirs), (other, theirs, mine)):
            running = {"state": {"type": "RUNNING", "name": "Running"}}
            for path, body in (
                (f"/deployments/{foreign.deployment_id}/create_flow_run", {}),
                (f"/flow_runs/{foreign.id}/set_state", running),
            ):
                answer = team.post(path, json=body)
                assert (answer.status_code, "is not of work pool" in answer.json()["detail"]) == (403, True)
            assert team.patch(f"/flow_runs/{foreign.id}", json={"name": "x"}).status_code == 403
            assert team.patch(f"/flow_runs/{foreign.id}/labels", json={}).status_code == 403
            task_run = {"flow_run_id": str(own.id), "task_key": "t", "dynamic_key": "0", "state": running["state"]}
            answer = team.post("/task_runs/", json=task_run)
            assert answer.status_code == 201, answer.text
            parent = answer.json()["id"]
            assert team.post("/task_runs/", json=task_run | {"flow_run_id": str(foreign.id)}).status_code == 403
            created = team.post(f"/deployments/{own.deployment_id}/create_flow_run", json={})
            assert created.status_code == 201, created.text
            # A subflow is of its parent's team, and its subflow, too.
            flow = str(own.flow_id)
            assert team.post("/flow_runs/", json={"flow_id": flow}).status_code == 403
            subflow = team.post("/flow_runs/", json={"flow_id": flow, "parent_task_run_id": parent}).json()["id"]
            assert team.post(f"/flow_runs/{subflow}/set_state", json=running).status_code == 201
            assert (other if team is run else run).post(
                f"/flow_runs/{subflow}/set_state", json=running
            ).status_code == 403
    for each in (mine, theirs):
        assert restricted.read(each).name == each.name
        assert restricted.read(each).state_type == StateType.PENDING


@pytest.mark.parametrize(
    ("method", "path", "body", "sentence"),
    [
        ("POST", "/set_state", {"state": {"type": "RUNNING", "data": json.loads("[" * 260 + "]" * 260)}}, "64 levels"),
        ("POST", "/set_state", {"state": {"type": "RUNNING", "name": "Suspended"}}, "is not named Suspended"),
        ("POST", "/set_state", {"state": {"type": "FAILED", "message": "ü" * (128 << 10)}}, "bytes; at most"),
        ("POST", "/set_state", [], ""),
        ("PATCH", "", {"name": "a\nb"}, "control character"),
        ("PATCH", "", {"empirical_policy": {"retries": 10**6}}, "retries must be a number from 0 to 1000"),
    ],
)
def test_a_body_that_harms_others_is_refused(
    restricted: Restricted, method: str, path: str, body: Any, sentence: str
) -> None:
    flow_run = restricted.create("below")
    with restricted.client() as run:
        answer = run.request(method, f"/flow_runs/{flow_run.id}{path}", json=body)
    assert answer.status_code == 422, answer.text
    assert sentence in answer.text
    assert restricted.read(flow_run).name == flow_run.name
    with restricted.platform() as platform:
        assert platform.read_flow_runs()


def test_a_nul_in_an_event_or_a_message_is_replaced(restricted: Restricted) -> None:
    flow_run = restricted.create("below")
    event = {
        "occurred": now().isoformat(), "event": "tidepool.test.nul", "id": str(UUID(int=8)),
        "resource": {"prefect.resource.id": "tidepool.nul"}, "payload": {"a\0": "b\0"},
    }  # fmt: skip
    with websocket(restricted.proxy.api, "/events/in", TOKENS[0]) as connection:
        connection.recv(10)
        connection.send("[" * 100 + "]" * 100)
        connection.send(json.dumps(event))
    with restricted.client() as run:
        state = {"state": {"type": "RUNNING", "message": "a\0b"}}
        assert run.post(f"/flow_runs/{flow_run.id}/set_state", json=state).status_code == 201
    found = restricted.read(flow_run).state
    assert found is not None
    assert found.message == "a\ufffdb"

    def stored() -> list[Any]:
        with restricted.platform() as platform:
            criteria = {"filter": {"event": {"name": ["tidepool.test.nul"]}}}
            found: list[Any] = platform._client.post("/events/filter", json=criteria).json()["events"]
            return found

    [one] = until(stored)
    assert one["payload"] == {"a\ufffd": "b\ufffd"}


def test_an_event_of_the_servers_own_is_dropped(restricted: Restricted) -> None:
    """A driver that heard it ended its run, of whatever team, without asking the server."""
    flow_run = restricted.create("below")

    def event(name: str, resource: str, number: int) -> str:
        return json.dumps(
            {
                "occurred": now().isoformat(), "event": name, "id": str(UUID(int=number)),
                "resource": {"prefect.resource.id": resource}, "payload": {},
            }
        )  # fmt: skip

    with websocket(restricted.proxy.api, "/events/in", TOKENS[0]) as connection:
        connection.recv(10)
        connection.send(event("prefect.flow-run.Cancelling", f"prefect.flow-run.{flow_run.id}", 21))
        connection.send(event("tidepool.test.after", "tidepool.test", 22))

    def stored() -> list[str]:
        with restricted.platform() as platform:
            criteria = {"filter": {"id": {"id": [str(UUID(int=21)), str(UUID(int=22))]}}}
            found = platform._client.post("/events/filter", json=criteria).json()["events"]
            return [each["event"] for each in found]

    assert until(stored) == ["tidepool.test.after"]


def test_a_flow_run_is_told_that_it_is_cancelled(restricted: Restricted) -> None:
    flow_run = restricted.create("is_cancelled")
    with restricted.start(flow_run) as process:
        try:
            until((restricted.folder / "began").exists)
            with restricted.platform() as platform:
                platform.set_flow_run_state(flow_run.id, Cancelling())
            output = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert restricted.read(flow_run).state_type == StateType.CANCELLED, output
    # By the websocket: without it, the runner asks every ten seconds.
    assert "polling" not in output.lower(), output
    assert restricted.proxy.refused() == []


@contextmanager
def websocket(api: str, path: str, token: str | None, *, header: bool = True) -> Iterator[ClientConnection]:
    headers = {"Authorization": basic(token)} if token and header else {}
    url = api.replace("http://", "ws://") + path
    with connect(url, subprotocols=[Subprotocol("prefect")], additional_headers=headers) as connection:
        connection.send(json.dumps({"type": "auth", "token": token}))
        yield connection


def test_a_websocket_authenticates_with_the_token_of_flow_runs(restricted: Restricted) -> None:
    with websocket(restricted.proxy.api, "/events/in", TOKENS[1]) as connection:
        assert json.loads(connection.recv(10)) == {"type": "auth_success"}
    for token, header in (("runs:x", True), (TOKENS[0], False), (PASSWORD, True)):
        with (
            pytest.raises(InvalidStatus, match="401"),
            websocket(restricted.proxy.api, "/events/in", token, header=header),
        ):
            pass
    # The server itself knows its own password only.
    with (
        pytest.raises(ConnectionClosed, match="Invalid token"),
        websocket(restricted.api, "/events/in", TOKENS[0]) as it,
    ):
        it.recv(10)


def test_a_flow_run_cannot_subscribe_to_the_events_of_others(restricted: Restricted) -> None:
    with websocket(restricted.proxy.api, "/events/out", TOKENS[0]) as connection:
        assert json.loads(connection.recv(10)) == {"type": "auth_success"}
        connection.send(json.dumps({"type": "filter", "filter": {}}))
        with pytest.raises(ConnectionClosed, match="a flow run may subscribe to"):
            connection.recv(10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:prefect.*")
def test_the_drift_report_reads_only(restricted: Restricted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.flow_engine import run_flow

    from flows.operations.flow import drift_report

    def find_drift() -> Any:
        """As the run of a deployment: a flow run creates none without a parent."""
        parameters = {"environment": "production", "end_pauses": True}
        return run_flow(drift_report, flow_run=restricted.create("drift_report"), parameters=parameters)

    shop = Shop(tmp_path / "shop", monkeypatch)
    as_platform = {PREFECT_API_URL: restricted.api, PREFECT_API_AUTH_STRING: PASSWORD}
    as_run = {PREFECT_API_URL: restricted.proxy.api, PREFECT_API_AUTH_STRING: TOKENS[0]}
    with temporary_settings(as_platform):
        shop.create_pool()
        shop.deployment("one", NIGHTLY)
        shop.server_file["variables"] = [{"name": f"{shop.mark}_size", "value": "3"}]
        shop.apply()
    monkeypatch.chdir(shop.root)
    monkeypatch.setenv("TIDEPOOL_COMPUTE_PROVIDER", "threads")
    before = len(restricted.proxy.refused())

    def refused_calls() -> list[str]:
        # A pod's process sends its token as a header of websockets, which this one does not.
        return [each for each in restricted.proxy.refused()[before:] if "/api/events/" not in each]

    with temporary_settings(as_run):
        assert find_drift() == {"differences": 0, "paused": 0, "resumed": 0}
    assert refused_calls() == []
    with temporary_settings(as_platform), connect_to_server() as platform:
        at = now() - timedelta(hours=2)
        pauses.pause(
            platform, Pause(deployment="one", by="me", reason="why", at=at, until=at + timedelta(hours=1)), shop.owner
        )
    with temporary_settings(as_run):
        assert find_drift() == {"differences": 0, "paused": 1, "resumed": 0}
    [refused] = refused_calls()
    assert '403 LR "PATCH /api/deployments/' in refused
    with temporary_settings(as_platform), connect_to_server() as platform:
        body = {"artifacts": {"key": {"any_": ["drift-report"]}}, "sort": "CREATED_DESC", "limit": 1}
        [artifact] = platform.request("POST", "/artifacts/filter", json=body).json()
    assert artifact["description"] == "production: as in Git, 1 paused, 1 to resume, as their pause expired"
    assert "run `tidepool drift --end-pauses`" in artifact["data"]


def test_without_a_password_calls_are_restricted_all_the_same(echo: int, tmp_path: Path) -> None:
    with flow_run_api.proxy(tmp_path, echo, {}) as proxy, client(proxy.api, None) as run:
        assert run.get(f"/flow_runs/{ID}").status_code == 200
        assert run.post("/work_pools/", json={}).status_code == 403
