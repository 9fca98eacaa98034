"""The result of a run as JSON, whatever a flow returns."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tidepool.local.run import _as_json

CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


class Broken:
    """Its text cannot be made."""

    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"a": [1, None, "b"]}, {"a": [1, None, "b"]}),
        ({2: "a", (1, 2): "b", None: 1, dt.date(2026, 1, 1): 3}, {"2": "a", "1,2": "b", "None": 1, "2026-01-01": 3}),
        ({frozenset({1}): 2}, "dict, which has no form in JSON"),
        ({"a": float("nan"), "b": [float("inf"), {"c": -float("inf")}]}, {"a": None, "b": [None, {"c": None}]}),
        (np.float64("nan"), None),
        ({"n": np.int64(3)}, {"n": "3"}),
        (pd.Timestamp("2026-01-01"), "2026-01-01T00:00:00"),
        (CIRCLE, "list, which has no form in JSON"),
        (Broken(), "Broken, which has no form in JSON"),
        (b"x\xff", "eP8="),
    ],
)
def test_every_result_is_json(result: object, expected: object) -> None:
    plain = _as_json(result)
    assert plain == expected
    assert json.loads(json.dumps(plain, allow_nan=False)) == expected
