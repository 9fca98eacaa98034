from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.csv_etl.transform import increase, key, parse, preview, render
from tidepool.errors import InputError


def test_rows_keep_their_shape() -> None:
    assert parse("1,2,3\n\n-4\n+5, 6\n") == [[1, 2, 3], [], [-4], [5, 6]]


def test_quotes_and_windows_line_ends_are_read() -> None:
    assert parse('"1",2\r\n3\r\n') == [[1, 2], [3]]


def test_an_empty_text_has_no_rows() -> None:
    assert parse("") == []
    assert render([]) == ""


@given(st.lists(st.lists(st.integers(), max_size=5), max_size=20))
def test_rendered_rows_are_parsed_back(rows: list[list[int]]) -> None:
    assert parse(render(rows)) == rows


@given(st.lists(st.lists(st.integers(), max_size=5), max_size=20), st.integers())
def test_increase_is_undone_by_its_opposite_and_leaves_its_input_alone(rows: list[list[int]], increment: int) -> None:
    before = [row.copy() for row in rows]
    assert increase(increase(rows, increment), -increment) == before == rows


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1,2\n3,4\n5,x7\n", "line 3, column 2: 'x7' is not an integer"),
        ("1,2.5\n", "line 1, column 2: '2.5' is not an integer"),
        ("1,,3\n", "line 1, column 2: '' is not an integer"),
        ("1_000\n", "line 1, column 1: '1_000' is not an integer"),
        (f"1\n{'9' * 5000}\n", "line 2, column 1: an integer of 5,000 digits; at most 4,000"),
        ("2026-01-01T00:00:00+02:00\n", "line 1, column 1: '2026-01-01T00:00:00+02:00' is not an integer"),
        ("1,NaN\n", "line 1, column 2: 'NaN' is not an integer"),
        ("1\n\n٣\n", "line 3, column 1: '٣' is not an integer"),
        ('1\n2,"3\n', "line 2: unexpected end of data; expected a CSV of integers"),
    ],
)
def test_bad_cells_are_named_by_their_place(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert str(caught.value) == sentence


def test_the_destination_takes_the_run_id() -> None:
    assert key("csv_etl/{run_id}/out.csv", "abc") == "csv_etl/abc/out.csv"
    assert key("s3://bucket/out.csv", "abc") == "s3://bucket/out.csv"


@pytest.mark.parametrize(("destination", "part"), [("a/{runid}.csv", "{runid}"), ("a/{run_id", "{run_id"), ("}", "}")])
def test_other_placeholders_are_refused(destination: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        key(destination, "abc")
    assert str(caught.value) == f"destination: unknown placeholder '{part}'; the only one is {{run_id}}"


def test_the_preview_shows_the_first_lines_cut_to_their_width() -> None:
    rows = [[1, 2], [123456789]] + [[0]] * 20
    shown = preview(rows, increase(rows, 1), lines=2, width=5)
    assert shown == [
        {"line": 1, "before": "1,2", "after": "2,3"},
        {"line": 2, "before": "1234…", "after": "1234…"},
    ]
