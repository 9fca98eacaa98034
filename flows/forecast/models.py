"""The models that compete, simplest first. Pure functions of a weekly history without gaps.

Each takes the history (values, oldest first, at least two) and the number of weeks to forecast, and returns that many
values. A model that cannot forecast raises; collecting its warnings is up to the caller. numpy and the model libraries
are imported where they are used: the flow module imports this one to know the models' names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast, get_args

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]
    Model = Callable[[FloatArray, int], FloatArray]

ModelName = Literal["last-value", "drift", "seasonal-naive", "theta", "holt-winters", "lag-regression", "arima"]
MODEL_NAMES: tuple[ModelName, ...] = get_args(ModelName)

SEASON = 52  # weeks; for models that need a whole number
YEAR = 365.25 / 7  # weeks; for those that do not
# The history that models are fitted to: enough years for the season, and a bounded run time.
_HISTORY = 10 * SEASON
_HARMONICS = 3  # sine and cosine pairs that draw the shape of a year
_LAGS = (1, 2, 3, 4, 5, 6, 7, 8)


def predict(name: ModelName, history: FloatArray, weeks: int) -> FloatArray:
    """Forecast with one model, fitted to this history.

    Args:
        name: One of `MODEL_NAMES`.
        history: Weekly values, oldest first, none missing.
        weeks: How many weeks after the last one.
    """
    models: dict[ModelName, Model] = {
        "last-value": last_value,
        "drift": drift,
        "seasonal-naive": seasonal_naive,
        "theta": theta,
        "holt-winters": holt_winters,
        "lag-regression": lag_regression,
        "arima": arima,
    }
    return models[name](history, weeks)


def last_value(history: FloatArray, weeks: int) -> FloatArray:
    """Repeat the last value."""
    import numpy as np

    return np.full(weeks, history[-1])


def drift(history: FloatArray, weeks: int) -> FloatArray:
    """Extrapolate the line from the first value through the last."""
    import numpy as np

    slope = (history[-1] - history[0]) / (len(history) - 1)
    return cast("FloatArray", history[-1] + slope * np.arange(1, weeks + 1))


def seasonal_naive(history: FloatArray, weeks: int) -> FloatArray:
    """Repeat the values of 52 weeks before.

    Raises:
        ValueError: the history is shorter than a year.
    """
    import numpy as np

    _require(SEASON, history)
    return np.resize(history[-SEASON:], weeks)


def theta(history: FloatArray, weeks: int) -> FloatArray:
    """Apply Theta: the mean of a line and simple exponential smoothing, after the season is removed.

    Source: Assimakopoulos and Nikolopoulos (2000), International Journal of Forecasting 16, 521-530.
    """
    import numpy as np
    from statsmodels.tsa.forecasting.theta import ThetaModel

    recent = history[-_HISTORY:]
    # The test for a season uses the differences: a trend would hide it.
    fitted = ThetaModel(recent, period=SEASON, deseasonalize=_has_seasons(recent), difference=True).fit()
    return np.asarray(fitted.forecast(weeks), dtype=np.float64)


def holt_winters(history: FloatArray, weeks: int) -> FloatArray:
    """Apply exponential smoothing of level, damped trend and additive season.

    Source: Hyndman and Athanasopoulos, Forecasting: Principles and Practice (3rd edition), chapter 8.

    Raises:
        ValueError: the history is shorter than 10 weeks.
    """
    import numpy as np
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    _require(10, history)
    recent = history[-_HISTORY:]
    seasonal = {"seasonal": "add", "seasonal_periods": SEASON} if _has_seasons(recent) else {}
    # Estimating the 52 seasonal starting values too takes a hundred times as long and gains nothing here.
    model = ExponentialSmoothing(recent, trend="add", damped_trend=True, initialization_method="heuristic", **seasonal)
    return np.asarray(model.fit().forecast(weeks), dtype=np.float64)


def lag_regression(history: FloatArray, weeks: int) -> FloatArray:
    """Regress (ridge) a week's change on those of the weeks before and the year before, and on the time of year.

    Changes, not values: a regression on values would not follow a trend beyond the range of its data. Weeks further
    ahead use the forecasts of the nearer ones.

    Raises:
        ValueError: the history is shorter than 20 weeks.
    """
    import numpy as np
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _require(20, history)
    recent = history[-_HISTORY:]
    lags = np.array([*_LAGS, SEASON] if _has_seasons(recent) else _LAGS)
    changes = np.concatenate([np.diff(recent), np.zeros(weeks)])
    season = _fourier(len(changes), recent)
    known = len(recent) - 1

    def features(weeks_of_interest: npt.NDArray[np.int_]) -> FloatArray:
        return np.hstack([changes[weeks_of_interest[:, None] - lags], season[weeks_of_interest]])

    seen = np.arange(lags.max(), known)
    regression = make_pipeline(StandardScaler(), Ridge()).fit(features(seen), changes[seen])
    for week in range(known, known + weeks):
        changes[week] = regression.predict(features(np.array([week])))[0]
    return cast("FloatArray", recent[-1] + np.cumsum(changes[known:]))


def arima(history: FloatArray, weeks: int) -> FloatArray:
    """Apply dynamic harmonic regression: ARIMA(1, 1, 1) with drift around the season as sines and cosines.

    It takes a tenth of a second; a seasonal ARIMA with a period of 52 takes minutes.
    Source: Hyndman and Athanasopoulos, Forecasting: Principles and Practice (3rd edition), section 10.5.

    Raises:
        ValueError: the history is shorter than 10 weeks.
    """
    import numpy as np
    from statsmodels.tsa.arima.model import ARIMA

    _require(10, history)
    recent = history[-_HISTORY:]
    # Modelling the changes allows a fast estimator for stationary series: the same fit as that of the state space in a
    # fifteenth of the time. It converges far better on numbers of the order of 1.
    changes = np.diff(recent)
    scale = float(changes.std()) or 1.0
    season = np.diff(_fourier(len(recent) + weeks, recent), axis=0)
    seen, ahead = (season[: len(changes)], season[len(changes) :]) if season.size else (None, None)
    model = ARIMA(changes / scale, exog=seen, order=(1, 0, 1), trend="c")
    fitted = model.fit(method="innovations_mle", cov_type="none")
    forecast = np.asarray(fitted.forecast(weeks, exog=ahead), dtype=np.float64)
    return cast("FloatArray", recent[-1] + scale * np.cumsum(forecast))


def _require(weeks: int, history: FloatArray) -> None:
    if len(history) < weeks:
        raise ValueError(f"needs {weeks} weeks of history, has {len(history)}")


def _has_seasons(history: FloatArray) -> bool:
    """Tell whether the history is long enough to show a season: two years."""
    return len(history) >= 2 * SEASON


def _fourier(length: int, history: FloatArray) -> FloatArray:
    """Encode the time of year of `length` weeks as sines and cosines, one row a week; no columns without seasons."""
    import numpy as np

    harmonics = _HARMONICS if _has_seasons(history) else 0
    angles = 2 * np.pi / YEAR * np.outer(np.arange(length), np.arange(1, harmonics + 1))
    return np.hstack([np.sin(angles), np.cos(angles)])
