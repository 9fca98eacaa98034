"""The Python of the guides works as it is written: the blocks of a page are executed one after another."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.usefixtures("prefect_server", "storage_root", "threads")


def blocks(page: str) -> Iterator[CodeType]:
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    for each in BLOCK.finditer(text):
        line = text[: each.start(1)].count("\n")
        # The lines of a traceback are the page's; the `__future__` of this module is not.
        yield compile("\n" * line + each.group(1), path, "exec", dont_inherit=True)


def names(page: str) -> dict[str, object]:
    return {"__name__": Path(page).stem}


@pytest.mark.usefixtures("targets")
@pytest.mark.parametrize("page", ["compute.md", "data.md", "parameters.md", "reports.md"])
def test_the_blocks_of_a_guide_work(page: str) -> None:
    found, space = list(blocks(page)), names(page)
    assert found
    for each in found:
        exec(each, space)  # noqa: S102 - the guide is what is tested


def test_the_tests_of_the_guide_pass_and_its_cell_works_in_an_event_loop(tmp_path: Path, storage_root: str) -> None:
    tests, cell = blocks("testing.md")
    space = names("testing.md")
    exec(tests, space)  # noqa: S102 - as above
    given = {"tmp_path": tmp_path, "storage_root": storage_root}
    called = [each for name, each in space.items() if name.startswith("test_") and inspect.isfunction(each)]
    assert len(called) == 2
    for each in called:
        each(**{name: given[name] for name in inspect.signature(each).parameters})

    async def run() -> None:
        exec(cell, names("testing.md"))  # noqa: S102 - as above

    # A notebook executes its cells while its event loop runs.
    asyncio.run(run())
