"""The page of a run, for people: Markdown with one chart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from flows.forecast.transform import COVERAGE
from tidepool import report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from flows.forecast.transform import Outcome, Plan, Prediction, Score

_SHOWN = 104  # weeks of history in the chart, or more when more are held out


def headline(prediction: Prediction) -> str:
    """Summarise the result in one line."""
    return (
        f"Week ending {prediction.week}: {number(prediction.value)} "
        f"({COVERAGE} % interval {number(prediction.low)} to {number(prediction.high)}), by {prediction.model}"
    )


def number(value: float) -> str:
    """Format a number with six significant digits."""
    return f"{value:,.6g}"


def model_rows(ranked: Sequence[Score], plan: Plan) -> list[dict[str, str]]:
    """Return the table of models, best first."""
    return [
        {
            "model": score.model,
            "MASE": _short(score.mase),
            "RMSE": _short(score.rmse),
            "MAE": _short(score.mae),
            "sMAPE %": _short(score.smape),
            "windows": f"{score.windows} of {plan.windows}",
            "remarks": "; ".join((*(f"failed on {why}" for why in score.failures), *score.warnings)),
        }
        for score in ranked
    ]


def prediction_row(outcome: Outcome) -> dict[str, str]:
    """Return the prediction as a row of the history of predictions."""
    prediction = outcome.prediction
    return {
        "week ending": prediction.week.isoformat(),
        "prediction": number(prediction.value),
        "low": number(prediction.low),
        "high": number(prediction.high),
        "model": prediction.model,
        "MASE": _short(outcome.ranked[0].mase),
        "source": outcome.source,
    }


def page(outcome: Outcome, series: pd.Series[float], stale: str = "") -> str:
    """Render the page; `stale` is the warning of data that is too old."""
    plan, ranked, prediction = outcome.plan, outcome.ranked, outcome.prediction
    rows = model_rows(ranked, plan)
    table = "\n".join(
        [
            f"| {' | '.join(rows[0])} |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
            *(f"| {' | '.join(map(_cell, row.values()))} |" for row in rows),
        ]
    )
    best = f"**Warning: {stale}.**\n\n**{prediction.model}**" if stale else f"**{prediction.model}**"
    return f"""# {headline(prediction)}

{best} was the best of {len(ranked)} models over {plan.windows} windows of {plan.horizon} weeks\
{_against_last_value(ranked)}.

{report.picture(_figure(outcome, series), headline(prediction))}

## Models

{table}

A MASE of 1 is as accurate as repeating the last value, one week ahead. RMSE and MAE are in the unit of the series.

## Data

- Source: `{outcome.source}`
- {len(series):,} weeks, ending {series.index[0]:%Y-%m-%d} to {series.index[-1]:%Y-%m-%d}
- {series.isna().sum():,} weeks without an observation: filled on a straight line to fit the models, never scored
- Interval: split conformal, from {prediction.errors} errors of {prediction.model} one week ahead, refitted before \
each held-out week
"""


def _figure(outcome: Outcome, series: pd.Series[float]) -> Figure:
    plan, prediction = outcome.plan, outcome.prediction
    figure, axis = report.axes(height=3.5)
    recent = series.iloc[-max(_SHOWN, 2 * plan.held_out) :]
    axis.plot(recent.index, recent.to_numpy(), color="#808080", linewidth=1.2, label="observed")
    label = f"backtests of {prediction.model}"
    for done in outcome.backtests:
        if done.model == prediction.model:
            weeks = series.index[plan.weeks_of(done.window, len(series))]
            axis.plot(weeks, done.forecast.points, color="#e07b00", linewidth=1.8, label=label)
            label = ""  # one entry in the legend for all windows
    axis.errorbar(
        pd.DatetimeIndex([prediction.week]),
        [prediction.value],
        yerr=[[prediction.value - prediction.low], [prediction.high - prediction.value]],
        color="#1f83d6",
        fmt="o",
        markersize=4,
        capsize=3,
        label=f"prediction, {COVERAGE} % interval",
    )
    axis.legend(fontsize="small")
    return figure


def _against_last_value(ranked: Sequence[Score]) -> str:
    """Compare the best model with repeating the last value, the baseline."""
    plain = next((score for score in ranked[1:] if score.model == "last-value" and score.mase is not None), None)
    return f": MASE {_short(ranked[0].mase)}, against {_short(plain.mase)} of last-value" if plain else ""


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
