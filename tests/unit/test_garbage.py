"""The garbage collector's thresholds outside of the image."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tidepool import garbage

if TYPE_CHECKING:
    import pytest

REPOSITORY = Path(__file__).parents[2]


def test_they_are_those_of_the_image() -> None:
    first, *others = garbage.THRESHOLDS
    written = ", ".join([f"{first:_}", *map(str, others)])
    assert f"import gc; gc.set_threshold({written})" in (REPOSITORY / "Dockerfile").read_text()


def test_a_module_runs_with_them_and_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text("import gc, sys; print(__name__, sys.argv[1:], gc.get_threshold())")
    command = [sys.executable, "-m", "tidepool.garbage", "shown", "start", "--port", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ran.stdout == f"__main__ ['start', '--port', '1'] {garbage.THRESHOLDS}\n"


def test_a_local_worker_has_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from tidepool.compute.clusters.preload import local_worker

    nicer: list[int] = []
    monkeypatch.setattr(local_worker.os, "nice", nicer.append)
    before = gc.get_threshold()
    try:
        local_worker.dask_setup(None)  # type: ignore[arg-type] # it is not looked at
        assert gc.get_threshold() == garbage.THRESHOLDS
    finally:
        gc.set_threshold(*before)
    assert nicer == [local_worker.NICENESS]
