"""The whole platform on a real cluster: images built and pushed, chart installed, flows deployed; removed at the end.

Any cluster will do: KUBECONFIG names it, TEST_REGISTRY is a registry that this machine pushes to and the nodes pull
from (default localhost:5000), TEST_BASE_IMAGE stands in for python:3.11-slim-bookworm where there is no Docker Hub.
TEST_IMAGE=name@sha256:… is installed in place of an image built here. TEST_KEEP_NAMESPACE=1 leaves the installation,
TEST_NAMESPACE=name uses one that was left.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kube import Namespace, command

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
TOP = HERE.parents[1]
REGISTRY = os.environ.get("TEST_REGISTRY", "localhost:5000")
BASE_IMAGE = os.environ.get("TEST_BASE_IMAGE", "")
AUTH = ("admin", "test-only")
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
# A busy two-core machine is slow, not wrong.
RUN_SECONDS = 420.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("cluster")
            item.add_marker(pytest.mark.timeout(900))


@dataclass(frozen=True)
class Platform:
    """An installed platform.

    Attributes:
        namespace: Where it is.
        image: The image that everything runs, by digest.
        api: URL of its Prefect API from here.
    """

    namespace: Namespace
    image: str
    api: str

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Asks the Prefect API."""
        answer = httpx.post(f"{self.api}/{path}", json=body or {}, auth=AUTH, timeout=60)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def read(self, path: str) -> Any:
        """Reads from the Prefect API."""
        answer = httpx.get(f"{self.api}/{path}", auth=AUTH, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def start(self, deployment: str, **parameters: Any) -> str:
        """Starts a run of `flow/deployment` as a person does in the UI; its id."""
        found = self.read(f"deployments/name/{deployment}")
        body = {
            "parameters": {**found["parameters"], **parameters},
            "state": {"type": "SCHEDULED", "name": "Scheduled"},
        }
        return str(self.post(f"deployments/{found['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        """A flow run as the server knows it."""
        return dict(self.read(f"flow_runs/{run_id}"))

    def state(self, run_id: str) -> str:
        """The type of its state."""
        return str(self.run(run_id)["state_type"])

    def wait(self, run_id: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """Waits until a run has ended; its last word."""
        self.namespace.until(lambda: self.state(run_id) in FINAL, f"flow run {run_id} has ended", seconds)
        return self.run(run_id)

    def logs(self, run_id: str) -> str:
        """What a run logged."""
        query = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(line["message"] for line in self.post("logs/filter", query))

    def artifacts(self, run_id: str) -> dict[str, Any]:
        """A run's artifacts by key, the newest of each."""
        query = {"artifacts": {"flow_run_id": {"any_": [run_id]}}, "limit": 200}
        found = sorted(self.post("artifacts/filter", query), key=lambda each: each["created"])
        return {each["key"]: each for each in found}


@pytest.fixture(scope="session")
def image() -> str:
    """The image of this working tree in the registry, by digest."""
    if built := os.environ.get("TEST_IMAGE"):
        return built
    _say("building the image")
    printed = command(
        "make", "image", f"IMAGE_NAME={REGISTRY}/tidepool", f"TIDEPOOL_IMAGE_BASE={BASE_IMAGE}", "PUSH=1", timeout=900
    )
    found = re.search(rf"^{re.escape(REGISTRY)}/tidepool@sha256:\S+", printed, re.MULTILINE)
    assert found, printed
    return found.group(0)


@pytest.fixture(scope="session")
def dependencies() -> str:
    """The manifest of what a production installation has outside of the chart, with images in the registry."""
    text = (HERE / "dependencies.yaml").read_text()
    program = shutil.which("versitygw")
    assert program, "versitygw, the S3 server of these tests, is not on PATH"
    for folder in sorted((HERE / "images").iterdir()):
        name = f"{REGISTRY}/test-{folder.name}:1"
        context = folder
        if folder.name == "s3":
            context = Path(os.environ.get("TMPDIR", "/tmp")) / f"tidepool-s3-{uuid4().hex[:8]}"
            context.mkdir()
            shutil.copy(folder / "Dockerfile", context)
            shutil.copy(program, context)
        build = ["docker", "buildx", "build", "--quiet", "--tag", name, "--push", str(context)]
        command(*build, *([f"--build-arg=BASE_IMAGE={BASE_IMAGE}"] if BASE_IMAGE else []), timeout=600)
        if context != folder:
            shutil.rmtree(context)
        # By digest: a node keeps what it once pulled under a tag.
        inspect = ["docker", "buildx", "imagetools", "inspect", name, "--format"]
        by_digest = command(*inspect, f"{name.removesuffix(':1')}@{{{{.Manifest.Digest}}}}").strip()
        text = text.replace(f"image: test-{folder.name}\n", f"image: {by_digest}\n")
    return text


@pytest.fixture(scope="session")
def namespace() -> Iterator[Namespace]:
    """A namespace of these tests' own, which enforces the restricted Pod Security Standard; gone afterwards."""
    assert os.environ.get("KUBECONFIG"), "these tests need a Kubernetes cluster: set KUBECONFIG"
    if kept := os.environ.get("TEST_NAMESPACE"):
        yield Namespace(kept)
        return
    made = Namespace(f"tidepool-test-{uuid4().hex[:6]}")
    command("kubectl", "create", "namespace", made.name)
    command("kubectl", "label", "namespace", made.name, "pod-security.kubernetes.io/enforce=restricted")
    try:
        yield made
    finally:
        if os.environ.get("TEST_KEEP_NAMESPACE"):
            _say(f"kept for TEST_NAMESPACE={made.name}")
        else:
            # The chart first: the operator's finalizers are answered while the operator is there.
            made.kubectl("delete", "daskclusters", "--all", "--timeout=60s")
            command(
                "helm", "uninstall", "tidepool", "--namespace", made.name, "--ignore-not-found", "--wait", timeout=180
            )
            command("kubectl", "delete", "namespace", made.name, "--timeout=120s", timeout=180)


@pytest.fixture(scope="session")
def installation(namespace: Namespace, image: str, dependencies: str) -> Iterator[Platform]:
    """The chart beside PostgreSQL and an S3 server."""
    _say(f"installing into {namespace.name}")
    namespace.apply(dependencies)
    for name in ("postgres", "s3"):
        namespace.kubectl("rollout", "status", f"deployment/{name}", "--timeout=180s", timeout=200)
    repository, digest = image.split("@")
    command(
        "helm", "upgrade", "--install", "tidepool", str(TOP / "helm/tidepool"), "--namespace", namespace.name,
        f"--values={HERE / 'values.yaml'}", f"--set=image.repository={repository}", f"--set=image.digest={digest}",
        "--set=registration.enabled=false", "--wait", "--timeout=8m",
        timeout=540,
    )  # fmt: skip
    with _forwarded(namespace, "service/tidepool-server", 4200) as port:
        yield Platform(namespace, image, f"http://127.0.0.1:{port}/api")


@pytest.fixture(scope="session")
def platform(installation: Platform) -> Platform:
    """The same, with the six flows deployed by a bare `prefect deploy --all`, and nothing running."""
    _deploy(installation)
    return installation


def _deploy(platform: Platform) -> None:
    _say("prefect deploy --all")
    environment = {
        **os.environ,
        "PREFECT_API_URL": platform.api,
        "PREFECT_API_AUTH_STRING": ":".join(AUTH),
        "PREFECT_HOME": f"/tmp/tidepool-{platform.namespace.name}",
        "TIDEPOOL_IMAGE_BASE": BASE_IMAGE,
        "TIDEPOOL_IMAGE_NAME": platform.image.split("@")[0],
        "TIDEPOOL_REPOSITORY_URL": "https://git.example.com/tidepool",
    }
    prefect = Path(sys.executable).parent / "prefect"
    done = subprocess.run(
        [prefect, "--no-prompt", "deploy", "--all"],
        cwd=TOP, env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    shutil.rmtree(environment["PREFECT_HOME"], ignore_errors=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    # Schedules would start runs that no test asked for.
    for deployment in platform.post("deployments/filter"):
        platform.post(f"deployments/{deployment['id']}/pause_deployment")
    # What the schedules have made in the meantime ends before the first test.
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    for run in platform.post("flow_runs/filter", scheduled):
        httpx.delete(f"{platform.api}/flow_runs/{run['id']}", auth=AUTH, timeout=60)


@contextmanager
def _forwarded(namespace: Namespace, target: str, port: int) -> Iterator[int]:
    """A local port that leads to one in the cluster; made again when it breaks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        local = probe.getsockname()[1]
    loop = f"while true; do kubectl --namespace {namespace.name} port-forward {target} {local}:{port}; sleep 0.2; done"
    forward = subprocess.Popen(
        ["bash", "-c", loop], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        end = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{local}/api/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < end, f"{target} does not answer\n{namespace.report()}"
                time.sleep(0.5)
        yield local
    finally:
        os.killpg(forward.pid, 15)
        forward.wait()


def _say(what: str) -> None:
    sys.__stderr__.write(f"[{time.strftime('%H:%M:%S')}] {what}\n")
