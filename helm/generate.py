# ruff: noqa: INP001 - a script, not a package
"""Generate the chart's schema and README from values.yaml, its dashboards, and its copies of files in k8s/.

Usage: `python -m helm.generate` (`make chart-docs`). A test fails if the result differs from the committed files.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import yaml

from helm import dashboards

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "tidepool"

Docs = dict[tuple[str, ...], tuple[str, dict[str, Any]]]

_TYPES = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}


def documented(text: str) -> Docs:
    """Parse description and `@schema` of each key of values.yaml, by path.

    Only block mappings are traversed: a value in flow style (`{cpu: 100m}`) belongs to its key.
    """
    found: Docs = {}
    path: list[str] = []
    description: str | None = None
    extra: dict[str, Any] = {}
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            description = stripped[5:]
        elif stripped.startswith("# @schema "):
            extra = json.loads(stripped[10:])
        elif description is not None and not stripped.startswith("#"):
            depth = (len(line) - len(line.lstrip())) // 2
            path = [*path[:depth], stripped.split(":", 1)[0]]
            found[tuple(path)] = (description, extra)
            description, extra = None, {}
    return found


def schema(values: dict[str, Any], docs: Docs) -> dict[str, Any]:
    """Return the JSON schema: each documented key with the type of its default; other keys are refused."""

    def of(value: Any, path: tuple[str, ...]) -> dict[str, Any]:
        description, extra = docs[path]
        node: dict[str, Any] = {"description": description, "type": _TYPES[type(value)]}
        documented_keys = [key for key in value if (*path, key) in docs] if isinstance(value, dict) else []
        inner = {key: of(value[key], (*path, key)) for key in documented_keys}
        if inner:
            node |= {"properties": inner, "additionalProperties": False}
        elif path[-1] == "resources":
            node |= _RESOURCES
        elif path[-1] == "pod":
            node |= _pod()
        return node | extra

    properties = {key: of(value, (key,)) for key, value in values.items()}
    properties["teams"] |= _teams(properties)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the tidepool chart",
        "type": "object",
        "properties": properties | {"global": {"type": "object"}},
        "additionalProperties": False,
    }


def _teams(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of `teams`: a team sets what the values of the default team accept."""

    def own(group: str, *left_out: str) -> dict[str, Any]:
        inner = properties[group]["properties"]
        return properties[group] | {"properties": {key: inner[key] for key in inner if key not in left_out}}

    network_policy = properties["networkPolicy"]["properties"]
    team = {
        "type": "object",
        "properties": {
            "namespace": properties["flowRuns"]["properties"]["namespace"] | {"minLength": 1},
            "workPool": own("workPool") | {"required": ["name"]},
            "flowRuns": own("flowRuns", "namespace", "formerNamespaces", "api"),
            "networkPolicy": own("networkPolicy", *(key for key in network_policy if key != "storage")),
        },
        "required": ["namespace", "workPool"],
        "additionalProperties": False,
    }
    return {"propertyNames": {"pattern": "^[a-z][a-z0-9]{0,19}$"}, "additionalProperties": team}


_QUANTITIES = {
    "type": "object",
    "properties": {name: {"type": ["string", "number"]} for name in ("cpu", "memory", "ephemeral-storage")},
    "additionalProperties": False,
}
_RESOURCES = {"properties": {"requests": _QUANTITIES, "limits": _QUANTITIES}, "additionalProperties": False}


_PODS = (
    "The pods of `server`, `services`, `worker`, `operator` and `exporter` bend by a value `pod` of each, for example\n"
    "`server.pod.tolerations`. Those of flow runs bend by the variables of the base job template: `workPool.defaults`."
)
_OBJECTS = {"type": "array", "items": {"type": "object"}}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
# What the chart itself names: `tmp` and the files of a component; labels that select pods and network policies.
_VOLUMES = {"not": {"enum": ["tmp", "base-job-template", "flow-run-api"]}}
_LABELS = {"propertyNames": {"not": {"pattern": r"^(app\.kubernetes\.io|helm\.sh|tidepool\.dev)/"}}}
POD: dict[str, tuple[str, dict[str, Any]]] = {
    "nodeSelector": ("Labels that a node must have, beside the chart's `nodeSelector`.", _TEXTS),
    "tolerations": ("Taints of nodes that the pods tolerate, beside the chart's `tolerations`.", _OBJECTS),
    "affinity": ("Affinity to nodes and to other pods.", {"type": "object"}),
    "topologySpreadConstraints": ("How several pods are spread over zones and nodes.", _OBJECTS),
    "priorityClassName": ("PriorityClass in place of `priorityClasses.platform`.", {"type": "string"}),
    "annotations": ("Annotations of the pods, for example of a service mesh.", _TEXTS),
    "labels": ("Labels of the pods; none of `app.kubernetes.io/`, `helm.sh/`, `tidepool.dev/`.", _TEXTS | _LABELS),
    "env": (
        "Environment variables as in a container, also from Secrets (`valueFrom`). Of two of a name this one counts.",
        {"type": "array", "items": {"type": "object", "required": ["name"]}},
    ),
    "volumes": (
        "Volumes as in a pod, for example a bundle of certificates.",
        {"type": "array", "items": {"type": "object", "required": ["name"], "properties": {"name": _VOLUMES}}},
    ),
    "volumeMounts": (
        "Where its main container finds them; /tmp is taken.",
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "mountPath"],
                "properties": {"mountPath": {"type": "string", "not": {"pattern": "^/tmp/?$"}}},
            },
        },
    ),
    "securityContext": (
        "Keys of the pod's security context in place of the chart's, for example `runAsUser`.",
        {"type": "object"},
    ),
}
"""What a component's value `pod` accepts, with its meaning: additions to what the chart writes."""


def _pod() -> dict[str, Any]:
    properties = {key: {"description": text, **kind} for key, (text, kind) in POD.items()}
    return {"properties": properties, "additionalProperties": False}


def readme(values: dict[str, Any], docs: Docs) -> str:
    """Return the chart's README with one row per value."""

    def rows(value: Any, path: tuple[str, ...]) -> list[str]:
        name, description = ".".join(path), docs[path][0]
        inner = [key for key in value if (*path, key) in docs] if isinstance(value, dict) else []
        if inner:
            below = (rows(value[key], (*path, key)) for key in inner)
            return [f"| **{name}** | | {description} |", *itertools.chain.from_iterable(below)]
        return [f"| `{name}` | `{json.dumps(value)}` | {description} |"]

    header = (CHART / "README.in.md").read_text()
    table = "".join(f"{row}\n" for key, value in values.items() for row in rows(value, (key,)))
    pods = "".join(f"| `pod.{key}` | {text} |\n" for key, (text, _) in POD.items())
    return f"{header}{table}\n## Pods\n\n{_PODS}\n\n| value | meaning |\n|---|---|\n{pods}"


def dashboards_page() -> str:
    """Return docs/dashboards.md with a row for each panel."""
    text = (ROOT / "docs" / "dashboards.in.md").read_text()
    for board in dashboards.ALL.values():
        text += f"\n## {board.title.removeprefix('tidepool: ')}\n\n`{board.uid}`. {board.text}\n\n"
        text += "| panel | shows |\n|---|---|\n"
        text += "".join(f"| {panel.title} | {_linked(panel.text)} |\n" for row in board.rows for panel in row.panels)
    return text


def _linked(text: str) -> str:
    """Return a panel's text with links to the runbooks of its alerts."""
    return re.sub(r"(\w+) \(docs/(runbooks/\1\.md)\)", r"[`\1`](\2)", text)


def outputs() -> dict[Path, str]:
    """Return the expected content of every generated file."""
    text = (CHART / "values.yaml").read_text()
    values, docs = yaml.safe_load(text), documented(text)
    copies = {
        CHART / "crds" / source.name: source.read_text()
        for source in sorted((ROOT / "k8s" / "crds").glob("dask*.yaml"))
    }
    boards = {
        CHART / "files" / "dashboards" / f"{name}.json": json.dumps(board.json(), indent=1, ensure_ascii=False) + "\n"
        for name, board in dashboards.ALL.items()
    }
    return (
        copies
        | boards
        | {
            CHART / "files" / "base-job-template.json": (
                ROOT / "k8s" / "work-pool" / "base-job-template.json"
            ).read_text(),
            CHART / "values.schema.json": json.dumps(schema(values, docs), indent=2, ensure_ascii=False) + "\n",
            CHART / "README.md": readme(values, docs),
            ROOT / "docs" / "dashboards.md": dashboards_page(),
        }
    )


if __name__ == "__main__":
    for path, content in outputs().items():
        path.write_text(content)
