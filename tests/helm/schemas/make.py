"""Copy the schemas of the rendered kinds from a running API server, so that tests need no network.

Usage: `python tests/helm/schemas/make.py` with kubectl and a KUBECONFIG. Written in kubeconform's strict form (unknown
fields are errors), without descriptions, the common parts once in _definitions.json.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
KINDS = {
    "api/v1": [
        "ConfigMap", "LimitRange", "Namespace", "Pod", "ResourceQuota", "Service", "ServiceAccount", "Secret",
    ],
    "apis/apps/v1": ["Deployment"],
    "apis/batch/v1": ["Job"],
    "apis/networking.k8s.io/v1": ["Ingress", "NetworkPolicy"],
    "apis/policy/v1": ["PodDisruptionBudget"],
    "apis/rbac.authorization.k8s.io/v1": ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"],
    "apis/scheduling.k8s.io/v1": ["PriorityClass"],
}  # fmt: skip


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema without descriptions, with references into _definitions.json, and with no unknown fields."""
    if schema.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    if "oneOf" in schema:  # a quantity
        return {"type": ["string", "number"]}
    if "allOf" in schema:  # how OpenAPI gives a reference a description
        return strict(schema["allOf"][0])
    if "$ref" in schema:
        return {"$ref": "_definitions.json#/definitions/" + schema["$ref"].rsplit("/", 1)[1]}
    kept = {key: value for key, value in schema.items() if key in {"type", "format", "enum", "required"}}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            kept[key] = strict(schema[key])
    if "properties" in schema:
        kept["properties"] = {name: strict(each) for name, each in schema["properties"].items()}
        kept["additionalProperties"] = False
    return kept


def main() -> None:
    """Write one file per kind and the definitions that they use."""
    definitions: dict[str, Any] = {}
    for path, kinds in KINDS.items():
        raw = subprocess.run(["kubectl", "get", "--raw", f"/openapi/v3/{path}"], check=True, capture_output=True).stdout
        found = json.loads(raw)["components"]["schemas"]
        definitions |= {name: strict(schema) for name, schema in found.items()}
        group = path.split("/")[1].split(".")[0] if path.startswith("apis") else ""
        for kind in kinds:
            name = next(
                name
                for name, schema in found.items()
                if {"group": path.split("/")[1] if group else "", "kind": kind, "version": "v1"}
                in schema.get("x-kubernetes-group-version-kind", [])
            )
            target = FOLDER / f"{kind.lower()}{'-' + group if group else ''}-v1.json"
            target.write_text(json.dumps({"$ref": f"_definitions.json#/definitions/{name}"}) + "\n")
    used: set[str] = set()
    waiting = [json.loads(path.read_text())["$ref"] for path in FOLDER.glob("*-v1.json")]
    while waiting:
        name = waiting.pop().rsplit("/", 1)[1]
        if name not in used:
            used.add(name)
            waiting += references(definitions[name])
    content = {"definitions": {name: definitions[name] for name in sorted(used)}}
    (FOLDER / "_definitions.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


def references(node: Any) -> list[str]:
    """Return every reference in a schema."""
    if isinstance(node, list):
        return [found for item in node for found in references(item)]
    if isinstance(node, dict):
        here = [node["$ref"]] if "$ref" in node else []
        return here + [found for value in node.values() for found in references(value)]
    return []


if __name__ == "__main__":
    main()
