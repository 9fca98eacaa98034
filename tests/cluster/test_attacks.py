"""What the code of a flow run, of a Dask worker and of a foreign pod may try to get: every attempt is refused.

`attack.py` has the attempts and runs in a driver's pod, with all that a flow's code has there. The
answers are a table in build/attacks.md.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from drive import drive
from installed import TOP
from test_dask_clusters import LONG, nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator

    from installed import Platform

HERE = Path(__file__).parent
# What a driver must not connect to; policies drop packets, so each takes three seconds.
FORBIDDEN_SERVICES = {
    "the database": ("postgres", 5432),
    "Redis": ("redis", 6379),
    "another team's store": ("store-media", 7070),
}
METADATA = ("169.254.169.254", 80)


@pytest.fixture(scope="module")
def victim(platform: Platform) -> Iterator[str]:
    """The DaskCluster of another run of the same team, which computes."""
    driver = drive(platform, LONG)
    try:
        platform.until(lambda: "is ready" in driver.log(), "the other run's cluster is ready", 240)
        [owned] = [
            each["metadata"]["name"]
            for each in platform.runs.get("daskclusters")
            if each["metadata"]["ownerReferences"][0]["name"] == driver.name
        ]
        yield owned
    finally:
        platform.runs.kubectl("delete", "job", driver.name, "--cascade=foreground", "--timeout=90s")
        nothing_left(platform)


@pytest.fixture(scope="module")
def targets(platform: Platform) -> dict[str, tuple[str, int]]:
    """Addresses instead of names: a pod that may not ask the DNS would be refused for that."""
    namespace = platform.namespace

    def address(service: str) -> str:
        return namespace.kubectl("get", "service", service, "--output=jsonpath={.spec.clusterIP}")

    found = {name: (address(service), port) for name, (service, port) in FORBIDDEN_SERVICES.items()}
    node = json.loads(namespace.kubectl("get", "nodes", "--output=json"))["items"][0]["status"]["addresses"][0]
    return {
        **found,
        "the Prefect server past the list of calls": (address("tidepool-server"), 4200),
        "the metadata address": METADATA,
        "the kubelet": (node["address"], 10250),
    }


@pytest.fixture(scope="module")
def answers(platform: Platform, victim: str, targets: dict[str, Any]) -> dict[str, str]:
    """The answer to each attempt from a driver, beside another run whose cluster computes."""
    deployment = platform.read("deployments/name/csv-etl/csv-etl")
    block = _block_of_another_owner(platform)
    other_run = platform.post("flow_runs/", {"flow_id": deployment["flow_id"], "name": "of another run"})
    done = drive(
        platform,
        (HERE / "attack.py").read_text(),
        ATTACK_PLATFORM=platform.namespace.name,
        ATTACK_OTHERS=platform.namespace.others[1].name,
        ATTACK_VICTIM=victim,
        ATTACK_TARGETS=json.dumps(targets),
        ATTACK_DEPLOYMENT=deployment["id"],
        ATTACK_FLOW=deployment["flow_id"],
        ATTACK_POOL=platform.pool,
        ATTACK_BLOCK=block,
        ATTACK_RUN=other_run["id"],
    )
    found: dict[str, str] = json.loads(base64.b64decode(done.result(600)["answers"]))
    table = "\n".join(f"| {attempt} | {answer} |" for attempt, answer in found.items())
    (TOP / "build").mkdir(exist_ok=True)
    (TOP / "build" / "attacks.md").write_text(f"| attempt from a driver | answer |\n|---|---|\n{table}\n")
    return found


def _block_of_another_owner(platform: Platform) -> str:
    kind = platform.read("block_types/slug/secret")
    schema = platform.post("block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}})[0]
    name = "of-another-owner"
    body = {"name": name, "block_type_id": kind["id"], "block_schema_id": schema["id"], "data": {"value": "loot"}}
    platform.post("block_documents/", body)
    return name


def test_a_driver_gets_nothing_that_is_not_its_own(answers: dict[str, str]) -> None:
    assert len(answers) >= 25
    reached = {attempt: answer for attempt, answer in answers.items() if not answer.startswith("refused")}
    assert not reached


def test_what_refuses_is_a_rule_and_no_accident(answers: dict[str, str]) -> None:
    """A 404, a 422 for a missing field or an unreachable address would pass the test above too."""
    rules = ("403", "not allowed", "denied", "forbidden", "unauthorized", "401", "timed out", "Timeout", "refused:")
    accidents = {
        attempt: answer
        for attempt, answer in answers.items()
        if any(code in answer[:14] for code in (" 404", " 405", " 409", " 500", " 502"))
        or not any(rule in answer for rule in rules)
    }
    assert not accidents


def test_the_other_run_is_unharmed(platform: Platform, victim: str, answers: dict[str, str]) -> None:
    del answers
    [cluster] = [each for each in platform.runs.get("daskclusters") if each["metadata"]["name"] == victim]
    assert "deletionTimestamp" not in cluster["metadata"]
    groups = platform.runs.get("daskworkergroups")
    assert len([each for each in groups if each["spec"]["cluster"] == victim]) == 1


def test_a_dask_worker_has_no_token_and_reaches_no_api_but_the_runs_own(
    platform: Platform, targets: dict[str, tuple[str, int]]
) -> None:
    api = platform.namespace.kubectl("--namespace=default", "get", "service", "kubernetes", "--output=json")
    everything = {**targets, "the Kubernetes API": (json.loads(api)["spec"]["clusterIP"], 443)}
    script = f"""
import json, logging, os, socket
import distributed
from tidepool.compute.clusters.kubernetes.cluster import KubernetesCluster
from tidepool.settings import settings
TARGETS = {everything!r}
def look():
    import os, socket
    reached = []
    for name, address in TARGETS.items():
        try:
            socket.create_connection(tuple(address), timeout=3).close()
            reached.append(name)
        except OSError:
            pass
    return {{"token": os.path.exists("/var/run/secrets/kubernetes.io"), "reached": reached}}
size = settings().size("small")
with KubernetesCluster(size) as cluster, distributed.Client(cluster, set_as_default=False) as client:
    found = client.submit(look).result()
print(json.dumps(found))
"""
    assert drive(platform, script).result() == {"token": False, "reached": []}


def test_outside_a_flow_runs_token_opens_no_more_than_inside(platform: Platform) -> None:
    """Who steals the token of the runs and reaches the server itself: it is not the server's password."""
    user, _, word = _token(platform).partition(":")
    answer = httpx.get(f"{platform.api}/flow_runs/count", auth=(user, word), timeout=30)
    assert answer.status_code in {401, 403, 405}
    answer = httpx.post(f"{platform.api}/work_pools/filter", json={}, auth=(user, word), timeout=30)
    assert answer.status_code == 401


def _token(platform: Platform) -> str:
    secret = json.loads(platform.runs.kubectl("get", "secret", "tidepool-flow-run-api", "--output=json"))
    return base64.b64decode(secret["data"]["auth-string"]).decode()
