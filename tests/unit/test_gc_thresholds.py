"""The garbage collector's thresholds: one file for the image and for the environment of `make setup`."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "requirements" / "gc.pth"
SHOW = "import gc; print(gc.get_threshold())"


def test_python_reads_the_thresholds_from_the_file() -> None:
    # -S: without the environment's own .pth files.
    code = f"import site; site.addsitedir({str(SOURCE.parent)!r}); {SHOW}"
    shown = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "(50000, 20, 20)\n"


def test_a_child_process_has_the_thresholds() -> None:
    installed = Path(sysconfig.get_path("purelib")) / SOURCE.name
    if not installed.exists():
        pytest.skip("this environment was not made by `make setup`: Python's own thresholds are slower, nothing else")
    assert installed.read_text() == SOURCE.read_text(), "out of date: run `make setup`"
    shown = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True).stdout
    assert shown == "(50000, 20, 20)\n"


@pytest.mark.parametrize("name", ["Dockerfile", "Makefile"])
def test_image_and_setup_install_the_file(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    assert "requirements/gc.pth" in text
    assert "set_threshold" not in text
