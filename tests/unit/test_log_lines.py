"""Foreign text in the log of the operator: one line for each record."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

import pytest

from tidepool.operate import log_lines

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What the root logger writes, with the lines of `install`."""
    root, stream = logging.getLogger(), io.StringIO()
    before = {each: each.formatter for each in root.handlers}
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root.addHandler(handler)
    try:
        log_lines.install()
        log_lines.install()
        yield stream
    finally:
        root.removeHandler(handler)
        for each, formatter in before.items():
            each.setFormatter(formatter)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nERROR forged", r"a\nERROR forged"),
        ("a\r\x1b[2Kb", r"a\r\x1b[2Kb"),
        ("a\u202eb\u2028c\u0085", r"a\u202eb\u2028c\x85"),
        ("täglich · 日本", "täglich · 日本"),
    ],
)
def test_foreign_text_stays_in_its_line(stream: io.StringIO, text: str, line: str) -> None:
    logging.getLogger("tidepool.test").error("run %s ended", text)
    assert stream.getvalue() == f"ERROR run {line} ended\n"


def test_a_traceback_keeps_its_lines_and_looks_like_no_record(stream: io.StringIO) -> None:
    try:
        int("a\nERROR forged")
    except ValueError:
        logging.getLogger("tidepool.test").exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert first == "ERROR failed"
    assert rest[0] == "  | Traceback (most recent call last):"
    assert all(each.startswith("  | ") for each in rest)
