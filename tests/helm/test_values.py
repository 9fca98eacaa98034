"""Invalid values get one clear message; generated files are up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from helm import generate

if TYPE_CHECKING:
    from conftest import Render

ROOT = Path(__file__).resolve().parents[2]
MEDIA = {"teams__media__namespace": "media", "teams__media__workPool__name": "media"}


def test_generated_files_are_up_to_date() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in generate.outputs().items() if path.read_text() != text]
    assert not stale, "run `make chart-docs`"


def test_every_value_is_documented() -> None:
    text = (ROOT / "helm" / "tidepool" / "values.yaml").read_text()
    documented = generate.documented(text)

    def walk(values: dict, path: tuple[str, ...]) -> None:
        for key, value in values.items():
            assert (*path, key) in documented, ".".join((*path, key))
            if isinstance(value, dict) and any(found[:-1] == (*path, key) for found in documented):
                walk(value, (*path, key))

    walk(yaml.safe_load(text), ())


def test_the_custom_resources_are_those_of_the_locked_operator() -> None:
    import dask_kubernetes

    shipped = (
        Path(dask_kubernetes.__file__).parent / "operator" / "deployment" / "helm" / "dask-kubernetes-operator" / "crds"
    )
    folder = ROOT / "k8s" / "crds"
    assert {path.name for path in shipped.iterdir()} == {path.name for path in folder.glob("dask*.yaml")}
    for path in shipped.iterdir():
        assert (folder / path.name).read_text() == path.read_text(), path.name
    ours = yaml.safe_load((ROOT / "helm" / "tidepool" / "Chart.yaml").read_text())
    assert ours["annotations"]["tidepool/dask-kubernetes"] == dask_kubernetes.__version__


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"server__replics": "2"}, "additional properties 'replics' not allowed"),
        ({"image__digest": "sha256:12"}, "does not match pattern"),
        ({"image__pullPolicy": "Sometimes"}, "must be one of 'IfNotPresent', 'Always', 'Never'"),
        ({"server__publicUrl": "https://host/"}, "does not match pattern"),
        ({"workPool__concurrencyLimit": "many"}, "got string, want integer"),
        ({"server__replicas": "2"}, "server.replicas is 2: more than one needs database.secretName"),
        ({"services__replicas": "1"}, "services.replicas is 1: separate pods need database.secretName"),
        ({"image__digest": ""}, "registration.enabled needs image.digest (`make image` prints it)"),
        ({"ingress__enabled": "true"}, "server.publicUrl is http://localhost:4200: with ingress.enabled it must be an https://"),
        ({"flowRuns__namespace": "Runs"}, "does not match pattern"),
        ({"auth__secretName": "x"}, "flowRuns.apiSecret is empty: with auth.secretName or teams, and"),
        ({"auth__secretName": "x", "flowRuns__apiSecret": "x"}, "flowRuns.apiSecret is x, which is in use: the"),
        ({"flowRuns__api": "closed"}, "must be one of 'restricted', 'open'"),
        ({"flowRuns__readable__blocks[0]": "secret"}, "does not match pattern"),
        ({**MEDIA, "flowRuns__namespace": "runs", "flowRuns__apiSecret": "x"}, "teams.media.flowRuns.apiSecret is x,"),
        ({**MEDIA, "flowRuns__namespace": "runs", "teams__media__flowRuns__api": "open"}, "'api' not allowed"),
        ({"teams__media__workPool__name": "media"}, "missing property 'namespace'"),
        ({"teams__media__namespace": "x", "teams__media__workPool__defaults__x": "1"}, "missing property 'name'"),
        ({**MEDIA, "flowRuns__namespace": "runs", "teams__media__flowRuns__namespace": "x"}, "'namespace' not allowed"),
        ({**MEDIA, "flowRuns__namespace": "runs", "teams__me-dia__namespace": "x"}, "'me-dia' does not match"),
        (MEDIA, "teams needs flowRuns.namespace, and namespaces other than flows: runs there could name"),
        ({**MEDIA, "flowRuns__namespace": "media"}, "namespace media is given twice in flowRuns and teams"),
        ({"flowRuns__formerNamespaces": "{flows}"}, "namespace flows is given twice in flowRuns and teams"),
        ({**MEDIA, "flowRuns__namespace": "runs", "workPool__name": "media"}, "work pool media is given twice"),
        ({**MEDIA, "flowRuns__namespace": "runs", "teams__media__workPool__defaults__memory": "2Gi"},
         "teams.media.workPool.defaults.memory is not a variable of the base job template"),
        ({**MEDIA, "flowRuns__namespace": "runs", "teams__media__flowRuns__env__AWS_KEY": "x"},
         "teams.media.flowRuns.env.AWS_KEY is not a setting"),
        ({"workPool__defaults__namespace": "x"}, "workPool.defaults.namespace is not a variable"),
        ({"workPool__defaults__memory": "2Gi"}, "workPool.defaults.memory is not a variable of the base job template"),
        ({"flowRuns__env__AWS_KEY": "x"}, "flowRuns.env.AWS_KEY is not a setting: use names that start with TIDEPOOL_"),
    ],
)  # fmt: skip
def test_an_invalid_value_is_named(render: Render, values: dict[str, str], sentence: str) -> None:
    with pytest.raises(AssertionError) as refused:
        render("minimal", **values)
    assert sentence in str(refused.value)


def test_settings_in_values_are_settings() -> None:
    from tidepool.settings import variables

    for name in ("values.yaml", "ci/production-values.yaml", "ci/minimal-values.yaml"):
        values = yaml.safe_load((ROOT / "helm" / "tidepool" / name).read_text())
        for variable in values.get("flowRuns", {}).get("env", {}):
            assert variable in variables() or variable.startswith("PREFECT_"), f"{name}: {variable}"


def test_schema_refuses_unknown_keys_everywhere() -> None:
    schema = json.loads((ROOT / "helm" / "tidepool" / "values.schema.json").read_text())

    def walk(node: dict, path: str) -> None:
        if "properties" in node:
            assert node.get("additionalProperties") is False, path
            for key, inner in node["properties"].items():
                walk(inner, f"{path}.{key}")

    walk(schema, "")


def test_the_operator_knows_the_age_of_shared_clusters(render: Render) -> None:
    for given, expected in (({}, "86400"), ({"operator__sharedClusterSeconds": "604800"}, "604800")):
        [operator] = [
            each
            for each in render(**given)
            if each["kind"] == "Deployment" and each["metadata"]["name"].endswith("operator")
        ]
        variables = {
            each["name"]: each.get("value") for each in operator["spec"]["template"]["spec"]["containers"][0]["env"]
        }
        assert variables["TIDEPOOL_OPERATOR_SHARED_CLUSTER_SECONDS"] == expected
