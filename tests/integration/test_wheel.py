"""The wheel of tidepool has all that the package needs, and nothing of this repository's flows."""

from __future__ import annotations

from email.parser import Parser
from typing import TYPE_CHECKING
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tests.wheel import TOP, build, packed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    return ZipFile(build(tmp_path_factory.mktemp("wheel")))


def requirements(path: Path) -> set[Requirement]:
    """The lines of a requirements file, without comments and options."""
    lines = [line.partition(" #")[0].strip() for line in path.read_text().splitlines()]
    return {Requirement(line) for line in lines if line and not line.startswith(("#", "-"))}


def test_it_has_every_file_of_the_package_and_no_other_package(wheel: ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == packed()
    assert "tidepool/author/templates/flow.py.jinja" in names


def test_it_has_the_chart_and_the_objects_of_the_cluster(wheel: ZipFile) -> None:
    for name, source in {
        "chart/.helmignore": "helm/tidepool/.helmignore",
        "chart/templates/server/deployment.yaml": "helm/tidepool/templates/server/deployment.yaml",
        "cluster/admission.yaml": "k8s/cluster/admission.yaml",
        "crds/kustomization.yaml": "k8s/crds/kustomization.yaml",
        "overlays/dev/flow-runs/quantities.yaml": "k8s/overlays/dev/flow-runs/quantities.yaml",
    }.items():
        assert wheel.read(f"tidepool/author/kubernetes/{name}") == (TOP / source).read_bytes()


def test_its_dependencies_are_those_that_are_locked(wheel: ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    listed = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
    declared = {Requirement(line) for line in listed}
    assert declared == requirements(TOP / "requirements" / "package.in")
    assert [str(each) for each in declared if not each.specifier] == [], "dependencies without a bound"
    assert "-r package.in" in (TOP / "requirements" / "runtime.in").read_text().splitlines()
