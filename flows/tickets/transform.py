"""The time that tickets take to close, and the accuracy of a rule that predicts it. Pure functions."""

from __future__ import annotations

import csv
import io
import itertools
import zipfile
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import compute
from pyarrow import csv as arrow_csv
from pydantic import TypeAdapter

from tidepool.errors import InputError, not_utf8

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

MEMBER = "incident_event_log.csv"
TIMESTAMPS = ("opened_at", "sys_created_at", "sys_updated_at", "resolved_at", "closed_at")
_TIME = r"^\s*\d{1,2}[-/]\d{1,2}[-/]\d{4} \d{1,2}:\d{2}\s*$"
NEEDED = ("sys_updated_at", "closed_at", "priority")

METRICS = ("MAE", "MedAE", "MSE", "R2")
CONFIDENCE = 0.95

HOUR = 3600
# Seconds to close, by priority. Newer files have `4 - Low`, older descriptions of the data `4 - Lower`.
_EXPECTED = {
    "1 - Critical": 6 * HOUR,
    "2 - High": 24 * HOUR,
    "3 - Moderate": 120 * HOUR,
    "4 - Low": 240 * HOUR,
    "4 - Lower": 240 * HOUR,
}
_EXPECTED_OTHERWISE = 180 * HOUR

# Bounds the memory of the bootstrap: about 8 MB for each array of this many floats.
_CELLS_AT_ONCE = 1_000_000
_ROWS_FOR_R2 = 2


def read(data: bytes, name: str) -> pd.DataFrame:
    """Read the event log's timestamps (as text) and priorities, one row per line of the file, in its order.

    Args:
        data: CSV with a header, or a ZIP that holds `incident_event_log.csv`; `?` is a missing value.
        name: The name of the data in errors.

    Raises:
        InputError: it is neither, a required column is missing, or it has no rows.
    """
    text = _member(data, name) if data.startswith(b"PK\x03\x04") else data
    if not text.strip():
        raise InputError(f"{name}: the file is empty; expected a CSV with the columns {', '.join(NEEDED)}")
    # Arrow and not pandas: with a selection of columns, pandas silently shifts the cells of a line that has too many.
    try:
        text.decode()
        header = next(csv.reader(io.TextIOWrapper(io.BytesIO(text), "utf-8-sig", newline="")))
        if missing := [column for column in NEEDED if column not in header]:
            raise InputError(
                f"{name}: column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))} missing; "
                f"found: {', '.join(header)}"
            )
        if duplicate := [column for column in NEEDED if header.count(column) > 1]:
            raise InputError(f"{name}: duplicate column {duplicate[0]!r}")
        columns = [column for column in header if column in {*TIMESTAMPS, *NEEDED}]
        table = arrow_csv.read_csv(
            io.BytesIO(text),
            read_options=arrow_csv.ReadOptions(use_threads=False),  # otherwise errors would not name their row
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(columns, pa.string()),
                null_values=["", "?"],
                strings_can_be_null=True,
            ),
        )
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not a CSV in UTF-8: {not_utf8(error)}") from None
    except (csv.Error, pa.ArrowInvalid) as error:
        raise InputError(f"{name}: not a CSV in UTF-8: {' '.join(str(error).split())[:120]}") from None
    if not table.num_rows:
        raise InputError(f"{name}: a header, but no tickets below it")
    _refuse_other_times(table, name)
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _refuse_other_times(table: pa.Table, name: str) -> None:
    """Refuse times of another form, such as those with an offset: tickets left out for it would bias the metrics.

    Raises:
        InputError: names the row and the value.
    """
    for column in ("sys_updated_at", "closed_at"):
        formed = compute.match_substring_regex(table[column], _TIME)
        row = compute.index(formed, value=False).as_py()  # a missing value is neither
        if row >= 0:
            value = table[column][row].as_py()
            raise InputError(
                f"{name}: row {row + 2}, {column}: {value!r} is not a local time (day-month-year hour:minute); "
                "the header is row 1"
            )


def sample(tickets: pd.DataFrame, size: int, seed: int) -> pd.DataFrame:
    """Draw that many distinct rows at random; all rows, in their order, when there are fewer."""
    if size >= len(tickets):
        return tickets
    rows = np.random.default_rng(seed).choice(len(tickets), size, replace=False)
    return tickets.iloc[rows].reset_index(drop=True)


def parse_timestamps(tickets: pd.DataFrame) -> pd.DataFrame:
    """Parse the timestamps of the rows: day first, `/` or `-` between the parts; NaT if unreadable."""
    columns = [column for column in TIMESTAMPS if column in tickets]
    return tickets.assign(**{column: _times(tickets[column]) for column in columns})


def target(tickets: pd.DataFrame) -> pd.Series[float]:
    """Compute seconds from a ticket's update to its closing; negative if updated later, NaN if either is unknown."""
    seconds: pd.Series[float] = (tickets["closed_at"] - tickets["sys_updated_at"]).dt.total_seconds()
    return seconds.rename("actual")


def predict(priority: pd.Series[str]) -> pd.Series[float]:
    """Predict the seconds that tickets of these priorities will take."""
    expected = priority.str.strip().map(_EXPECTED).astype(float)
    return expected.fillna(_EXPECTED_OTHERWISE).rename("predicted")


def pairs(actual: pd.Series[float], predicted: pd.Series[float]) -> pd.DataFrame:
    """Join `actual` and `predicted`, in seconds, of the rows whose target is known."""
    return pd.DataFrame({"actual": actual, "predicted": predicted}).dropna(subset=["actual"])


def metrics(known: pd.DataFrame) -> dict[str, float | None]:
    """Compute mean and median absolute error (s), mean squared error (s²), and R2, None for fewer than two rows."""
    scores = _scores(known[["actual"]].to_numpy(), known[["predicted"]].to_numpy())
    return {name: float(scores[name][0]) if name in scores else None for name in METRICS}


def resample(known: pd.DataFrame, seed: int, first: int, count: int) -> dict[str, list[float]]:
    """Compute the metrics of bootstrap resamples, each of as many rows, drawn with replacement.

    Args:
        known: As made by `pairs`.
        seed: Of the whole bootstrap.
        first: Number of the first resample; number and seed alone determine the rows that it draws, so that the shares
            of a bootstrap can be computed anywhere.
        count: Number of resamples.

    Returns:
        For each metric, `count` values; R2 is left out for fewer than two rows.
    """
    rows = len(known)
    at_once = max(1, _CELLS_AT_ONCE // rows)
    actual, predicted = known["actual"].to_numpy(), known["predicted"].to_numpy()
    values: dict[str, list[float]] = {}
    for start in range(first, first + count, at_once):
        numbers = range(start, min(start + at_once, first + count))
        drawn = np.column_stack([_generator(seed, number).integers(rows, size=rows) for number in numbers])
        for name, scores in _scores(actual[drawn], predicted[drawn]).items():
            values.setdefault(name, []).extend(scores.tolist())
    return values


def shares(count: int, parts: int) -> list[tuple[int, int]]:
    """Split the numbers 0 to `count` - 1 into up to `parts` even shares, each as (first, how many)."""
    edges = np.linspace(0, count, min(count, parts) + 1).astype(int).tolist()
    return [(first, end - first) for first, end in itertools.pairwise(edges)]


def intervals(resampled: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, list[float] | None]:
    """Compute the percentile bootstrap interval of each metric, as [low, high].

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3.
    """
    parts = list(resampled)
    tail = (1 - CONFIDENCE) / 2
    return {
        name: np.quantile(np.concatenate([part[name] for part in parts]), [tail, 1 - tail]).tolist()
        if name in parts[0]
        else None
        for name in METRICS
    }


def summarise(
    trial: str,
    actual: pd.Series[float],
    measured: Mapping[str, float | None],
    confidence: Mapping[str, list[float] | None] | None,
) -> dict[str, Any]:
    """Summarise a trial, without NaN or infinity.

    Args:
        trial: Its id.
        actual: Seconds that its tickets took; NaN for those left out.
        measured: Its metrics.
        confidence: Their bootstrap intervals, or None: then the summary has none.
    """
    known = actual.dropna()
    data: dict[str, Any] = {
        "num_obs": len(known),
        "num_dropped": len(actual) - len(known),
        "metrics": dict(measured),
        "target": {name: float(known.agg(name)) for name in ("mean", "median", "min", "max")},
    }
    if confidence is not None:
        data["intervals"] = dict(confidence)
    return {"id": trial, "data": data}


@dataclass(frozen=True)
class Trial:
    """One line of the history, for comparing trials."""

    time: str
    trial: str
    source: str
    rows: int
    left_out: int
    mae_hours: float
    medae_hours: float
    rmse_hours: float
    r2: float | None


_HISTORY = TypeAdapter(list[Trial])


def line(summary: Mapping[str, Any], time: str, source: str) -> Trial:
    """Build a trial's line of the history."""
    data, values = summary["data"], summary["data"]["metrics"]
    return Trial(
        time=time,
        trial=summary["id"],
        source=source,
        rows=data["num_obs"],
        left_out=data["num_dropped"],
        mae_hours=round(values["MAE"] / HOUR, 2),
        medae_hours=round(values["MedAE"] / HOUR, 2),
        rmse_hours=round(values["MSE"] ** 0.5 / HOUR, 2),
        r2=None if values["R2"] is None else round(values["R2"], 4),
    )


def read_history(text: str) -> list[Trial]:
    """Parse a history from the JSON of its rows.

    Raises:
        ValueError: it is not a history.
    """
    return _HISTORY.validate_json(text)


def extend(history: Sequence[Trial], newest: Trial, length: int) -> list[Trial]:
    """Put a trial at the front of the history, cut to its length; a repeated trial replaces its earlier line."""
    return [newest, *(trial for trial in history if trial.trial != newest.trial)][:length]


def rows(history: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the history as the rows of a table: figures first, what the UI cuts off last."""
    last = ("source", "trial")
    found = [asdict(trial) for trial in history]
    return [
        {**{name: each[name] for name in each if name not in last}, **{name: each[name] for name in last}}
        for each in found
    ]


def headline(summary: Mapping[str, Any]) -> str:
    """Summarise the result in one line."""
    data, values = summary["data"], summary["data"]["metrics"]
    left_out = f", {data['num_dropped']} left out" if data["num_dropped"] else ""
    r2 = "" if values["R2"] is None else f" · R2 {values['R2']:.3f}"
    return (
        f"MAE {values['MAE'] / HOUR:,.1f} h · MedAE {values['MedAE'] / HOUR:,.1f} h{r2} · "
        f"{data['num_obs']} ticket{'s' if data['num_obs'] != 1 else ''}{left_out}"
    )


def markdown(summary: Mapping[str, Any], source: str, url: str, drawing: str) -> str:
    """Render the page of a trial.

    Args:
        summary: The trial.
        source: The source of its tickets.
        url: The URL of its summary.
        drawing: The plot of the history, as Markdown.
    """
    data = summary["data"]
    confidence = data.get("intervals")
    table = [f"| metric | value |{f' {CONFIDENCE:.0%} interval |' if confidence else ''}"]
    table.append(f"|---|---:|{'---:|' if confidence else ''}")
    for name, (divisor, unit) in zip(METRICS, ((HOUR, " h"), (HOUR, " h"), (HOUR**2, " h²"), (1, "")), strict=True):
        cells = [name, _shown([data["metrics"][name]], divisor) + unit]
        if confidence:
            cells.append(_shown(confidence[name] or [None], divisor) + unit)
        table.append(f"| {' | '.join(cells)} |")
    spread = ", ".join(f"{name} {value / HOUR:,.1f} h" for name, value in data["target"].items())
    return "\n".join(
        [
            f"**{headline(summary)}**",
            "",
            *table,
            "",
            f"The tickets, from `{source}`, took: {spread} (negative: updated after they were closed).",
            "",
            drawing,
            "",
            f"Summary: `{url}`",
        ]
    )


def _member(data: bytes, name: str) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            found = next((entry for entry in names if PurePosixPath(entry).name == MEMBER), None)
            if found is None:
                raise InputError(f"{name}: the ZIP has no {MEMBER}; found: {', '.join(names) or 'nothing'}")
            return archive.read(found)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, unknown method
        raise InputError(f"{name}: the ZIP cannot be read: {error}") from None


def _times(column: pd.Series[str]) -> pd.Series[pd.Timestamp]:
    # One spelling first: pandas takes one format per column, and guessing per cell would read 03-05 as March 5th.
    text = column.str.strip().str.replace("/", "-", regex=False)
    return pd.to_datetime(text, format="%d-%m-%Y %H:%M", errors="coerce")


def _scores(actual: NDArray[np.float64], predicted: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Compute the metrics of each column of two matrices of the same shape, rows being tickets."""
    from sklearn.metrics import mean_absolute_error, mean_squared_error, median_absolute_error, r2_score

    functions = {"MAE": mean_absolute_error, "MedAE": median_absolute_error, "MSE": mean_squared_error}
    if len(actual) >= _ROWS_FOR_R2:
        functions["R2"] = r2_score
    return {name: function(actual, predicted, multioutput="raw_values") for name, function in functions.items()}


def _generator(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))


def _shown(values: Sequence[float | None], divisor: float) -> str:
    return " to ".join("-" if value is None else f"{value / divisor:,.3f}" for value in values)
