"""Rendering of the chart and k8s/, with every object checked against vendored schemas: no network, no cluster."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import yaml

from tests.helm.layouts import LAYOUTS, RELEASE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helm.layouts import Layout

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "tidepool"
SCHEMAS = Path(__file__).parent / "schemas" / "{{.ResourceKind}}{{.KindSuffix}}.json"
DIGEST = "sha256:" + "0" * 64

Manifest = dict[str, Any]


class Render(Protocol):
    """The signature of the `render` fixture."""

    def __call__(self, *files: str, **values: str) -> list[Manifest]:
        """Return the objects of the chart; `files` are in ci/, a value `server__replicas` is `server.replicas`."""


class ChartError(AssertionError):
    """Helm or kubeconform rejected the chart."""


def need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} on PATH")


def run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChartError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def check(text: str) -> None:
    """Assert that every object is valid for kubeconform, without unknown fields."""
    skip = "CustomResourceDefinition,Application,GitRepository,HelmRelease,Kustomization"
    # tests/cluster/test_admission.py gives these to a real API server.
    skip += ",ValidatingAdmissionPolicy,ValidatingAdmissionPolicyBinding"
    run("kubeconform", "-strict", "-skip", skip, "-schema-location", str(SCHEMAS), stdin=text)


def checked(text: str) -> list[Manifest]:
    """Return the objects of a YAML stream, each of them valid."""
    check(text)
    return [document for document in yaml.safe_load_all(text) if document]


@cache
def template(files: tuple[str, ...], values: tuple[tuple[str, str], ...], *more: str) -> str:
    options = [f"--values={CHART}/ci/{name}-values.yaml" for name in files]
    options += [f"--set={name.replace('__', '.')}={value}" for name, value in values]
    return run(
        "helm", "template", "tidepool", str(CHART), f"--namespace={RELEASE}", "--kube-version=1.34", *more, *options
    )


@pytest.fixture
def render() -> Render:
    need("helm", "kubeconform")

    def objects(*files: str, **values: str) -> list[Manifest]:
        return checked(template(files or ("minimal",), tuple(values.items())))

    return objects


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    """Each way to place the flow runs."""
    found: Layout = request.param
    return found


@pytest.fixture
def kustomize() -> Callable[[str], list[Manifest]]:
    """Build a folder of k8s/."""
    need("kubectl", "kubeconform")
    return lambda folder: checked(run("kubectl", "kustomize", str(ROOT / "k8s" / folder)))


def pod_spec(manifest: Manifest) -> Manifest | None:
    """Return the pod spec of a workload, or None for another object."""
    if manifest["kind"] == "Pod":
        return manifest["spec"]
    return manifest.get("spec", {}).get("template", {}).get("spec")


@pytest.fixture
def pods(render: Render) -> list[tuple[str, Manifest]]:
    """Return (kind/name, pod spec) of every workload of production."""
    found = []
    for manifest in render("production"):
        spec = pod_spec(manifest)
        if spec is not None:
            found.append((f"{manifest['kind']}/{manifest['metadata']['name']}", spec))
    return found
