"""The wheel of the package, built from the tracked and new files of this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[1]
_SOURCES = ["tidepool", "requirements/package.in", "pyproject.toml", "README.md"]
_LINKS = TOP / "tidepool" / "author" / "kubernetes"


def sources() -> list[str]:
    """The files that the package is made of, and links to folders of it, relative to the repository."""
    linked = [os.path.relpath(link.resolve(), TOP) for link in _LINKS.iterdir()]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *_SOURCES, *linked]
    listed = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (TOP / name).exists()]


def packed() -> set[str]:
    """The files that the wheel has, by their paths there: behind a link are those of the folder that it leads to."""
    names = sources()
    found = {name for name in names if name.startswith("tidepool/") and not (TOP / name).is_symlink()}
    for link in _LINKS.iterdir():
        folder = os.path.relpath(link.resolve(), TOP)
        below = (name.removeprefix(folder) for name in names if name.startswith(f"{folder}/"))
        found |= {f"{link.relative_to(TOP)}{name}" for name in below}
    return found


def build(folder: Path) -> Path:
    """Build the wheel in a folder of its own, with the setuptools of this environment; nothing is downloaded."""
    source = folder / "source"
    for name in sources():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TOP / name, source / name, follow_symlinks=False)
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "build", "--quiet", "--wheel", "--offline", "--no-build-isolation", "--python", sys.executable]
    subprocess.run([*command, "--out-dir", folder / "wheel", source], check=True)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel
