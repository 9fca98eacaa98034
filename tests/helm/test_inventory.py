"""The exact set of objects of the chart: an additional object fails as well as a missing one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Render

MINIMAL = {
    ("ConfigMap", "tidepool-flow-run"),
    ("ConfigMap", "tidepool-flow-run-rules"),
    ("ConfigMap", "tidepool-work-pool"),
    ("Deployment", "tidepool-operator"),
    ("Deployment", "tidepool-server"),
    ("Deployment", "tidepool-worker"),
    ("Job", "tidepool-registration"),
    ("Job", "tidepool-work-pool"),
    ("NetworkPolicy", "tidepool-api-clients"),
    ("NetworkPolicy", "tidepool-dask-scheduler"),
    ("NetworkPolicy", "tidepool-dask-worker"),
    ("NetworkPolicy", "tidepool-default-deny"),
    ("NetworkPolicy", "tidepool-flow-run"),
    ("NetworkPolicy", "tidepool-operator"),
    ("NetworkPolicy", "tidepool-server"),
    ("NetworkPolicy", "tidepool-worker"),
    ("Pod", "tidepool-test"),
    ("Role", "tidepool-flow-run"),
    ("Role", "tidepool-operator"),
    ("Role", "tidepool-worker"),
    ("RoleBinding", "tidepool-flow-run"),
    ("RoleBinding", "tidepool-operator"),
    ("RoleBinding", "tidepool-worker"),
    ("Service", "tidepool-server"),
    ("ServiceAccount", "tidepool-flow-run"),
    ("ServiceAccount", "tidepool-operator"),
    ("ServiceAccount", "tidepool-worker"),
}
PRODUCTION = MINIMAL | {
    ("Deployment", "tidepool-services"),
    ("Ingress", "tidepool-server"),
    ("Job", "tidepool-migration"),
    ("PodDisruptionBudget", "tidepool-server"),
}


def inventory(manifests: list[dict]) -> set[tuple[str, str]]:
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(names) == len(set(names)), "an object is rendered twice"
    return set(names)


def test_minimal(render: Render) -> None:
    assert inventory(render("minimal")) == MINIMAL


def test_production(render: Render) -> None:
    assert inventory(render("production")) == PRODUCTION


def test_options_add_and_remove_their_own_objects_only(render: Render) -> None:
    assert inventory(render("minimal", registration__enabled="false")) == MINIMAL - {("Job", "tidepool-registration")}
    without = inventory(render("minimal", networkPolicy__enabled="false"))
    assert without == {each for each in MINIMAL if each[0] != "NetworkPolicy"}


def test_everything_is_in_the_release_namespace_and_labelled(render: Render) -> None:
    for manifest in render("production"):
        name = manifest["metadata"]["name"]
        assert manifest["metadata"]["namespace"] == "flows", name
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "tidepool", name


def test_hooks_run_in_order(render: Render) -> None:
    hooks = {
        each["metadata"]["name"]: (notes["helm.sh/hook"], notes.get("helm.sh/hook-weight", "0"))
        for each in render("production")
        if "helm.sh/hook" in (notes := each["metadata"].get("annotations", {}))
    }
    assert hooks == {
        "tidepool-migration": ("pre-install,pre-upgrade", "0"),  # before the new server starts
        "tidepool-work-pool": ("post-install,post-upgrade", "0"),  # deployments are checked against the pool,
        "tidepool-registration": ("post-install,post-upgrade", "10"),  # so they come after it
        "tidepool-test": ("test", "0"),
    }
