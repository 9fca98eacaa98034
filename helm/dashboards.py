# ruff: noqa: INP001 - a script, not a package
"""The Grafana dashboards of the chart: Now, Flow, Platform and cost. `helm/generate.py` writes them as JSON.

Every expression aggregates: while the exporter is replaced, Prometheus has two pods' series.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
Unit = Literal["short", "s", "percentunit", "none"]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
# Of Grafana 11; newer ones migrate it when they load it.
SCHEMA = 39
COLUMNS = 24
# Red below or above; Grafana begins with the first colour.
GOOD, WARN, BAD = "green", "orange", "red"

WHO = 'flow=~"$flow", deployment=~"$deployment"'


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        title: Its heading.
        text: What it shows, and the alert that watches it.
        queries: Expressions by legend; of a table, by column.
        kind: `stat` is a number, `timeseries` a curve, `table` a row for each series.
        unit: Grafana's name of the unit.
        width: Of 24 columns.
        steps: Colours from a value on, in rising order; the first one has no value.
        words: Values that are shown as a word.
        stacked: Curves are stacked.
    """

    title: str
    text: str
    queries: dict[str, str]
    kind: Literal["stat", "timeseries", "table"] = "timeseries"
    unit: Unit = "short"
    width: int = 8
    steps: tuple[tuple[float | None, str], ...] = ((None, GOOD),)
    words: dict[int, str] = field(default_factory=dict)
    stacked: bool = False

    @property
    def height(self) -> int:
        """Rows of Grafana's grid."""
        return 4 if self.kind == "stat" else 8

    def json(self, number: int, x: int, y: int) -> Json:
        """Return it as Grafana's JSON.

        Args:
            number: Its number on the dashboard.
            x: Its first column.
            y: Its first row.
        """
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.text,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": [self._target(at, *each) for at, each in enumerate(self.queries.items())],
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._overrides()},
            "options": _OPTIONS[self.kind],
        } | ({"transformations": self._transformations()} if self.kind == "table" else {})

    def _target(self, at: int, legend: str, expr: str) -> Json:
        table = self.kind == "table"
        return {
            "refId": chr(ord("A") + at),
            "expr": expr,
            "datasource": DATASOURCE,
            "legendFormat": legend,
            "instant": self.kind != "timeseries",
            "range": self.kind == "timeseries",
            "format": "table" if table else "time_series",
        }

    def _defaults(self) -> Json:
        steps = [{"value": value, "color": color} for value, color in self.steps]
        found: Json = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": steps}}
        if self.kind == "timeseries":
            stacking = {"stacking": {"mode": "normal"}} if self.stacked else {}
            found["custom"] = {"fillOpacity": 10, "showPoints": "never", "axisSoftMin": 0, **stacking}
        else:
            found["color"] = {"mode": "thresholds"}
        if self.words:
            options = {str(value): {"text": word} for value, word in self.words.items()}
            found["mappings"] = [{"type": "value", "options": options}]
        return found

    def _overrides(self) -> list[Json]:
        if self.kind != "table":
            return [_colored(*each) for each in _STATES.items()] if "{{state}}" in self.queries else []
        first = next(iter(self.queries))
        colored = {"id": "custom.cellOptions", "value": {"type": "color-text"}}
        return [{"matcher": {"id": "byName", "options": first}, "properties": [colored]}]

    def _transformations(self) -> list[Json]:
        names = {f"Value #{chr(ord('A') + at)}": legend for at, legend in enumerate(self.queries)}
        if len(self.queries) == 1:
            names = {"Value": next(iter(self.queries))}
        hidden = {"Time": True, "__name__": True}
        return [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": hidden, "renameByName": names}},
            {"id": "sortBy", "options": {"sort": [{"field": next(iter(self.queries)), "desc": True}]}},
        ]


@dataclass(frozen=True)
class Row:
    """Panels under a heading, from left to right and then below."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """A dashboard.

    Attributes:
        uid: What its URL ends with; it never changes.
        title: Its name.
        text: What it is for.
        rows: Its panels.
        variables: Labels of deployments to choose by.
        span: Time that it shows at first.
    """

    uid: str
    title: str
    text: str
    rows: tuple[Row, ...]
    variables: tuple[str, ...] = ()
    span: str = "now-6h"

    def json(self) -> Json:
        """Return it as Grafana's JSON."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.text,
            "tags": ["tidepool"],
            "schemaVersion": SCHEMA,
            "editable": False,
            "refresh": "30s",
            "time": {"from": self.span, "to": "now"},
            "timezone": "browser",
            "links": [_LINK],
            "templating": {"list": [_PROMETHEUS, *self._variables()]},
            "panels": self._panels(),
        }

    def _variables(self) -> list[Json]:
        """Return the variables; each offers the values that go with those chosen before it."""
        found = []
        before: list[str] = []
        for name in self.variables:
            query = f"label_values(tidepool_deployment_info{{{', '.join(before)}}}, {name})"
            everything = {"text": "All", "value": "$__all"}
            found.append(
                {
                    "name": name,
                    "label": name.capitalize(),
                    "type": "query",
                    "datasource": DATASOURCE,
                    "query": {"query": query, "refId": name},
                    "definition": query,
                    "includeAll": True,
                    "multi": True,
                    "current": everything,
                    "refresh": 2,
                    "sort": 1,
                }
            )
            before.append(f'{name}=~"${name}"')
        return found

    def _panels(self) -> list[Json]:
        found: list[Json] = []
        y = 0
        for row in self.rows:
            grid = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
            found.append({"id": len(found) + 1, "type": "row", "title": row.title, "gridPos": grid, "panels": []})
            x, y, height = 0, y + 1, 0
            for panel in row.panels:
                if x + panel.width > COLUMNS:
                    x, y, height = 0, y + height, 0
                found.append(panel.json(len(found) + 1, x, y))
                x, height = x + panel.width, max(height, panel.height)
            y += height
        return found


_STATES = {
    "Completed": "green",
    "Running": "blue",
    "Failed": "red",
    "Crashed": "orange",
    "Cancelled": "text",
    "Late": "purple",
}
_OPTIONS: dict[str, Json] = {
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "background", "graphMode": "none"},
    "timeseries": {"tooltip": {"mode": "multi", "sort": "desc"}, "legend": {"showLegend": True, "placement": "bottom"}},
    "table": {"showHeader": True, "cellHeight": "sm"},
}
_LINK: Json = {
    "title": "Dashboards of tidepool",
    "type": "dashboards",
    "tags": ["tidepool"],
    "includeVars": True,
    "keepTime": True,
    "asDropdown": False,
}
_PROMETHEUS: Json = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _colored(state: str, color: str) -> Json:
    fixed = {"id": "color", "value": {"mode": "fixed", "fixedColor": color}}
    return {"matcher": {"id": "byName", "options": state}, "properties": [fixed]}


def _watched(text: str, *alerts: str) -> str:
    """Return a panel's text with the alerts that watch it."""
    return f"{text} Alert: {', '.join(f'{each} (docs/runbooks/{each}.md)' for each in alerts)}."


def _live(states: str, selector: str = "") -> str:
    """Return the flow runs that have not ended, in some states: a series for each deployment and state."""
    return f'max by (flow, deployment, state) (tidepool_flow_runs{{state=~"{states}"{selector}}})'


def _quantiles(metric: str, selector: str = "", window: str = "1h") -> dict[str, str]:
    """Return median and 95th percentile of a histogram over the hour before each point."""
    buckets = f"sum by (le) (increase({metric}_bucket{{{selector}}}[{window}]))"
    return {name: f"histogram_quantile({share}, {buckets})" for name, share in {"median": 0.5, "95th": 0.95}.items()}


def _of_teams(metric: str) -> str:
    """Return what the operator's counter of runs has risen by in a day, by team, which only the exporter knows."""
    return (
        f"sum by (team) (sum by (flow, deployment) (increase({metric}[1d]))"
        " * on (flow, deployment) group_right () max by (flow, deployment, team) (tidepool_deployment_info))"
    )


NOW = Dashboard(
    uid="tidepool-now",
    title="tidepool: Now",
    text="What is wrong at this moment; the first place to look.",
    rows=(
        Row(
            "Is anything wrong?",
            (
                Panel(
                    "Alerts",
                    "Alerts of tidepool that fire.",
                    {"alerts": 'count(ALERTS{alertname=~"Tidepool.+", alertstate="firing"}) or vector(0)'},
                    kind="stat",
                    width=3,
                    steps=((None, GOOD), (1, BAD)),
                ),
                Panel(
                    "Prefect server",
                    _watched("Whether the server answers the exporter.", "TidepoolPrefectApiDown"),
                    {"server": "max(tidepool_prefect_api_up)"},
                    kind="stat",
                    unit="none",
                    width=3,
                    steps=((None, BAD), (1, GOOD)),
                    words={0: "away", 1: "answers"},
                ),
                Panel(
                    "Age of the figures",
                    _watched("Time since the exporter wrote its page.", "TidepoolBlind"),
                    {"age": "min(tidepool_exporter_snapshot_age_seconds)"},
                    kind="stat",
                    unit="s",
                    width=3,
                    steps=((None, GOOD), (60, WARN), (120, BAD)),
                ),
                Panel(
                    "Workers silent for",
                    _watched(
                        "Time since the last heartbeat, of the work pool that is silent longest.",
                        "TidepoolWorkerSilent",
                    ),
                    {"silent": "time() - min(max by (work_pool) (tidepool_worker_last_heartbeat_timestamp_seconds))"},
                    kind="stat",
                    unit="s",
                    width=3,
                    steps=((None, GOOD), (180, WARN), (300, BAD)),
                ),
                Panel(
                    "Late runs",
                    _watched("Flow runs past their scheduled time.", "TidepoolRunsLate"),
                    {"late": f"sum({_live('Late|Scheduled')}) or vector(0)"},
                    kind="stat",
                    width=3,
                    steps=((None, GOOD), (1, WARN), (10, BAD)),
                ),
                Panel(
                    "Deployments failing",
                    _watched("Deployments whose last two flow runs or more failed or crashed.", "TidepoolRunsFailing"),
                    {"failing": "count(max by (flow, deployment) (tidepool_consecutive_failures) >= 2) or vector(0)"},
                    kind="stat",
                    width=3,
                    steps=((None, GOOD), (1, BAD)),
                ),
                Panel(
                    "Without a next run",
                    _watched(
                        "Active schedules that have no next flow run.",
                        "TidepoolSchedulerStopped",
                        "TidepoolNothingScheduled",
                    ),
                    {
                        "schedules": "count(max by (flow, deployment) (tidepool_schedule_active) == 1"
                        " unless max by (flow, deployment) (tidepool_schedule_next_timestamp_seconds) > time())"
                        " or vector(0)"
                    },
                    kind="stat",
                    width=3,
                    steps=((None, GOOD), (1, WARN)),
                ),
                Panel(
                    "Left behind for",
                    _watched(
                        "How long the sweep has found the same thing left behind on Kubernetes.", "TidepoolOrphans"
                    ),
                    {"left": "max(tidepool_dask_orphan_oldest_seconds)"},
                    kind="stat",
                    unit="s",
                    width=3,
                    steps=((None, GOOD), (60, WARN), (300, BAD)),
                ),
            ),
        ),
        Row(
            "What is wrong?",
            (
                Panel(
                    "Alerts that fire",
                    "The runbook of each is docs/runbooks/<alert>.md.",
                    {
                        "firing": "max by (alertname, severity, deployment, work_pool, team)"
                        ' (ALERTS{alertname=~"Tidepool.+", alertstate="firing"})'
                    },
                    kind="table",
                    width=12,
                    steps=((None, BAD),),
                ),
                Panel(
                    "Failures one after another",
                    _watched("Deployments whose last flow run failed or crashed.", "TidepoolRunsFailing"),
                    {"failures": "max by (flow, deployment, tier, team) (tidepool_consecutive_failures) > 0"},
                    kind="table",
                    width=12,
                    steps=((None, WARN), (2, BAD)),
                ),
                Panel(
                    "Oldest unfinished runs",
                    _watched(
                        "Age in the present state, or past the scheduled time.",
                        "TidepoolRunStuck",
                        "TidepoolRunTooLong",
                    ),
                    {"age": "topk(10, max by (flow, deployment, state) (tidepool_flow_run_oldest_seconds))"},
                    kind="table",
                    unit="s",
                    width=12,
                    steps=((None, "text"), (600, WARN)),
                ),
                Panel(
                    "Time since the last success",
                    _watched("Of what the alert allows: 1.5 intervals and ten minutes.", "TidepoolFreshnessMissed"),
                    {
                        "share": "topk(10,"
                        " (time() - max by (flow, deployment) (tidepool_last_success_timestamp_seconds))"
                        " / (1.5 * max by (flow, deployment) (tidepool_schedule_interval_seconds) + 600))"
                    },
                    kind="table",
                    unit="percentunit",
                    width=12,
                    steps=((None, GOOD), (1, BAD)),
                ),
            ),
        ),
        Row(
            "What happens",
            (
                Panel(
                    "Unfinished runs",
                    "Flow runs by state.",
                    {"{{state}}": f"sum by (state) ({_live('.+')})"},
                    stacked=True,
                ),
                Panel(
                    "Ended runs",
                    _watched("Flow runs that ended in the hour before each point.", "TidepoolRunsCrashing"),
                    {"{{state}}": "sum by (state) (increase(tidepool_flow_runs_finished_total[1h]))"},
                ),
                Panel(
                    "Start delay",
                    "Scheduled time to start, of the runs that ended in the hour before each point.",
                    _quantiles("tidepool_flow_run_start_delay_seconds"),
                    unit="s",
                ),
            ),
        ),
    ),
)

FLOW = Dashboard(
    uid="tidepool-flow",
    title="tidepool: Flow",
    text="One team's flows, or one flow: how its runs end, how long they take, what they cost.",
    span="now-7d",
    variables=("team", "flow", "deployment"),
    rows=(
        Row(
            "Now",
            (
                Panel(
                    "Deployments",
                    "Failures since the last success, 1 if a schedule is active, and the hours since the last success.",
                    {
                        "failures": f"max by (flow, deployment, tier, team) (tidepool_consecutive_failures{{{WHO}}})",
                        "active": f"max by (flow, deployment, tier, team) (tidepool_schedule_active{{{WHO}}})",
                        "hours since the last success": "(time() - max by (flow, deployment, tier, team)"
                        f" (tidepool_last_success_timestamp_seconds{{{WHO}}})) / 3600",
                    },
                    kind="table",
                    width=16,
                    steps=((None, GOOD), (1, WARN), (2, BAD)),
                ),
                Panel(
                    "Next run in",
                    _watched("Time to the next flow run.", "TidepoolNothingScheduled"),
                    {
                        "{{flow}}/{{deployment}}": "min by (flow, deployment)"
                        f" (tidepool_schedule_next_timestamp_seconds{{{WHO}}})"
                        " - time()"
                    },
                    unit="s",
                ),
            ),
        ),
        Row(
            "Runs",
            (
                Panel(
                    "Ended runs",
                    "Flow runs that ended in the hour before each point.",
                    {"{{state}}": f"sum by (state) (increase(tidepool_flow_runs_finished_total{{{WHO}}}[1h]))"},
                ),
                Panel(
                    "Duration",
                    _watched(
                        "Time Running, of the runs that ended in the hour before each point.", "TidepoolRunTooLong"
                    ),
                    _quantiles("tidepool_flow_run_duration_seconds", WHO),
                    unit="s",
                ),
                Panel(
                    "Start delay",
                    "Scheduled time to start, of the runs that ended in the hour before each point.",
                    _quantiles("tidepool_flow_run_start_delay_seconds", WHO),
                    unit="s",
                ),
                Panel(
                    "Unfinished runs",
                    "Flow runs by state.",
                    {"{{state}}": f"sum by (state) ({_live('.+', ', ' + WHO)})"},
                    stacked=True,
                ),
                Panel(
                    "Core-hours of a day",
                    "CPU requests of drivers and Dask pods, of the day before each point.",
                    {
                        "{{component}}": f"sum by (component) (increase(tidepool_run_core_seconds_total{{{WHO}}}[1d]))"
                        " / 3600"
                    },
                ),
                Panel(
                    "Cost of a day",
                    "Without prices (`operator.prices`) there is none.",
                    {
                        "{{flow}}/{{deployment}}": "sum by (flow, deployment)"
                        f" (increase(tidepool_run_cost_total{{{WHO}}}[1d]))"
                    },
                ),
            ),
        ),
    ),
)

PLATFORM = Dashboard(
    uid="tidepool-platform",
    title="tidepool: Platform and cost",
    text="Server, workers, work pools, Dask clusters and the sweep; what teams and flows cost.",
    span="now-24h",
    rows=(
        Row(
            "Prefect",
            (
                Panel(
                    "Server",
                    _watched("Duration of the exporter's requests.", "TidepoolPrefectApiSlow"),
                    _quantiles("tidepool_prefect_api_request_seconds", window="10m"),
                    unit="s",
                ),
                Panel(
                    "Since the last heartbeat",
                    _watched("Of the workers of a work pool.", "TidepoolWorkerSilent"),
                    {"{{work_pool}}": "time() - max by (work_pool) (tidepool_worker_last_heartbeat_timestamp_seconds)"},
                    unit="s",
                ),
                Panel(
                    "Slots of work pools",
                    _watched("Runs that are Pending, Running or Cancelling, and the limit.", "TidepoolRunsLate"),
                    {
                        "{{work_pool}}": "max by (work_pool) (tidepool_pool_slots_used)",
                        "limit of {{work_pool}}": "max by (work_pool) (tidepool_pool_slots_limit)",
                    },
                ),
                Panel(
                    "Work pools",
                    "Workers online, and 1 if the pool is paused.",
                    {
                        "online": "max by (work_pool) (tidepool_workers_online)",
                        "paused": "max by (work_pool) (tidepool_pool_paused)",
                    },
                    kind="table",
                    steps=((None, BAD), (1, GOOD)),
                ),
                Panel(
                    "The exporter's reading",
                    "Duration of a reading of the server; every 15 seconds.",
                    {"reading": "max(tidepool_exporter_refresh_seconds)"},
                    unit="s",
                ),
                Panel(
                    "Incomplete figures",
                    "1 if there is more than the exporter reads (docs/metrics.md).",
                    {"{{part}}": "max by (part) (tidepool_exporter_truncated)"},
                ),
                Panel(
                    "Messages about failed runs",
                    _watched("In the hour before each point.", "TidepoolMessagesLost"),
                    {"{{end}}": "sum by (end) (increase(tidepool_messages_total[1h]))"},
                ),
            ),
        ),
        Row(
            "Dask clusters",
            (
                Panel(
                    "Clusters",
                    "By namespace; shared ones, and those of one run.",
                    {"{{run_namespace}} {{kind}}": "max by (run_namespace, kind) (tidepool_dask_clusters)"},
                ),
                Panel(
                    "Oldest cluster",
                    "Age by namespace.",
                    {
                        "{{run_namespace}} {{kind}}": "max by (run_namespace, kind)"
                        " (tidepool_dask_cluster_oldest_seconds)"
                    },
                    unit="s",
                ),
                Panel(
                    "Deleted by the sweep",
                    _watched(
                        "In the hour before each point: more than a few says that drivers die.", "TidepoolOrphans"
                    ),
                    {"{{kind}}": "sum by (kind) (increase(tidepool_reaper_deleted_total[1h]))"},
                ),
                Panel(
                    "Since the last sweep",
                    _watched("By namespace.", "TidepoolReaperSilent"),
                    {
                        "{{run_namespace}}": "time() - max by (run_namespace)"
                        " (tidepool_reaper_last_sweep_timestamp_seconds)"
                    },
                    unit="s",
                ),
                Panel(
                    "Cores asked for",
                    "Mean of the five minutes before each point.",
                    {"{{component}}": "sum by (component) (rate(tidepool_run_core_seconds_total[5m]))"},
                    stacked=True,
                ),
                Panel(
                    "GiB asked for",
                    "Mean of the five minutes before each point.",
                    {"{{component}}": "sum by (component) (rate(tidepool_run_gib_seconds_total[5m]))"},
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Cost of a day",
            (
                Panel(
                    "Teams",
                    _watched(
                        "The day before each point, and the budget. Without prices there is none.",
                        "TidepoolBudgetExceeded",
                    ),
                    {
                        "{{team}}": _of_teams("tidepool_run_cost_total"),
                        "budget of {{team}}": "max by (team) (tidepool_budget_per_day)",
                    },
                ),
                Panel(
                    "Core-hours of teams",
                    "The day before each point.",
                    {"{{team}}": f"{_of_teams('tidepool_run_core_seconds_total')} / 3600"},
                ),
                Panel(
                    "Dearest deployments",
                    "By core-hours of the day before.",
                    {
                        "core-hours": "topk(10, sum by (flow, deployment)"
                        " (increase(tidepool_run_core_seconds_total[1d]))) / 3600"
                    },
                    kind="table",
                    steps=((None, "text"),),
                ),
            ),
        ),
    ),
)

ALL = {"now": NOW, "flow": FLOW, "platform": PLATFORM}
