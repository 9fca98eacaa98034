"""The wheel of the package, built from the tracked and new files of this checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[1]
_SOURCES = ["tidepool", "requirements/package.in", "pyproject.toml", "README.md"]


def sources() -> list[str]:
    """The files that the package is made of, relative to the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *_SOURCES]
    listed = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (TOP / name).is_file()]


def build(folder: Path) -> Path:
    """Build the wheel in a folder of its own, with the setuptools of this environment; nothing is downloaded."""
    source = folder / "source"
    for name in sources():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TOP / name, source / name)
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "build", "--quiet", "--wheel", "--offline", "--no-build-isolation", "--python", sys.executable]
    subprocess.run([*command, "--out-dir", folder / "wheel", source], check=True)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel
