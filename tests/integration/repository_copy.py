"""A copy of this repository to change: its tracked and new files, in Git."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

TOP = Path(__file__).parents[2]


def copy(folder: Path, database: Path) -> Path:
    """Copy the files of this repository to a new folder, and commit them there.

    Args:
        folder: The new folder.
        database: The fixture `migrated_database`: the tests in the copy need not make it again.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        if (TOP / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, folder / name)
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for arguments in (["init", "--quiet"], ["add", "--all"], [*author, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    (folder / ".pytest_cache").mkdir()
    shutil.copy(database, folder / ".pytest_cache")
    return folder
