# ruff: noqa: INP001 - a script, not a package
"""Generate k8s/cluster/admission.yaml: the rules for flow runs as ValidatingAdmissionPolicies.

Usage: `python k8s/generate.py` (`make admission-policies`). A test fails if the result differs from the committed file.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from tidepool.compute.clusters.kubernetes.names import (
    ANNOTATION_DRIVER,
    GROUP,
    LABEL_SHARED,
    OWN_ANNOTATIONS,
    SHARED_PREFIX,
    UID_LENGTH,
)
from tidepool.operate.object_rules import CLUSTER_NAMES, COMPONENT, DRIVER, LISTS, RULES
from tidepool.operate.rules import CLUSTER, Fields, Items, Rule, literal

TARGET = Path(__file__).resolve().parent / "cluster" / "admission.yaml"
NAMESPACES = {"matchLabels": {"tidepool.dev/flow-runs": "true"}}
PARAMETERS = {"matchLabels": {"app.kubernetes.io/name": "tidepool", COMPONENT: "flow-run-rules"}}
HEADER = """\
# Generated from tidepool/operate/object_rules.py by `make admission-policies`; edit that. What flow runs may have in
# namespaces with the label tidepool.dev/flow-runs: "true". Names and caps: the chart's ConfigMap in the namespace.
"""

_BOTH = ["CREATE", "UPDATE"]
# Kubernetes updates pods (finalizers) for as long as they exist: also after a change of the rules.
RESOURCES: dict[str, tuple[str, str, list[str]]] = {
    "DaskCluster": (GROUP, "daskclusters", _BOTH),
    "DaskWorkerGroup": (GROUP, "daskworkergroups", _BOTH),
    "DaskAutoscaler": (GROUP, "daskautoscalers", _BOTH),
    "DaskJob": (GROUP, "daskjobs", _BOTH),
    "Job": ("batch/v1", "jobs", _BOTH),
    "Deployment": ("apps/v1", "deployments", _BOTH),
    "Service": ("v1", "services", _BOTH),
    DRIVER: ("v1", "pods", ["CREATE"]),
    "Pod": ("v1", "pods", ["CREATE"]),
    "Secret": ("v1", "secrets", ["CREATE"]),
}
_IS_DRIVER = f'object.metadata.?labels[?"{COMPONENT}"].orValue("") == "flow-run"'
# Of an account in the runs' namespace: a driver's. Administrators and their controllers are from elsewhere.
_BY_A_RUN = 'request.userInfo.username.startsWith("system:serviceaccount:" + request.namespace + ":")'
CONDITIONS = {
    DRIVER: {"driver": _IS_DRIVER},
    "Pod": {"other-than-driver": f"!({_IS_DRIVER})"},
    "Secret": {"by-a-run": _BY_A_RUN},
}
# Annotations change with every step of the operator, and a deletion must not fail.
_CHANGED = {
    "changed": 'request.operation == "CREATE" || !has(object.metadata.deletionTimestamp) && '
    "(object.spec != oldObject.spec || object.metadata.?labels != oldObject.metadata.?labels)"
}


class Policy:
    """The validations of one kind, and the variables that they use."""

    def __init__(self, kind: str) -> None:
        steps = "".join(f"[?{literal(step)}]" for step in CLUSTER_NAMES.get(kind, ()))
        self.variables = {"it": "dyn(object)"}
        if steps:
            self.variables[CLUSTER] = f'dyn(object){steps}.orValue("")'
        self.validations: list[dict[str, str]] = []
        self._add(RULES[kind], "variables.it", "", "", [])

    def _add(self, rule: Rule, at: str, path: str, guard: str, loops: list[tuple[str, str]]) -> None:
        """Add the validations of a rule.

        Args:
            rule: The rule.
            at: Expression for the value.
            path: Where it is, for the message.
            guard: Expression that is true if there is no such value, with `||`.
            loops: The lists that it is in, with the names for their items.
        """
        if expression := rule.cel(at):
            self._validate(guard, expression, loops, _message(path, rule))
        if isinstance(rule, Items):
            item = f"e{len(loops)}"
            self._add(rule.rule, item, f"{path}[]", "", [*loops, (at, item)])
        if isinstance(rule, Fields):
            for name in rule.needed:
                message = {"message": f"{path} must have {name}".strip()}
                self._validate(guard, f"{literal(name)} in {at}", loops, message)
            for name, inner in rule.known.items():
                self._add(inner, *self._value(inner, at, path, name, loops), loops)
            if rule.extensible:
                self._validate(guard, rule.values_cel(at), loops, {"message": rule.values_demand(path)})
            for total in rule.totals:
                self._validate(guard, total.cel(at), loops, _message(path, total))

    def _value(self, rule: Rule, at: str, path: str, name: str, loops: list[Any]) -> tuple[str, str, str]:
        """Return expression, path and guard of a field; a list or an object that is missing is an empty one."""
        below = f"{path}.{name}".strip(".")
        guard = f"!({literal(name)} in {at}) || "
        if not isinstance(rule, Items | Fields):
            return f"{at}[{literal(name)}]", below, guard
        value = f"{at}[?{literal(name)}].orValue({'[]' if isinstance(rule, Items) else '{}'})"
        if loops:  # dyn: else CEL infers one type for all fields of the item
            return f"dyn({value})", below, guard
        variable = re.sub(r"\W", "_", below)
        self.variables[variable] = value
        return f"variables.{variable}", below, guard

    def _validate(self, guard: str, expression: str, loops: list[tuple[str, str]], message: dict[str, str]) -> None:
        for values, item in [("", ""), *loops][:0:-1]:
            expression = f"{values}.all({item}, {_guarded(guard, expression)})"
            guard = ""
        self.validations.append({"expression": _guarded(guard, expression), **message})


def _guarded(guard: str, expression: str) -> str:
    return f"{guard}({expression})" if guard else expression


def _message(path: str, rule: Rule) -> dict[str, str]:
    text = f"{path} {rule.demand()}".strip()
    if not rule.parameter:
        return {"message": text}
    before, _, after = text.partition("{}")
    source = f"variables.{CLUSTER}" if rule.parameter == CLUSTER else f"params.data.{rule.parameter}"
    return {"messageExpression": f"{literal(before)} + {source} + {literal(after)}"}


def policy(kind: str) -> dict[str, Any]:
    """Return the ValidatingAdmissionPolicy of a key in `RULES`."""
    group, resource, operations = RESOURCES[kind]
    api, _, version = group.rpartition("/")
    conditions = CONDITIONS.get(kind, {}) | (_CHANGED if operations == _BOTH else {})
    spec: dict[str, Any] = {
        "failurePolicy": "Fail",
        "matchConstraints": {
            "namespaceSelector": NAMESPACES,
            "resourceRules": [
                {"apiGroups": [api], "apiVersions": [version], "resources": [resource], "operations": operations}
            ],
        },
        "matchConditions": [{"name": name, "expression": expression} for name, expression in conditions.items()],
    }
    if not RULES[kind].known:
        return _object(kind, spec | {"validations": [{"expression": "false", "message": f"a {kind} is not allowed"}]})
    made = Policy(kind)
    text = str(made.validations)
    lists = {name: f'params.data.{name}.split(",")' for name in LISTS if f"variables.{name}" in text}
    variables = made.variables | lists
    return _object(
        kind,
        spec
        | {
            "paramKind": {"apiVersion": "v1", "kind": "ConfigMap"},
            "variables": [{"name": name, "expression": expression} for name, expression in variables.items()],
            "validations": made.validations,
        },
    )


def ownership() -> dict[str, Any]:
    """Return the policy that ties a Dask cluster to the driver that made it: by the pod that its token is bound to.

    Cluster and parts have names with the pod's uid, which Kubernetes chooses: no run can take another run's beforehand.
    Whoever joins a shared cluster may create its parts; the operator compares them with the cluster.
    """
    extra = 'request.userInfo.?extra[?"authentication.kubernetes.io/pod-{}"][?0].orValue("")'
    theirs = f'variables.it.metadata.?annotations[?"{ANNOTATION_DRIVER}"].orValue("")'
    owner = 'object.metadata.?ownerReferences.orValue([]).exists(owner, owner.kind == "Job")'
    shared = f'"{LABEL_SHARED}" in variables.it.metadata.?labels.orValue({{}})'
    names = (
        f'variables.kind == {literal(kind)} ? variables.it{"".join(f"[?{literal(step)}]" for step in path)}.orValue("")'
        for kind, path in CLUSTER_NAMES.items()
        if kind in {"DaskCluster", "DaskWorkerGroup", "DaskAutoscaler", "Secret"}
    )
    spec = {
        "failurePolicy": "Fail",
        "matchConstraints": {
            "namespaceSelector": NAMESPACES,
            "resourceRules": [
                {
                    "apiGroups": [GROUP.partition("/")[0]],
                    "apiVersions": [GROUP.partition("/")[2]],
                    "resources": ["daskclusters"],
                    "operations": ["CREATE", "DELETE"],
                },
                {
                    "apiGroups": [GROUP.partition("/")[0]],
                    "apiVersions": [GROUP.partition("/")[2]],
                    "resources": ["daskautoscalers", "daskworkergroups"],
                    "operations": ["CREATE"],
                },
                {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["secrets"], "operations": ["CREATE"]},
            ],
        },
        "matchConditions": [{"name": "by-a-run", "expression": _BY_A_RUN}],
        "variables": [
            {"name": "it", "expression": 'request.operation == "DELETE" ? dyn(oldObject) : dyn(object)'},
            {"name": "pod", "expression": extra.format("name")},
            {"name": "uid", "expression": extra.format("uid")},
            {"name": "kind", "expression": "request.kind.kind"},
            {"name": "cluster", "expression": 'variables.kind == "DaskCluster"'},
            {"name": "name", "expression": " : ".join((*names, '""'))},
            {"name": "shared", "expression": shared},
        ],
        "validations": [
            {
                "expression": f'(variables.pod != "" && variables.pod == {theirs}) || variables.kind == "Secret"'
                " || (!variables.cluster && variables.shared)",
                "message": f"a run may create and delete only what has the name of its own pod in the annotation "
                f"{ANNOTATION_DRIVER}",
            },
            {
                "expression": f'request.operation == "DELETE" || !variables.cluster || {owner} || variables.shared',
                "message": f"a cluster must have a Job as its owner, or the label {LABEL_SHARED}",
            },
            {
                # A Secret without an owner is for the policy of Secrets.
                "expression": 'request.operation == "DELETE" || variables.kind == "Secret" && variables.name == "" || '
                "(variables.shared ? "
                f'variables.name.startsWith("{SHARED_PREFIX}") : size(variables.uid) >= {UID_LENGTH} && '
                f'variables.name.endsWith("-" + variables.uid.substring(0, {UID_LENGTH})))',
                "message": f"the name of a run's cluster must end with a dash and the first {UID_LENGTH} characters of "
                f"the uid of its pod, and that of a shared one begin with {SHARED_PREFIX}",
            },
            {
                # kopf's own annotations hold what it has done: with others it never takes its finalizer away.
                "expression": 'request.operation == "DELETE" || '
                "variables.it.metadata.?finalizers.orValue([]).size() == 0 && "
                # Those of a Secret are for the policy of Secrets.
                '(variables.kind == "Secret" || '
                f"variables.it.metadata.?annotations.orValue({{}}).all(k, k.startsWith({literal(OWN_ANNOTATIONS)})))",
                "message": f"a run creates objects with annotations of {OWN_ANNOTATIONS} only, and without finalizers",
            },
        ],
    }
    return _object("DaskCluster-of-a-run", spec)


def _object(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": f"tidepool-{kind.lower()}"},
        "spec": spec,
    }


def binding(made: dict[str, Any]) -> dict[str, Any]:
    """Return the binding of a policy. Without the ConfigMap nothing is admitted but Secrets.

    Secrets are created before the chart, which brings the ConfigMap, and conditions are read after parameters: the rule
    would refuse everyone's. The chart's ConfigMap is there before the account that the rule is about may create any.
    """
    spec = {"policyName": made["metadata"]["name"], "validationActions": ["Deny"]}
    if "paramKind" in made["spec"]:
        action = "Allow" if spec["policyName"] == "tidepool-secret" else "Deny"
        spec["paramRef"] = {"selector": PARAMETERS, "parameterNotFoundAction": action}
    return {
        "apiVersion": made["apiVersion"],
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": made["metadata"],
        "spec": spec,
    }


def output() -> str:
    """Return the expected content of the file."""
    policies = [*(policy(kind) for kind in RULES), ownership()]
    objects = itertools.chain.from_iterable((each, binding(each)) for each in policies)
    return HEADER + "---\n".join(yaml.safe_dump(each, sort_keys=False, width=10_000) for each in objects)


if __name__ == "__main__":
    TARGET.write_text(output())
