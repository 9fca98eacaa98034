"""The releases of upstream packages that the contract tests were read against."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from packaging.version import Version


def assert_checked(package: str, releases: str) -> None:
    """Fail for a release outside of those that were checked: CONTRIBUTING.md says how to check another one."""
    installed = version(package)
    assert Version(installed) in SpecifierSet(releases), f"{package} {installed} has not been checked: {releases}"
