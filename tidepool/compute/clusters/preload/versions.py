"""The libraries that driver, scheduler and workers must have in the same version: they exchange pickles."""

from __future__ import annotations

import platform
from importlib.metadata import version

# The name of the handler by which a scheduler or worker returns its versions.
VERSIONS = "tidepool_versions"
PACKAGES = ("cloudpickle", "dask", "distributed", "msgpack", "numpy", "pandas", "prefect", "prefect-dask", "tidepool")


def versions() -> str:
    """Return this process's versions in one line: `python 3.11.2, cloudpickle 3.1.1, …`."""
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])


def difference(ours: str, theirs: str) -> str:
    """Return the differences of two such lines, as `pandas 2.3.3 here, pandas 2.3.1 there`; empty without one."""
    mine, other = ours.split(", "), theirs.split(", ")
    return "; ".join(f"{a} here, {b} there" for a, b in zip(mine, other, strict=False) if a != b)
