"""The whole platform on a real cluster: images built and pushed, chart installed, flows deployed; deleted at the end.

Any cluster will do: KUBECONFIG names it, TEST_REGISTRY is a registry that this machine pushes to and the nodes pull
from (default localhost:5000), TEST_BASE_IMAGE replaces python:3.11-slim-bookworm where Docker Hub is not reachable.
TEST_IMAGE=name@sha256:… is installed instead of an image built here. TEST_KEEP_NAMESPACE=1 keeps the installation,
TEST_NAMESPACE=name uses a kept one: the platform's, name-runs and name-media. TEST_TEAMS=1 installs no second team;
its namespace and its store are there all the same, and belong to no team.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from installed import AUTH, TOP, Platform, build, create, filled
from kube import Namespace, command

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
# What the names of the runs' namespaces add to the platform's.
RUNS, MEDIA = "-runs", "-media"
REGISTRY = os.environ.get("TEST_REGISTRY", "localhost:5000")
BASE_IMAGE = os.environ.get("TEST_BASE_IMAGE", "")
SECOND_TEAM = os.environ.get("TEST_TEAMS", "2") != "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("cluster")
            item.add_marker(pytest.mark.timeout(900))


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
def dependencies(namespace: Namespace) -> str:
    """The manifest of what a production installation has outside of the chart, with images in the registry."""
    text = (HERE / "dependencies.yaml").read_text()
    for name, runs in (("store", RUNS), ("store-media", MEDIA)):
        text += f"---\n{filled('store.yaml', store=name, runs=namespace.name + runs)}"
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
        by_digest = build(name, context, BASE_IMAGE)
        if context != folder:
            shutil.rmtree(context)
        text = text.replace(f"image: test-{folder.name}\n", f"image: {by_digest}\n")
    return text


@pytest.fixture(scope="session")
def namespace() -> Iterator[Namespace]:
    """Namespaces of these tests' own, as k8s/base makes them: the platform's, and one for the runs of each team."""
    assert os.environ.get("KUBECONFIG"), "these tests need a Kubernetes cluster: set KUBECONFIG"
    name = os.environ.get("TEST_NAMESPACE") or f"tidepool-test-{uuid4().hex[:6]}"
    runs = [Namespace(f"{name}{suffix}") for suffix in (RUNS, MEDIA)]
    platform = Namespace(name, *runs)
    if os.environ.get("TEST_NAMESPACE"):
        yield platform
        return
    command("kubectl", "apply", "--server-side", "--kustomize", str(TOP / "k8s/cluster"))
    create(platform, "platform")
    for each in runs:
        create(each, "flow-runs")
    try:
        yield platform
    finally:
        if os.environ.get("TEST_KEEP_NAMESPACE"):
            _say(f"kept for TEST_NAMESPACE={platform.name}")
        else:
            # While the operator is there: it takes the finalizers of autoscalers away.
            for each in runs:
                each.kubectl("delete", "daskclusters", "--all", "--timeout=60s")
            command(
                "helm", "uninstall", "tidepool", "--namespace", platform.name, "--ignore-not-found", "--wait",
                timeout=180,
            )  # fmt: skip
            names = [each.name for each in (*runs, platform)]
            command("kubectl", "delete", "namespace", *names, "--timeout=180s", timeout=240)


@pytest.fixture(scope="session")
def installation(namespace: Namespace, image: str, dependencies: str) -> Iterator[Platform]:
    """The chart beside PostgreSQL and an S3 server for each team."""
    _say(f"installing into {namespace.name}")
    namespace.apply(dependencies)
    runs, media = namespace.others
    for each, team in ((runs, ""), (media, "-media")):
        each.apply(filled("flow-runs.yaml", store=f"store{team}", team=team, platform=namespace.name))
    for name in ("postgres", "store", "store-media"):
        namespace.kubectl("rollout", "status", f"deployment/{name}", "--timeout=180s", timeout=200)
    repository, digest = image.split("@")
    values = filled("values.yaml", platform=namespace.name, runs=runs.name)
    if SECOND_TEAM:
        values += filled("values-media.yaml", platform=namespace.name, media=media.name)
    command(
        "helm", "upgrade", "--install", "tidepool", str(TOP / "helm/tidepool"), "--namespace", namespace.name,
        "--values=-", f"--set=image.repository={repository}", f"--set=image.digest={digest}",
        "--set=registration.enabled=false", "--wait", "--timeout=8m",
        text=values, timeout=540,
    )  # fmt: skip
    with namespace.forwarded("service/tidepool-server", 4200) as port:
        yield Platform(namespace, runs, image, f"http://127.0.0.1:{port}/api")


@pytest.fixture(scope="session")
def media(installation: Platform) -> Platform:
    """The same installation as its second team sees it."""
    if not SECOND_TEAM:
        pytest.skip("TEST_TEAMS=1: no second team is installed")
    return replace(installation, runs=installation.namespace.others[1], pool="media", team="-media")


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
        platform.delete(f"flow_runs/{run['id']}")


def _say(what: str) -> None:
    sys.__stderr__.write(f"[{time.strftime('%H:%M:%S')}] {what}\n")
