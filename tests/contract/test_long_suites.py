"""The suites, drills and benchmarks that neither `make test` nor CI runs still load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[2]
SUITES = ["tests/recovery/", *(f"tests/cluster/chaos/{name}.py" for name in ("suite", "load", "incidents"))]
BENCHMARKS = sorted(path.stem for path in (TOP / "benchmarks").glob("*.py") if path.stem != "__init__")


def loaded(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=TOP, capture_output=True, text=True, check=False)


def test_pytest_collects_them() -> None:
    done = loaded("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *SUITES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [suite for suite in SUITES if not any(line.startswith(suite) for line in done.stdout.splitlines())] == []


def test_the_drills_are_listed() -> None:
    done = loaded("-m", "tests.drill")
    assert done.returncode == 0, done.stderr
    assert "late-runs" in done.stdout


def test_the_benchmarks_load() -> None:
    done = loaded("-c", "import " + ", ".join(f"benchmarks.{name}" for name in BENCHMARKS))
    assert done.returncode == 0, done.stderr
