"""Rights in the Kubernetes API, users of the pods, and network paths."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.helm.layouts import LAYOUTS, RELEASE

if TYPE_CHECKING:
    from conftest import Manifest, Render

    from tests.helm.layouts import Layout

# Every right in the Kubernetes API that anything of ours has: (account, API group, resource) -> verbs.
RIGHTS = {
    ("worker", "batch", "jobs"): "create delete",
    ("flow-run", "kubernetes.dask.org", "daskclusters"): "create delete get list",
    ("flow-run", "kubernetes.dask.org", "daskworkergroups"): "create",
    ("flow-run", "kubernetes.dask.org", "daskautoscalers"): "create",
    ("flow-run", "", "secrets"): "create",
    ("flow-run", "", "pods"): "get list",
    ("flow-run", "", "pods/log"): "get",
    ("flow-run", "", "events"): "list",
    ("operator", "kubernetes.dask.org", "daskclusters"): "delete get list patch watch",
    ("operator", "kubernetes.dask.org", "daskworkergroups"): "create delete get list patch watch",
    ("operator", "kubernetes.dask.org", "daskautoscalers"): "delete get list patch watch",
    ("operator", "kubernetes.dask.org", "daskjobs"): "get list patch watch",
    ("operator", "apps", "deployments"): "create delete get list",
    ("operator", "", "services"): "create delete get list patch watch",
    ("operator", "", "pods"): "get list watch",
    ("operator", "batch", "jobs"): "delete list",
    ("operator", "", "events"): "create list",
    ("operator", "", "configmaps/tidepool-flow-run-rules"): "get",
}

OPERATOR = ("Deployment", "tidepool-operator")

# Which pods hold a token of which account. A pod that is not listed has none.
TOKENS = {
    "Deployment/tidepool-worker": "tidepool-worker",
    "Deployment/tidepool-operator": "tidepool-operator",
}
# An account of its own, without a token and without a right.
WITHOUT_TOKEN = {"Deployment/tidepool-exporter": "tidepool-exporter"}


def rights(manifests: list[Manifest], namespace: str) -> dict[tuple[str, str, str], str]:
    found = {}
    for role in (each for each in manifests if each["kind"] == "Role"):
        if role["metadata"]["namespace"] != namespace:
            continue
        account = role["metadata"]["name"].removeprefix("tidepool-")
        for rule in role["rules"]:
            assert set(rule) - {"resourceNames"} == {"apiGroups", "resources", "verbs"}
            one = "".join(f"/{name}" for name in rule.get("resourceNames", []))
            for group in rule["apiGroups"]:
                for resource in (f"{each}{one}" for each in rule["resources"]):
                    assert (account, group, resource) not in found, "written twice"
                    found[account, group, resource] = " ".join(sorted(rule["verbs"]))
    return found


def test_rights_are_exactly_these(render: Render, layout: Layout) -> None:
    manifests = render("production", **layout.values)
    for namespace in layout.teams.values():
        assert rights(manifests, namespace) == RIGHTS
    assert "*" not in str(RIGHTS)
    if RELEASE not in layout.teams.values():
        assert not rights(manifests, RELEASE), "nothing acts in the platform's namespace, where its Secrets are"


def test_each_role_is_bound_to_its_own_account_only(render: Render, layout: Layout) -> None:
    manifests = render("production", **layout.values)
    assert not [each for each in manifests if each["kind"].startswith("Cluster")], "a Role is enough"
    accounts = {
        (each["metadata"]["namespace"], each["metadata"]["name"])
        for each in manifests
        if each["kind"] == "ServiceAccount"
    }
    bound = set()
    teams = {namespace: suffix for suffix, namespace in layout.teams.items()}
    for binding in (each for each in manifests if each["kind"] == "RoleBinding"):
        name, namespace = binding["metadata"]["name"], binding["metadata"]["namespace"]
        assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
        [subject] = binding["subjects"]
        expected = {
            "tidepool-flow-run": (namespace, "tidepool-flow-run"),
            "tidepool-operator": (RELEASE, "tidepool-operator"),
            "tidepool-worker": (RELEASE, f"tidepool-worker{teams[namespace]}"),
        }
        assert (subject["namespace"], subject["name"]) == expected[name]
        bound.add(expected[name])
    assert bound == accounts - {(RELEASE, each) for each in WITHOUT_TOKEN.values()}


def test_a_cluster_role_reads_nodes_on_request(render: Render) -> None:
    manifests = render("minimal", operator__readNodes="true")
    role, binding = (each for each in manifests if each["kind"].startswith("Cluster"))
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"] == binding["metadata"]["name"]
    assert RELEASE in role["metadata"]["name"], "two releases have two"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "tidepool-operator", "namespace": RELEASE}]
    [operator] = (each for each in manifests if (each["kind"], each["metadata"]["name"]) == OPERATOR)
    [container] = operator["spec"]["template"]["spec"]["containers"]
    assert {"name": "TIDEPOOL_OPERATOR_READ_NODES", "value": "true"} in container["env"]


def test_only_pods_that_use_a_token_have_one(pods: list[tuple[str, Manifest]]) -> None:
    for name, spec in pods:
        assert spec["automountServiceAccountToken"] is (name in TOKENS), name
        assert spec.get("serviceAccountName") == (TOKENS | WITHOUT_TOKEN).get(name), name


def test_every_pod_is_restricted(pods: list[tuple[str, Manifest]]) -> None:
    assert len(pods) == 9
    for name, spec in pods:
        assert_restricted(name, spec)


def assert_restricted(name: str, spec: Manifest) -> None:
    """The `restricted` Pod Security Standard, and more: a numeric user, a read-only root, bounded memory."""
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True, name
    assert context["runAsUser"] == context["runAsGroup"] == 10001, name
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
    # Kubernetes turns a Service `tidepool-server` into TIDEPOOL_SERVER_*, which tidepool refuses as unknown settings.
    assert spec["enableServiceLinks"] is False, name
    assert {next(iter(volume.keys() - {"name"})) for volume in spec["volumes"]} <= {"emptyDir", "configMap"}, name
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], name
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
        assert "memory" in container["resources"]["limits"], name


def test_no_secret_is_in_a_manifest(render: Render, pods: list[tuple[str, Manifest]]) -> None:
    assert not [each for each in render("production") if each["kind"] == "Secret"]
    for name, spec in pods:
        for container in spec["containers"]:
            for variable in container.get("env", []):
                if re.search(
                    r"AUTH_STRING$|CONNECTION_URL|PASSWORD|TOKEN|SECRET_ACCESS|^FLOW_RUN_API_", variable["name"]
                ):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), f"{name}: {variable['name']}"


def test_the_worker_passes_the_token_of_flow_runs_on_by_reference(render: Render) -> None:
    worker = next(
        each
        for each in render("production")
        if each["metadata"]["name"] == "tidepool-worker" and each["kind"] == "Deployment"
    )
    env = {each["name"]: each.get("value") for each in worker["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME"] == "tidepool-flow-run-api"
    assert env["PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY"] == "auth-string"


def test_every_image_is_the_platforms_and_pinned_by_digest(pods: list[tuple[str, Manifest]]) -> None:
    images = {container["image"] for _, spec in pods for container in spec["containers"]}
    assert len(images) == 1
    assert re.fullmatch(r"[^@]+@sha256:[0-9a-f]{64}", images.pop())


# What may open a connection to what: (from, to, ports). docs/security.md explains each. Between runs: of one team.
PLATFORM = ["worker", "work-pool", "operator", "exporter", "registration", "test"]
SOME = {"flow-run": {"app.kubernetes.io/component": "flow-run"}, "dask-worker": {"dask.org/component": "worker"},
        "dask-scheduler": {"dask.org/component": "scheduler"}}  # fmt: skip
PATHS = {
    ("dask-worker", "dask-scheduler"): {8786},
    ("dask-worker", "dask-worker"): {8788},
    ("dask-worker", "server"): {4201},
    ("dask-scheduler", "dask-worker"): {8788},
    ("flow-run", "dask-scheduler"): {8786},
    ("flow-run", "server"): {4201},
    ("operator", "dask-scheduler"): {8787},
    **{(each, "server"): {4200} for each in PLATFORM},
}
ADDRESSES = {  # egress that is not to a pod of ours
    "worker": {"dns", "apiServer"},
    "operator": {"dns", "apiServer"},
    "flow-run": {"dns", "apiServer", "storage"},
    "dask-worker": {"dns", "storage"},
    "dask-scheduler": {"dns"},
    "server": {"dns", "database"},
    "services": {"dns", "database"},
    "migration": {"dns", "database"},
    **{each: {"dns"} for each in ("work-pool", "exporter", "registration", "test")},
}


# A pod: its namespace, the suffix of its team in the platform's namespace, its component.
Place = tuple[str, str, str]


def places(layout: Layout) -> list[Place]:
    platform = [(RELEASE, "", each) for each in ADDRESSES if each not in SOME]
    others = [(RELEASE, suffix, each) for suffix in layout.teams if suffix for each in ("worker", "work-pool")]
    return [*platform, *others, *((namespace, "", each) for namespace in layout.teams.values() for each in SOME)]


def labels_of(place: Place) -> dict[str, str]:
    _, suffix, component = place
    return SOME.get(component) or {
        "app.kubernetes.io/name": "tidepool",
        "app.kubernetes.io/instance": "tidepool",
        "app.kubernetes.io/component": f"{component}{suffix}",
    }


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return exact and all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", []))


def is_peer(peer: Manifest, policy: Manifest, place: Place) -> bool:
    if "podSelector" not in peer:
        return False
    own = {"matchLabels": {"kubernetes.io/metadata.name": policy["metadata"]["namespace"]}}
    there = peer.get("namespaceSelector", own)
    return selects(there, {"kubernetes.io/metadata.name": place[0]}) and selects(peer["podSelector"], labels_of(place))


def of(policies: list[Manifest], place: Place) -> list[Manifest]:
    """Return the policies that select a pod."""
    return [
        each
        for each in policies
        if each["metadata"]["namespace"] == place[0] and selects(each["spec"]["podSelector"], labels_of(place))
    ]


@pytest.fixture
def policies(render: Render, layout: Layout) -> list[Manifest]:
    found = render("production", **layout.values)
    return [each for each in found if each["kind"] == "NetworkPolicy"]


def allowed(policies: list[Manifest], source: Place, target: Place) -> set[int]:
    """Return the ports that both the egress of `source` and the ingress of `target` allow."""

    def side(direction: str, peers: str, own: Place, other: Place) -> set[int]:
        return {
            port["port"]
            for policy in of(policies, own)
            for rule in policy["spec"].get(direction, [])
            for peer in rule.get(peers, [])
            if is_peer(peer, policy, other)
            for port in rule["ports"]
        }

    return side("egress", "to", source, target) & side("ingress", "from", target, source)


def test_paths_between_our_pods_are_exactly_these(policies: list[Manifest], layout: Layout) -> None:
    everything = places(layout)
    found = {
        (source, target): ports
        for source in everything
        for target in everything
        if (ports := allowed(policies, source, target))
    }
    expected = {
        (source, target): PATHS[source[2], target[2]]
        for source in everything
        for target in everything
        if (source[2], target[2]) in PATHS
        # Runs of two teams: no path.
        and (source[0] == target[0] or RELEASE in {source[0], target[0]})
    }
    assert found == expected


def test_everything_else_is_denied(policies: list[Manifest], layout: Layout) -> None:
    everything = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    denied = {each["metadata"]["namespace"] for each in policies if each["spec"] == everything}
    assert denied == {RELEASE, *layout.teams.values()}


def test_addresses_outside_are_exactly_these(policies: list[Manifest], layout: Layout) -> None:
    def kind(rule: Manifest) -> str | None:
        ports = {each["port"] for each in rule.get("ports", [])}
        peers: list[Any] = rule.get("to", [])
        if ports == {53}:
            return "dns"
        if ports <= {5432, 6379}:
            return "database"
        if any("except" in peer.get("ipBlock", {}) for peer in peers):
            return "storage"
        return "apiServer" if any("ipBlock" in peer for peer in peers) else None

    for place in places(layout):
        rules = [rule for policy in of(policies, place) for rule in policy["spec"].get("egress", [])]
        assert {found for rule in rules if (found := kind(rule))} == ADDRESSES[place[2]], place
        assert all(rule.get("ports") for rule in rules), "a rule without ports allows all of them"


def test_a_team_may_have_a_store_of_its_own(render: Render) -> None:
    own = {"teams__media__networkPolicy__storage[0]__ports[0]__port": "7070"}
    manifests = render("production", **LAYOUTS["two teams"].values, **own)
    for namespace, port in (("runs", 443), ("media-runs", 7070)):
        for name in ("tidepool-flow-run", "tidepool-dask-worker"):
            [policy] = [
                each
                for each in manifests
                if (each["kind"], each["metadata"]["name"], each["metadata"]["namespace"])
                == ("NetworkPolicy", name, namespace)
            ]
            ports = [each["port"] for rule in policy["spec"]["egress"] for each in rule["ports"]]
            assert (port in ports, 7070 in ports) == (True, port == 7070)
