"""The alert rules: each fires, stays silent and has no data as promtool sees it; each of their mutants is found."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.helm.conftest import CHART, ROOT, need, template
from tidepool.operate import metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Rule = dict[str, Any]
TEXT = (CHART / "files" / "alerts.yaml").read_text(encoding="utf-8")
RULES: dict[str, Rule] = {each["alert"]: each for each in yaml.safe_load(TEXT)["groups"][0]["rules"]}
UNITS = yaml.safe_load((ROOT / "tests" / "helm" / "alerts.yaml").read_text(encoding="utf-8"))
PROMETHEUS = "--api-versions=monitoring.coreos.com/v1"
RUNBOOKS = "https://example.test/runbooks"
SEVERITIES = {"page", "ticket"}
_OTHERS = {">": ("<", ">="), ">=": ("<", ">"), "==": ("!=",)}


def unit(alert: str, number: int, severity: str) -> dict[str, Any]:
    """Return a unit of `alerts.yaml` as promtool wants it.

    The series ALERTS has an alert's labels without its annotations, which would have to be repeated here.
    """
    case = UNITS[alert][number]
    firing = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": str(values)} for name, values in case["series"].items()],
        "promql_expr_test": [
            {
                "expr": firing,
                "eval_time": minute,
                "exp_samples": [
                    {
                        "labels": firing[:-1]
                        + "".join(f',{key}="{value}"' for key, value in {**labels, "severity": severity}.items())
                        + "}",
                        "value": 1,
                    }
                    for labels in expected
                ],
            }
            for minute, expected in case["fires"].items()
        ],
    }


def evaluate(rule: Rule, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the units of a rule's alert against it."""
    alert = rule["alert"]
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "tidepool", "rules": [rule]}]}))
    tests = [unit(alert, number, RULES[alert]["labels"]["severity"]) for number in range(len(UNITS[alert]))]
    units = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "units.yaml").write_text(yaml.safe_dump(units))
    command = ("promtool", "test", "rules", "units.yaml")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def mutants(rule: Rule) -> Iterator[tuple[str, Rule]]:
    """Yield each changed threshold, comparison, selector, list of labels and time of a rule, and its description."""

    def changed(text: str, **parts: Any) -> tuple[str, Rule]:
        return text, {**copy.deepcopy(rule), **parts}

    expr = rule["expr"]
    for found in re.finditer(r"(?<![\w.])\d+(\.\d+)?(?![\w.])", expr):
        number = float(found.group())
        for other in (number * 2, number / 2) if number else (1.0,):
            mutant = f"{expr[: found.start()]}{other:g}{expr[found.end() :]}"
            yield changed(f"{number:g} at {found.start()} becomes {other:g}", expr=mutant)
    for found in re.finditer(r"(?<=\s)(>=|>|==)(?=\s)", expr):
        for comparison in _OTHERS[found.group()]:
            mutant = f"{expr[: found.start()]}{comparison}{expr[found.end() :]}"
            yield changed(f"{found.group()} at {found.start()} becomes {comparison}", expr=mutant)
    for text, mutant in _label_mutants(expr):
        yield changed(text, expr=mutant)
    minutes = int(rule.get("for", "0m").removesuffix("m"))
    for other in (minutes + 1, minutes - 1, 0):
        if 0 <= other != minutes:
            yield changed(f"for {minutes}m becomes {other}m", **{"for": f"{other}m"})
    yield changed("another severity", labels={"severity": "none"})


def _label_mutants(expr: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r'{\w+=~?"([^"]+)"}', expr):
        for at, (start, end) in {"selector": found.span(), "value": found.span(1)}.items():
            other = "" if at == "selector" else "other"
            yield f"{at} {found.group()} at {found.start()}", f"{expr[:start]}{other}{expr[end:]}"
    for found in re.finditer(r"(?:by|on) \(([^)]+)\)", expr):
        names = found.group(1).split(", ")
        for name in names:
            left = ", ".join(each for each in names if each != name)
            mutant = f"{expr[: found.start(1)]}{left}{expr[found.end(1) :]}"
            yield f"{found.group()} at {found.start()} without {name}", mutant


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_fires_and_is_silent_when_it_should(alert: str, tmp_path: Path) -> None:
    need("promtool")
    done = evaluate(RULES[alert], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", RULES)
def test_the_units_find_each_mutant_of_a_rule(alert: str, tmp_path: Path) -> None:
    need("promtool")
    alive = []
    for text, mutant in mutants(RULES[alert]):
        done = evaluate(mutant, tmp_path)
        assert "FAILED" in done.stdout + done.stderr or done.returncode == 0, done.stdout + done.stderr
        if done.returncode == 0:
            alive.append(text)
    assert alive == []


def test_each_alert_has_units_without_data_and_firing() -> None:
    assert UNITS.keys() == RULES.keys()
    for alert, cases in UNITS.items():
        assert any(not each["series"] for each in cases), f"{alert}: without data"
        points = [expected for each in cases for expected in each["fires"].values()]
        assert any(points), f"{alert}: firing"
        assert not all(points), f"{alert}: silent"


def test_rules_use_metrics_and_labels_that_exist() -> None:
    known = {series: each for each in metrics.ALL for series in each.series}
    for alert, rule in RULES.items():
        names = set(re.findall(r"tidepool_\w+", rule["expr"]))
        assert names, alert
        assert names <= known.keys(), alert
        labels = {"le"} | {label for name in names for label in known[name].labels}
        used = {name.strip() for part in re.findall(r"(?:by|on) \(([^)]+)\)", rule["expr"]) for name in part.split(",")}
        used |= set(re.findall(r"(\w+)=", re.sub(r"[><=!]= ", "", rule["expr"])))
        assert used <= labels, alert
        for name, _ in re.findall(r"(tidepool_\w+)(\{|)", rule["expr"]):
            for label in re.findall(rf"{name}{{(\w+)=", rule["expr"]):
                assert label in known[name].labels, alert


def test_an_alerts_text_has_labels_that_it_carries() -> None:
    for alert, rule in RULES.items():
        carried = {key for each in UNITS[alert] for labels in each["fires"].values() for one in labels for key in one}
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= carried, alert
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in SEVERITIES


def test_each_alert_has_a_runbook_of_its_name() -> None:
    for alert, rule in RULES.items():
        path = ROOT / rule["annotations"]["runbook_url"]
        assert path == ROOT / "docs" / "runbooks" / f"{alert}.md"
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {alert}\n\nAlert of the chart: {rule['labels']['severity']}; ")
        headings = ["Meaning", "Impact", "Diagnosis", "Mitigation", "How to know it is fixed"]
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == headings
    pages = {each.stem for each in (ROOT / "docs" / "runbooks").glob("Tidepool*.md")}
    assert pages == RULES.keys(), "a runbook without an alert"


def test_the_documentation_lists_each_alert() -> None:
    text = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\(runbooks/(\w+)\.md\) \| (\w+) \| (\w+) \|", text, re.MULTILINE)
    assert rows == [(alert, alert, rule["labels"]["severity"], rule.get("for", "0m")) for alert, rule in RULES.items()]


def test_inhibitions_name_alerts_that_exist() -> None:
    found = yaml.safe_load((CHART / "files" / "inhibitions.yaml").read_text(encoding="utf-8"))["inhibit_rules"]
    pairs = set()
    for each in found:
        [source] = each["source_matchers"]
        targets = set(RULES)
        for matcher in each["target_matchers"]:
            operator, value = re.fullmatch(r'alertname (=~|!=|=) "?([^"]+)"?', matcher).groups()  # type: ignore[union-attr]
            matched = {alert for alert in RULES if re.fullmatch(value, alert)}
            assert matched, f"{matcher} matches no alert"
            assert operator != "=~" or "|" not in value or len(matched) == value.count("|") + 1, matcher
            targets = targets - matched if operator == "!=" else targets & matched
        source = source.removeprefix("alertname = ")
        assert source in RULES
        assert source not in targets
        for label in each.get("equal", []):
            both = {source, *targets}
            assert all(
                any(label in one for case in UNITS[alert] for at in case["fires"].values() for one in at)
                for alert in both
            ), label
        pairs |= {(source, target) for target in targets}
    assert ("TidepoolBlind", "TidepoolRunsFailing") in pairs
    assert ("TidepoolWorkerSilent", "TidepoolRunsLate") in pairs


def rendered(**values: str) -> list[Any]:
    """Return the chart's PrometheusRules where a Prometheus operator is."""
    need("helm")
    text = template(("production",), tuple(values.items()), PROMETHEUS)
    return [each for each in yaml.safe_load_all(text) if each and each["kind"] == "PrometheusRule"]


def test_the_chart_has_the_rules_of_the_file(tmp_path: Path) -> None:
    [found] = rendered(monitoring__alerts__runbooks=RUNBOOKS, monitoring__labels__release="prometheus")
    assert found["metadata"]["name"] == "tidepool-alerts"
    assert found["metadata"]["labels"]["release"] == "prometheus"
    [group] = found["spec"]["groups"]
    urls = {rule["alert"]: rule["annotations"].pop("runbook_url") for rule in group["rules"]}
    assert urls == {alert: f"{RUNBOOKS}/{alert}.md" for alert in RULES}
    expected = copy.deepcopy(list(RULES.values()))
    for rule in expected:
        del rule["annotations"]["runbook_url"]
    assert group["rules"] == expected
    if shutil.which("promtool"):
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(found["spec"]))
        command = ("promtool", "check", "rules", str(tmp_path / "rules.yaml"))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"{len(RULES)} rules found" in done.stdout, done.stdout + done.stderr


def test_alerts_can_be_left_out() -> None:
    [found] = rendered(monitoring__alerts__exclude="{TidepoolBlind,TidepoolOrphans}")
    names = [rule["alert"] for rule in found["spec"]["groups"][0]["rules"]]
    assert names == [alert for alert in RULES if alert not in {"TidepoolBlind", "TidepoolOrphans"}]
    assert rendered(monitoring__alerts__enabled="false") == []
    assert rendered(exporter__enabled="false") == []


def test_a_misspelt_alert_is_refused() -> None:
    with pytest.raises(
        AssertionError, match=r"monitoring\.alerts\.exclude: unknown alert TidepoolBlnd; one of .*TidepoolBlind"
    ):
        rendered(monitoring__alerts__exclude="{TidepoolBlnd}")
