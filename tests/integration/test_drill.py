"""Drills of which all parts are real: the stack breaks, on-call is told, and the runbook's commands repair it."""

from __future__ import annotations

import re
import shutil
from io import StringIO
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from tests.drill.__main__ import execute
from tests.drill.stack import stack

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(900)
def test_the_cheapest_drills_one_after_another(tmp_path: Path) -> None:
    """The others are `make drill-all`."""
    out = Console(file=StringIO(), width=200)
    try:
        with stack(tmp_path, out) as running:
            for name in ("late-runs", "stuck-cancelling", "bad-input"):
                execute(name, running)
    except BaseException:
        print(out.file.getvalue())  # type: ignore[attr-defined]  # noqa: T201 - pytest shows it
        raise
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("broken and repaired in") == 3
    fires = ("TidepoolRunsLate: ", "TidepoolRunStuck: ", "TidepoolRunsFailing: ")
    assert all(each in text for each in fires) is (shutil.which("prometheus") is not None)
    for command in (
        "prefect work-pool resume local",
        "prefect api POST /flow_runs/",
        "prefect flow-run retry ",
    ):
        assert re.search(rf"\$ +{command}", text), text
    assert "state, report, message and status have the same sentence: " in text
