"""The exact set of objects of the chart: an additional object fails as well as a missing one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.helm.layouts import LAYOUTS, RELEASE

if TYPE_CHECKING:
    from conftest import Render

    from tests.helm.layouts import Layout

RUNS = {
    ("ConfigMap", "tidepool-flow-run"),
    ("ConfigMap", "tidepool-flow-run-rules"),
    ("NetworkPolicy", "tidepool-dask-scheduler"),
    ("NetworkPolicy", "tidepool-dask-worker"),
    ("NetworkPolicy", "tidepool-default-deny"),
    ("NetworkPolicy", "tidepool-flow-run"),
    ("Role", "tidepool-flow-run"),
    ("Role", "tidepool-operator"),
    ("Role", "tidepool-worker"),
    ("RoleBinding", "tidepool-flow-run"),
    ("RoleBinding", "tidepool-operator"),
    ("RoleBinding", "tidepool-worker"),
    ("ServiceAccount", "tidepool-flow-run"),
}
TEAM = {  # in the platform's namespace, with the team's suffix
    ("ConfigMap", "tidepool-work-pool"),
    ("Deployment", "tidepool-worker"),
    ("Job", "tidepool-work-pool"),
    ("ServiceAccount", "tidepool-worker"),
}
PLATFORM = {
    ("ConfigMap", "tidepool-dashboards"),
    ("ConfigMap", "tidepool-flow-run-api"),
    ("Deployment", "tidepool-exporter"),
    ("Deployment", "tidepool-operator"),
    ("Deployment", "tidepool-server"),
    ("Job", "tidepool-registration"),
    ("NetworkPolicy", "tidepool-api-clients"),
    ("NetworkPolicy", "tidepool-default-deny"),
    ("NetworkPolicy", "tidepool-exporter"),
    ("NetworkPolicy", "tidepool-operator"),
    ("NetworkPolicy", "tidepool-server"),
    ("NetworkPolicy", "tidepool-worker"),
    ("Pod", "tidepool-test"),
    ("Service", "tidepool-exporter"),
    ("Service", "tidepool-flow-run-api"),
    ("Service", "tidepool-operator"),
    ("Service", "tidepool-server"),
    ("ServiceAccount", "tidepool-exporter"),
    ("ServiceAccount", "tidepool-operator"),
}
PRODUCTION = {
    ("Deployment", "tidepool-services"),
    ("Ingress", "tidepool-server"),
    ("Job", "tidepool-migration"),
    ("PodDisruptionBudget", "tidepool-server"),
}


def inventory(manifests: list[dict]) -> set[tuple[str, str, str]]:
    """Return (namespace, kind, name) of each object."""
    names = [(each["metadata"]["namespace"], each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(names) == len(set(names)), "an object is rendered twice"
    return set(names)


def expected(layout: Layout) -> set[tuple[str, str, str]]:
    """Return the objects of the minimal installation."""
    platform = {(RELEASE, *each) for each in PLATFORM}
    for suffix, namespace in layout.teams.items():
        platform |= {(RELEASE, kind, f"{name}{suffix}") for kind, name in TEAM}
        platform |= {(namespace, *each) for each in RUNS}
    return platform


def test_minimal(render: Render, layout: Layout) -> None:
    assert inventory(render("minimal", **layout.values)) == expected(layout)


def test_production(render: Render, layout: Layout) -> None:
    found = inventory(render("production", **layout.values))
    assert found == expected(layout) | {(RELEASE, *each) for each in PRODUCTION}


def test_options_add_and_remove_their_own_objects_only(render: Render, layout: Layout) -> None:
    whole = expected(layout)
    without = inventory(render("minimal", registration__enabled="false", **layout.values))
    assert without == whole - {(RELEASE, "Job", "tidepool-registration")}
    without = inventory(render("minimal", exporter__enabled="false", **layout.values))
    assert without == {each for each in whole if each[2] not in {"tidepool-exporter", "tidepool-dashboards"}}
    without = inventory(render("minimal", networkPolicy__enabled="false", **layout.values))
    assert without == {each for each in whole if each[1] != "NetworkPolicy"}


def test_a_former_namespace_keeps_the_objects_of_its_runs(render: Render) -> None:
    """Runs in flight end well while new ones start elsewhere: nothing that they need is deleted or renamed."""
    before = inventory(render("minimal"))
    apart = LAYOUTS["two namespaces"]
    now = inventory(render("minimal", **apart.values, flowRuns__formerNamespaces=f"{{{RELEASE}}}"))
    assert now == before | expected(apart)
    after = inventory(render("minimal", **apart.values, flowRuns__formerNamespaces="null"))
    assert after == expected(apart)


def test_everything_is_labelled(render: Render, layout: Layout) -> None:
    for manifest in render("production", **layout.values):
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "tidepool", manifest["metadata"]["name"]


def test_hooks_run_in_order(render: Render) -> None:
    hooks = {
        each["metadata"]["name"]: (notes["helm.sh/hook"], notes.get("helm.sh/hook-weight", "0"))
        for each in render("production", **LAYOUTS["two teams"].values)
        if "helm.sh/hook" in (notes := each["metadata"].get("annotations", {}))
    }
    assert hooks == {
        "tidepool-migration": ("pre-install,pre-upgrade", "0"),  # before the new server starts
        "tidepool-work-pool": ("post-install,post-upgrade", "0"),  # deployments are checked against the pool,
        "tidepool-work-pool-media": ("post-install,post-upgrade", "0"),
        "tidepool-registration": ("post-install,post-upgrade", "10"),  # so they come after it
        "tidepool-test": ("test", "0"),
    }
