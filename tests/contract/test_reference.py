"""The reference pages say what the code does, and the index of docs/ leads to every page."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import generate

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("path", [DOCS / "settings.md", DOCS / "commands.md"], ids=lambda path: path.name)
def test_the_page_is_what_make_reference_writes(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == generate.pages()[path], "run `make reference`"


def test_the_index_has_each_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = {each.name for each in DOCS.glob("*.md") if not each.name.endswith(".in.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()
