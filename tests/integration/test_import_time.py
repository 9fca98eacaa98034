"""A flow run begins with the import of what its module imports of tidepool, which must not import what only tasks need.

`late_imports` of [tool.tidepool] is the rule for the flows themselves.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["tidepool"]["late_imports"])
MODULES = [f"tidepool.{name}" for name in ("compute", "errors", "notify", "report", "settings", "storage")]
# One process for all of them: most of the time is the import of Prefect.
CODE = f"""
import importlib, sys
for module in {MODULES}:
    importlib.import_module(module)
    print(module, *sorted({HEAVY} & set(sys.modules)))
"""


def test_what_flow_modules_import_of_tidepool_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    # The first line with more than the module's name is the culprit's.
    assert done.stdout.splitlines() == MODULES
    assert len(HEAVY) >= 12
