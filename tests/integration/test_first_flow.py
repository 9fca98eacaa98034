"""docs/first-flow.md: its blocks, executed in a copy of this repository, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.repository_copy import copy

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(900)


def blocks(page: str) -> list[tuple[str, str]]:
    """Kind and content of each block of a page of Markdown, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def changes(diff: str) -> Iterator[tuple[str, str, str]]:
    """File, text before and text after of each part of a diff, whose parts have no line numbers."""
    file = ""
    for part in re.split(r"^(?=--- |@@ @@\n)", diff, flags=re.MULTILINE):
        if part.startswith("---"):
            file = part.splitlines()[1].removeprefix("+++ b/")
        elif part:
            lines = part.splitlines(keepends=True)[1:]
            before, after = ("".join(line[1:] for line in lines if line[0] in f" {sign}") for sign in "-+")
            yield file, before, after


def test_every_block_of_the_tutorial(tmp_path: Path, prefect_server: str, migrated_database: Path) -> None:
    repository = copy(tmp_path / "repository", migrated_database)
    (repository / ".venv").symlink_to(TOP / ".venv")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TIDEPOOL_"))}
    printed = []
    for kind, text in blocks((repository / "docs" / "first-flow.md").read_text()):
        if kind == "diff":
            for name, before, after in changes(text):
                content = (repository / name).read_text()
                assert content.count(before) == 1, f"{name}: not once in it: {before}"
                (repository / name).write_text(content.replace(before, after))
        elif kind == "bash":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=repository,
                env={**kept, "PREFECT_API_URL": prefect_server},
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
        else:
            assert kind == "text", f"a block of kind {kind!r} would not be executed"
    assert re.search(r"no problems; next: (\S*/)?tidepool run station-means", printed[0])
    assert "station-means: Completed" in printed[1]
    assert printed[1].splitlines()[-1].endswith("/means.csv")
