"""What Prometheus scrapes: the exporter and the operator, and who may."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.helm.conftest import ChartError, need, template
from tests.helm.layouts import RELEASE

if TYPE_CHECKING:
    from conftest import Manifest, Render

SCRAPED = ("exporter", "operator")


def find(manifests: list[Manifest], kind: str, name: str) -> Any:
    [found] = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, f"tidepool-{name}")]
    return found


def container(manifests: list[Manifest], name: str) -> Any:
    return find(manifests, "Deployment", name)["spec"]["template"]["spec"]["containers"][0]


def test_monitoring_and_no_other_peer_may_scrape(render: Render) -> None:
    prometheus = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    for name in SCRAPED:
        found = find(render("production"), "NetworkPolicy", name)["spec"]
        assert found["ingress"] == [{"from": prometheus, "ports": [{"port": 8000}]}]
        assert found["policyTypes"] == ["Ingress", "Egress"]
        assert "ingress" not in find(render("minimal"), "NetworkPolicy", name)["spec"], "with no peer: refused"


def test_the_services_lead_to_the_ports_of_the_metrics(render: Render) -> None:
    manifests = render("minimal")
    for name in SCRAPED:
        [port] = find(manifests, "Service", name)["spec"]["ports"]
        ports = {each["name"]: each["containerPort"] for each in container(manifests, name)["ports"]}
        assert (port["port"], port["targetPort"], ports["metrics"]) == (8000, "metrics", 8000)
        selector = find(manifests, "Service", name)["spec"]["selector"]
        labels = find(manifests, "Deployment", name)["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
    env = {each["name"]: each.get("value") for each in container(manifests, "operator")["env"]}
    assert env["TIDEPOOL_OPERATOR_METRICS_PORT"] == "8000"
    assert "--port=8000" in container(manifests, "exporter")["args"]


def test_values_become_settings(render: Render) -> None:
    values = {
        "exporter__budgets__media": "12",
        "exporter__intervalSeconds": "30",
        "operator__prices__coreHour": "2",
    }
    manifests = render("minimal", **values)
    env = {each["name"]: each.get("value") for each in container(manifests, "exporter")["env"]}
    assert env["TIDEPOOL_EXPORTER_BUDGETS"] == '{"media":12}'
    assert env["TIDEPOOL_EXPORTER_INTERVAL_SECONDS"] == "30"
    env = {each["name"]: each.get("value") for each in container(manifests, "operator")["env"]}
    assert (env["TIDEPOOL_OPERATOR_CORE_HOUR_PRICE"], env["TIDEPOOL_OPERATOR_GIB_HOUR_PRICE"]) == ("2", "0")


def test_a_prometheus_operator_gets_its_objects() -> None:
    """Only where its custom resources are: an installation without them would be refused."""
    need("helm")
    without = template(("production",), ())
    assert "monitoring.coreos.com" not in without
    text = template(
        ("production",), (("monitoring__labels__release", "stack"),), "--api-versions=monitoring.coreos.com/v1"
    )
    manifests = [each for each in yaml.safe_load_all(text) if each]
    assert {each["kind"] for each in manifests} - {each["kind"] for each in yaml.safe_load_all(without) if each} == {
        "ServiceMonitor",
        "PrometheusRule",
    }
    for name in SCRAPED:
        found = find(manifests, "ServiceMonitor", name)
        assert found["metadata"]["namespace"] == RELEASE
        assert found["metadata"]["labels"]["release"] == "stack"
        labels = find(manifests, "Service", name)["metadata"]["labels"]
        assert found["spec"]["selector"]["matchLabels"].items() <= labels.items()
        [port] = find(manifests, "Service", name)["spec"]["ports"]
        assert found["spec"]["endpoints"] == [{"port": port["name"], "interval": "30s"}]


def test_targets_of_messages_are_a_secret_and_the_exporters_egress(render: Render) -> None:
    plain = render("production")
    assert "TIDEPOOL_NOTIFY_URLS" not in str(plain)
    manifests = render(
        "production",
        notifications__secretName="targets",
        notifications__repositoryUrl="https://host/main",
        **{"networkPolicy__exporterEgress[0]__ports[0]__port": "443"},
    )
    env = {each["name"]: each for each in container(manifests, "exporter")["env"]}
    assert env["TIDEPOOL_NOTIFY_URLS"]["valueFrom"] == {"secretKeyRef": {"name": "targets", "key": "urls"}}
    assert env["TIDEPOOL_REPOSITORY_URL"]["value"] == "https://host/main"
    before, after = (find(each, "NetworkPolicy", "exporter")["spec"]["egress"] for each in (plain, manifests))
    assert after == [*before, {"ports": [{"port": 443}]}]
    with pytest.raises(ChartError, match=r"notifications\.secretName needs networkPolicy\.exporterEgress"):
        render("production", notifications__secretName="targets")
