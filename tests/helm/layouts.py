"""The ways to place flow runs: beside the platform, apart from it, and with a second team."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """An installation's namespaces.

    Attributes:
        values: Values of the chart.
        teams: Namespace of each team's runs, by the suffix of its objects in the platform's namespace.
    """

    values: dict[str, str]
    teams: dict[str, str]


RELEASE = "flows"
_APART = {"flowRuns__namespace": "runs"}
_MEDIA = {
    "flowRuns__apiSecret": "tidepool-flow-run-api",
    "teams__media__namespace": "media-runs",
    "teams__media__workPool__name": "media",
    "teams__media__flowRuns__apiSecret": "tidepool-flow-run-api-media",
}
LAYOUTS = {
    "one namespace": Layout({"flowRuns__namespace": ""}, {"": RELEASE}),
    "two namespaces": Layout(_APART, {"": "runs"}),
    "two teams": Layout(_APART | _MEDIA, {"": "runs", "-media": "media-runs"}),
}
