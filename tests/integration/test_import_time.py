"""A flow run begins with the import of its flow's module: what only tasks need must not be imported with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each of them takes a good part of the second that Prefect itself takes, or more.
HEAVY = {
    "dask",
    "distributed",
    "matplotlib",
    "numpy",
    "pandas",
    "PIL",
    "prefect_dask",
    "pyarrow",
    "s3fs",
    "scipy",
    "sklearn",
    "statsmodels",
}
FLOWS = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("flows/*/flow.py"))


@pytest.mark.parametrize("module", FLOWS)
def test_a_flow_module_imports_nothing_heavy(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # import time: self [us] | cumulative | imported package
    lines = (line.split("|") for line in done.stderr.splitlines() if line.startswith("import time:"))
    imported = {parts[2].strip().partition(".")[0] for parts in lines}
    assert {"flows", "prefect"} <= imported
    assert imported & HEAVY == set()
