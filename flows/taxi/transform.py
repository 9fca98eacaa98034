"""Taxi rides as tables: meaning of the columns, rides by hour, the most generous of them, tips by passengers.

A *ride* has `pickup` (local time), `tip` and `total` (US dollars) and `passengers` (a count, may be missing).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from tidepool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# The names of each column in yellow files, in green files and in the small sample used for teaching.
NAMES: Mapping[str, tuple[str, ...]] = {
    "pickup": ("tpep_pickup_datetime", "lpep_pickup_datetime", "pickup"),
    "tip": ("tip_amount", "tip"),
    "total": ("total_amount", "total"),
    "passengers": ("passenger_count", "passengers"),
}
RIDE = tuple(NAMES)
# Pickups are local times: hours of another zone would be other hours.
_OFFSET = r"[Tt ]\d.*(?:[Zz]|[+-]\d\d(?::?\d\d)?)\s*$"
# Every whole number up to it is exact as a float.
_LARGEST = 2.0**53
MEANING = {
    "pickup": "a local date and time (ISO 8601, no offset)",
    "tip": "a number",
    "total": "a number",
    "passengers": "a whole number",
}


def columns(found: Sequence[str], wanted: Sequence[str], place: str) -> dict[str, str]:
    """Find the columns of a file.

    Args:
        found: The file's column names.
        wanted: Keys of `NAMES`.
        place: What to call the file in an error.

    Returns:
        The file's name of each wanted column.

    Raises:
        InputError: a wanted column is missing; names it, the names that are recognised, and the file's columns.
    """
    chosen = {}
    for column in wanted:
        names = [name for name in NAMES[column] if name in found]
        if not names:
            accepted, there = " or ".join(NAMES[column]), ", ".join(found) or "none"
            raise InputError(f"{place}: no column for the {column} ({accepted}); found: {there}")
        chosen[column] = names[0]
    return chosen


def typed(raw: pd.DataFrame, place: str, first_line: int | None = None) -> pd.DataFrame:
    """Convert the columns of rides to their types.

    Args:
        raw: Columns named as in `NAMES`, text as a CSV file holds it (missing: NaN) or values as a Parquet file holds
            them; the index counts the rows of the file from 0.
        place: What to call the file in an error.
        first_line: Line of the first row in a text file; None for a file without lines, whose rows are counted from 1.

    Returns:
        The same rows; `pickup` as datetime64, `passengers` as nullable Int64, the others as float64.

    Raises:
        InputError: a value is invalid for its column; names the place and the value.
    """
    values = {column: _values(column, raw[column]) for column in raw.columns}
    wrong = [
        (cast("int", bad.idxmax()), str(column))
        for column in raw.columns
        if (bad := values[column].isna() & raw[column].notna()).any()
    ]
    if wrong:
        row, column = min(wrong)
        where = f"line {row + first_line}" if first_line is not None else f"row {row + 1}"
        raise InputError(f"{place}: {where}, {column}: {raw.loc[row, column]!r} is not {MEANING[column]}")
    return pd.DataFrame(values)


def _values(column: str, raw: pd.Series[Any]) -> pd.Series[Any]:
    """Parse the column's values; an invalid one is missing."""
    if column == "pickup":
        return _times(raw)
    numbers = pd.to_numeric(raw, errors="coerce").astype("float64")
    numbers = numbers.where(numbers.abs() <= _LARGEST)  # not infinite
    if column != "passengers":
        return numbers
    return numbers.where(numbers % 1 == 0).astype("Int64")


def _times(raw: pd.Series[Any]) -> pd.Series[Any]:
    if pd.api.types.is_datetime64_dtype(raw):
        return raw
    if isinstance(raw.dtype, pd.DatetimeTZDtype) or pd.api.types.is_numeric_dtype(raw):
        # A column of missing values is one of numbers.
        return pd.Series(pd.NaT, index=raw.index, dtype="datetime64[ns]")
    texts = raw.astype(str).where(raw.notna())
    local = texts.mask(texts.str.contains(_OFFSET, regex=True, na=False))
    return pd.to_datetime(local, errors="coerce", format="ISO8601")


def by_hour(rides: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Group the rides by pickup hour (date and hour), oldest first, under a name such as `2019-03-23T20`.

    Rides without a pickup time belong to no hour and are left out.
    """
    hours = rides["pickup"].dt.strftime("%Y-%m-%dT%H")
    for hour, chunk in rides.groupby(hours, sort=True):
        yield str(hour), chunk.reset_index(drop=True)


def paid_with_tip(rides: pd.DataFrame) -> pd.DataFrame:
    """Keep the rides with a tip above 0 and a positive total; cash payments and refunds do not measure generosity."""
    return rides[(rides["tip"] > 0) & (rides["total"] > 0)].reset_index(drop=True)


def most_generous(rides: pd.DataFrame, count: int) -> pd.DataFrame:
    """Find the rides with the largest share of the total paid as a tip.

    Args:
        rides: Rides with a tip and a positive total; may be empty.
        count: Maximum number to keep.

    Returns:
        At most `count` rides with their `ratio` of tip to total, the largest first; of equal ones the larger tip, then
        the earlier pickup.
    """
    # Rounded, so that ratios that are equal on paper (3/13 of two fares) are equal here too.
    ranked = rides.assign(ratio=(rides["tip"] / rides["total"]).round(9))
    by = ["ratio", "tip", "pickup"]
    return ranked.sort_values(by, ascending=[False, False, True], kind="stable").head(count).reset_index(drop=True)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Convert rows to JSON-serialisable values: times in ISO 8601, missing values as None."""
    times = table.select_dtypes("datetime")
    texts = table.assign(**{str(name): times[name].dt.strftime("%Y-%m-%dT%H:%M:%S") for name in times})
    rows = texts.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def from_records(rides: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Convert rows made by `records` back to rides; may be empty."""
    return typed(pd.DataFrame(list(rides), columns=list(RIDE)), "rides")


def fails_on_purpose(chunk: str, attempt: int, *, last_attempt: int, rate: float, seed: int) -> bool:
    """Tell whether this attempt at this chunk shall fail on purpose: a pure function of its arguments.

    The last attempt is spared unless the rate is 1, so that a run with injected failures shows its retries and ends
    Completed however many chunks it has.

    Args:
        chunk: Name of the chunk.
        attempt: Number of the attempt, from 1.
        last_attempt: Number of the last attempt.
        rate: Share of the attempts that fail, 0 to 1.
        seed: Selects the attempts that fail.
    """
    if rate >= 1:
        return True
    if attempt >= last_attempt:
        return False
    drawn = hashlib.sha256(f"{seed}/{chunk}/{attempt}".encode()).digest()[:8]
    return int.from_bytes(drawn, "big") / 2**64 < rate


def tips_by_passengers(means: pd.DataFrame) -> pd.DataFrame:
    """Prepare mean tips for display: passenger counts above 0 only, smallest first, dollars rounded to cents.

    Args:
        means: One row per passenger count with `passengers` (may be missing or 0), `tip` (missing where no ride of that
            count has one) and `rides`.

    Raises:
        InputError: no ride has a passenger count above 0 and a tip.
    """
    if means.empty:
        raise InputError("no rides; no mean can be computed")
    counts = means["passengers"].astype("Int64")
    kept = means.assign(passengers=counts)[(counts > 0).fillna(value=False) & means["tip"].notna()]
    if kept.empty:
        raise InputError("no ride has both a passenger count above 0 and a tip; no mean can be computed")
    return kept.assign(tip=kept["tip"].astype("float64").round(2)).sort_values("passengers").reset_index(drop=True)
