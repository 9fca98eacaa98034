"""The Python of the guides works as it is written: the blocks of a page are executed one after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("prefect_server", "storage_root", "threads")
@pytest.mark.parametrize("page", ["compute.md", "data.md"])
def test_the_blocks_of_a_guide_work(page: str) -> None:
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": path.stem}
    blocks = list(BLOCK.finditer(text))
    assert blocks
    for each in blocks:
        line = text[: each.start(1)].count("\n")
        # The lines of a traceback are the page's.
        exec(compile("\n" * line + each.group(1), path, "exec"), names)  # noqa: S102 - the guide is what is tested
