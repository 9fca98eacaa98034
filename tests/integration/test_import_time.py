"""A flow run begins with the import of its flow's module, which must not import what only its tasks need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
# One process for all of them: most of the time is the import of Prefect.
CODE = f"""
import importlib, sys
for module in {FLOWS}:
    importlib.import_module(module)
    print(module, *sorted({HEAVY} & set(sys.modules)))
"""


def test_flow_modules_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    # The first line with more than the module's name is the culprit's.
    assert done.stdout.splitlines() == FLOWS
    assert len(FLOWS) >= 6
