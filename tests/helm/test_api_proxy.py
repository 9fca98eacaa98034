"""The proxy between flow runs and the Prefect API, and the switch back; the integration tests run it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.helm.layouts import LAYOUTS

if TYPE_CHECKING:
    from conftest import Manifest, Render


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    [found] = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, f"tidepool-{name}")]
    return found


def api_url(manifests: list[Manifest]) -> str:
    template = json.loads(find(manifests, "ConfigMap", "work-pool")["data"]["base-job-template.json"])
    return str(template["job_configuration"]["env"]["PREFECT_API_URL"])


def containers(manifests: list[Manifest]) -> dict[str, Manifest]:
    server = find(manifests, "Deployment", "server")["spec"]["template"]["spec"]
    return {each["name"]: each for each in server["containers"]}


def services(manifests: list[Manifest]) -> list[str]:
    found = find(manifests, "Deployment", "services")["spec"]["template"]["spec"]["containers"]
    return [str(each) for each in found[0]["args"]]


def test_flow_runs_are_told_the_address_of_the_proxy(render: Render) -> None:
    manifests = render("production")
    assert api_url(manifests) == "http://tidepool-flow-run-api.flows.svc:4201/api"
    [port] = find(manifests, "Service", "flow-run-api")["spec"]["ports"]
    assert port["port"] == 4201
    proxy = containers(manifests)["flow-run-api"]
    assert {"name": port["targetPort"], "containerPort": 4201} in proxy["ports"]
    env = {each["name"]: each["valueFrom"]["secretKeyRef"]["name"] for each in proxy["env"]}
    assert env == {"FLOW_RUN_API_SERVER": "tidepool-auth", "FLOW_RUN_API_TOKEN_0": "tidepool-flow-run-api"}
    assert containers(manifests)["server"]["args"][:3] == ["python", "-m", "tidepool.operate.server"]
    assert services(manifests) == ["python", "-m", "tidepool.operate.server", "services"]


def test_open_is_the_switch_back(render: Render) -> None:
    manifests = render("production", flowRuns__api="open")
    assert api_url(manifests) == "http://tidepool-server.flows.svc:4200/api"
    assert [*containers(manifests)] == ["server"]
    assert containers(manifests)["server"]["args"][:3] == ["prefect", "server", "start"]
    assert services(manifests) == ["prefect", "server", "services", "start"]
    assert "flow-run-api" not in {each["metadata"]["name"] for each in manifests}
    worker = find(manifests, "Deployment", "worker")["spec"]["template"]["spec"]["containers"][0]
    env = {each["name"]: each.get("value") for each in worker["env"]}
    assert env["PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME"] == "tidepool-auth"
    ports = {rule["ports"][0]["port"] for rule in find(manifests, "NetworkPolicy", "server")["spec"]["ingress"]}
    assert ports == {4200}


def test_without_a_password_calls_are_restricted_all_the_same(render: Render) -> None:
    manifests = render()
    config = find(manifests, "ConfigMap", "flow-run-api")["data"]["haproxy.cfg"]
    assert "unless { var(txn.rule) -m found }" in config
    assert "401" not in config
    assert not containers(manifests)["flow-run-api"].get("env")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_team_has_a_token_of_its_own(render: Render, layout: str) -> None:
    values = {**LAYOUTS[layout].values, "auth__secretName": "auth", "flowRuns__apiSecret": "default"}
    suffixes = [*LAYOUTS[layout].teams]
    if "-media" in suffixes:
        values["teams__media__flowRuns__apiSecret"] = "media"
    manifests = render(**values)
    tokens = {
        each["name"]: each["valueFrom"]["secretKeyRef"]["name"]
        for each in containers(manifests)["flow-run-api"]["env"]
        if "TOKEN" in each["name"]
    }
    names = ["default", "media"][: len(suffixes)]
    assert tokens == {f"FLOW_RUN_API_TOKEN_{number}": name for number, name in enumerate(names)}
    for suffix, name in zip(suffixes, names, strict=True):
        worker = find(manifests, "Deployment", f"worker{suffix}")["spec"]["template"]["spec"]["containers"][0]
        env = {each["name"]: each.get("value") for each in worker["env"]}
        assert env["PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME"] == name


def test_a_team_does_not_inherit_what_another_may_read(render: Render) -> None:
    values = LAYOUTS["two teams"].values | {"flowRuns__readable__variables[0]": "budget"}
    calls = find(render("production", **values), "ConfigMap", "flow-run-api")["data"]["calls.map"]
    assert [line for line in calls.splitlines() if "budget" in line] == ["^0:GET:/api/variables/name/budget$ any"]
    values |= {"teams__media__flowRuns__readable__blocks[0]": "secret/key"}
    calls = find(render("production", **values), "ConfigMap", "flow-run-api")["data"]["calls.map"]
    [line] = [line for line in calls.splitlines() if "key" in line]
    assert line == "^1:GET:/api/block_types/slug/secret/block_documents/name/key$ any"
