"""The language of the rules for flow runs: what a part of a Kubernetes object may be, in Python and in CEL.

CEL is the language of Kubernetes' ValidatingAdmissionPolicies. Each rule has its meaning in both languages side by
side; tests/cluster/test_admission.py holds them against each other.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The parameter with the name of the Dask cluster that an object belongs to: it is in the object itself.
CLUSTER = "cluster"
# A quantity as tidepool writes it. Kubernetes knows more forms; with one of them both languages agree.
QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?"
_UNITS = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip
_TEXTS = 100
_QUOTED = 200  # characters of a refused value in the sentence about it
_FIELDS, _NAME = 60, 317  # a name of Kubernetes has a prefix of at most 253 characters, a slash, and at most 63
_DIGEST = r"[^@]+@sha256:[0-9a-f]{64}"


class Rule(ABC):
    """A rule for a value.

    Attributes:
        parameter: The parameter that it depends on, or nothing.
    """

    parameter: str = ""

    @abstractmethod
    def demand(self) -> str:
        """Return it in words, with `{}` for the value of the parameter."""

    @abstractmethod
    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:
        """Return whether a value keeps the rule."""

    @abstractmethod
    def cel(self, at: str) -> str:
        """Return the same as an expression; `at` is the expression for the value."""


@dataclass(frozen=True)
class Anything(Rule):
    """A value of any kind."""

    def demand(self) -> str:
        """Return nothing to do."""
        return "may be anything"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:  # noqa: ARG002 - as all rules
        """Return True."""
        return True

    def cel(self, at: str) -> str:  # noqa: ARG002 - as all rules
        """Return nothing: there is nothing to check."""
        return ""


@dataclass(frozen=True)
class Scalar(Rule):
    """A number, a truth value or a text of at most `most` characters; null, which the API server fills in, too.

    Characters, of at most four bytes each: CEL counts code points, as Python does.
    """

    most: int = 253  # a name of Kubernetes

    def demand(self) -> str:
        """Return the bound."""
        return f"must be a number, true, false or a text of at most {self.most} characters"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:  # noqa: ARG002 - as all rules
        """Measure it."""
        return len(value) <= self.most if isinstance(value, str) else value is None or isinstance(value, int | float)

    def cel(self, at: str) -> str:
        """Return a measurement."""
        numbers = " || ".join(f"type({at}) == {kind}" for kind in ("int", "double", "bool", "null_type"))
        return f"{numbers} || type({at}) == string && size({at}) <= {self.most}"


@dataclass(frozen=True)
class Texts(Rule):
    """A list of at most 100 texts, of at most `most` characters together."""

    most: int

    def demand(self) -> str:
        """Return the bounds."""
        return f"must be a list of at most 100 texts, of at most {self.most} characters together"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:  # noqa: ARG002 - as all rules
        """Add up."""
        texts = isinstance(value, list) and len(value) <= _TEXTS and all(isinstance(each, str) for each in value)
        return texts and sum(map(len, value)) <= self.most

    def cel(self, at: str) -> str:
        """Return a sum."""
        texts = f"size({at}) <= {_TEXTS} && {at}.all(t, type(t) == string)"
        return f"{texts} && {at}.map(t, size(t)).sum() <= {self.most}"


@dataclass(frozen=True)
class Only(Rule):
    """One of some values."""

    values: tuple[str | int, ...]

    def demand(self) -> str:
        """Return the accepted values."""
        accepted = ", ".join(json.dumps(each) for each in self.values)
        return f"must be {accepted}" if len(self.values) == 1 else f"must be one of {accepted}"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:  # noqa: ARG002 - as all rules
        """Compare the type, too: True equals 1."""
        return any(type(each) is type(value) and each == value for each in self.values)

    def cel(self, at: str) -> str:
        """Return a comparison with each value."""
        return f"{at} in [{', '.join(literal(each) for each in self.values)}]"


@dataclass(frozen=True)
class Listed(Rule):
    """A text that a list of the parameters has, or one of `also`."""

    parameter: str
    also: tuple[str, ...] = ()

    def demand(self) -> str:
        """Return the list and its name."""
        return f"must be one of {self.parameter}: {'{}'}{''.join(f',{each}' for each in self.also)}"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:
        """Look it up; an empty list has one item, the empty text."""
        return value != "" and value in (*parameters[self.parameter].split(","), *self.also)

    def cel(self, at: str) -> str:
        """Return a look-up."""
        listed = f"{at} != '' && {at} in variables.{self.parameter}"
        return f"({listed}) || {Only(self.also).cel(at)}" if self.also else listed


@dataclass(frozen=True)
class Named(Rule):
    """A name made from that of the Dask cluster: `{}-dask-tls`."""

    template: str
    parameter = CLUSTER

    def demand(self) -> str:
        """Return the name."""
        return f"must be {self.template}"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:
        """Compare it."""
        return bool(value == self.template.format(parameters[CLUSTER]))

    def cel(self, at: str) -> str:
        """Return a comparison."""
        before, _, after = self.template.partition("{}")
        return f"{at} == {literal(before)} + variables.{CLUSTER} + {literal(after)}"


@dataclass(frozen=True)
class Matching(Rule):
    """A text that matches a regular expression as a whole."""

    pattern: str

    def demand(self) -> str:
        """Return the expression."""
        return f"must match {self.pattern}"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:  # noqa: ARG002 - as all rules
        """Match it."""
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def cel(self, at: str) -> str:
        """Return a match, which CEL tries anywhere in the text."""
        return f"{at}.matches({literal(f'^({self.pattern})$')})"


@dataclass(frozen=True)
class Image(Rule):
    """An image by digest of one of `repositories`, or one of `images`, whatever it is called."""

    parameter = "repositories"

    def demand(self) -> str:
        """Return the form and the names."""
        return "must be name@sha256:… with one of these names: {}"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:
        """Look it up."""
        by_digest = Matching(_DIGEST).keeps(value, parameters)
        known = by_digest and value.partition("@")[0] in parameters["repositories"].split(",")
        return known or Listed("images").keeps(value, parameters)

    def cel(self, at: str) -> str:
        """Return look-ups."""
        known = f"{Matching(_DIGEST).cel(at)} && {at}.split('@')[0] in variables.repositories"
        return f"({known}) || ({Listed('images').cel(at)})"


@dataclass(frozen=True)
class Between(Rule):
    """An integer from `low` to `high`, which is a number or a parameter."""

    low: int
    high: int | str

    @property
    def parameter(self) -> str:  # type: ignore[override]
        """The upper bound, if it is a parameter."""
        return self.high if isinstance(self.high, str) else ""

    def demand(self) -> str:
        """Return the bounds."""
        return f"must be a number from {self.low} to {'{}' if self.parameter else self.high}"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:
        """Compare it."""
        high = int(parameters[self.high]) if isinstance(self.high, str) else self.high
        return type(value) is int and self.low <= value <= high

    def cel(self, at: str) -> str:
        """Return comparisons."""
        high = f"int(params.data.{self.high})" if self.parameter else str(self.high)
        return f"type({at}) == int && {at} >= {self.low} && {at} <= {high}"


@dataclass(frozen=True)
class Quantity(Rule):
    """An amount of at most a parameter."""

    parameter: str

    def demand(self) -> str:
        """Return the bound and the form."""
        return f"must be at most {{}} ({self.parameter}), written like 500m, 1.5 or 2Gi"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:
        """Compare it."""
        amount = quantity(value)
        return amount is not None and amount <= cap(parameters, self.parameter)

    def cel(self, at: str) -> str:
        """Return a comparison; an amount without a unit may be a number."""
        return f"string({at}).matches({literal(f'^{QUANTITY}$')}) && {_amount(at)} <= {_cap(self.parameter)}"


@dataclass(frozen=True)
class Total(Rule):
    """For the workers of a Dask cluster: an amount of their container times `replicas`, at most a parameter."""

    kind: str  # requests or limits
    resource: str
    parameter: str

    def demand(self) -> str:
        """Return the bound."""
        return f"replicas times {self.kind}.{self.resource} must be at most {'{}'} ({self.parameter})"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:
        """Multiply; what is missing or malformed breaks a rule of its own, and this one."""
        try:
            amount = quantity(value["spec"]["containers"][0]["resources"][self.kind][self.resource])
            return amount is not None and amount * value["replicas"] <= cap(parameters, self.parameter)
        except (KeyError, IndexError, TypeError):
            return False

    def cel(self, at: str) -> str:
        """Return the product."""
        one = f"{at}.spec.containers[0].resources.{self.kind}.{self.resource}"
        return f"{_amount(one)} * double({at}.replicas) <= {_cap(self.parameter)}"


@dataclass(frozen=True)
class Items(Rule):
    """A list of `low` to `high` items, each of which keeps a rule.

    Attributes:
        rule: For each item.
        low: Least number of items.
        high: Largest number of items.
        field: A text of each item, of which all together have at most `most` characters; none if empty.
        most: That bound.
    """

    rule: Rule
    low: int = 0
    high: int = 40
    field: str = ""
    most: int = 0

    def demand(self) -> str:
        """Return the length."""
        sum_ = f", with at most {self.most} characters in all as {self.field}" if self.field else ""
        return f"must be a list of {self.low} to {self.high} items{sum_}"

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:  # noqa: ARG002 - as all rules
        """Count; `broken` looks into the items."""
        if not isinstance(value, list) or not self.low <= len(value) <= self.high:
            return False
        items = (each for each in value if self.field and isinstance(each, dict))
        return sum(len(str(each.get(self.field) or "")) for each in items) <= self.most

    def cel(self, at: str) -> str:
        """Return the count."""
        count = f"size({at}) >= {self.low} && size({at}) <= {self.high}"
        text = f'size(dyn(i[?{literal(self.field)}].orValue("")))'
        return f"{count} && {at}.map(i, {text}).sum() <= {self.most}" if self.field else count


@dataclass(frozen=True)
class Fields(Rule):
    """An object.

    Attributes:
        known: Its fields, with the rules for their values.
        needed: Fields that must be there.
        prefixes: A field whose name begins with one of these may have a value that keeps `others`.
        parameter: A field that this list of the parameters has may have one, too.
        others: The rule for the values of such fields, of which there are at most 60.
        open: Further fields are allowed.
        totals: Rules over several fields.
    """

    known: Mapping[str, Rule]
    needed: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    parameter: str = ""
    others: Rule = Scalar()
    open: bool = False
    totals: tuple[Total, ...] = ()

    def demand(self) -> str:
        """Return the fields."""
        names = sorted([*self.known, *(f"{each}*" for each in self.prefixes)])
        most = f", at most {_FIELDS}" if self.extensible else ""
        return f"may have only {', '.join(names)}{f'; {self.parameter}: {{}}' if self.parameter else ''}{most}"

    def values_keep(self, value: Mapping[str, Any], parameters: Mapping[str, str]) -> bool:
        """Return whether the values of fields that it does not list itself are as they may be."""
        rest = (each for name, each in value.items() if name not in self.known)
        return not self.extensible or all(self.others.keeps(each, parameters) for each in rest)

    def values_demand(self, path: str) -> str:
        """Return the sentence about the values of fields that it does not list itself."""
        return f"{path}: each {self.others.demand()}"

    def values_cel(self, at: str) -> str:
        """Return the same as an expression."""
        listed = f"k in [{', '.join(literal(each) for each in sorted(self.known))}] || " if self.known else ""
        return f"{at}.all(k, {listed}{self.others.cel(f'{at}[k]')})"

    @property
    def extensible(self) -> bool:
        """Return whether it allows names that it does not list itself."""
        return bool(self.prefixes or self.parameter)

    def keeps(self, value: Any, parameters: Mapping[str, str]) -> bool:
        """Look at the names; `broken` looks at the values."""
        if not isinstance(value, dict) or self.unknown(value, parameters):
            return False
        return not self.extensible or (len(value) <= _FIELDS and all(len(name) <= _NAME for name in value))

    def unknown(self, value: Mapping[str, Any], parameters: Mapping[str, str]) -> list[str]:
        """Return the names of fields that are not allowed."""
        listed = parameters[self.parameter].split(",") if self.parameter else ()
        known = (name in self.known or name.startswith(self.prefixes) or name in listed for name in value)
        return [] if self.open else [name for name, allowed in zip(value, known, strict=True) if not allowed]

    def cel(self, at: str) -> str:
        """Return a look-up of each name."""
        if self.open:
            return ""
        allowed = [f"k in [{', '.join(literal(each) for each in sorted(self.known))}]"] if self.known else []
        allowed += [f"k.startsWith({literal(each)})" for each in self.prefixes]
        allowed += [f"k in variables.{self.parameter}"] if self.parameter else []
        names = f"{at}.all(k, {' || '.join(allowed) or 'false'})"
        return f"size({at}) <= {_FIELDS} && {at}.all(k, size(k) <= {_NAME}) && {names}" if self.extensible else names


YES, NO = Only((True,)), Only((False,))


def one_of(*values: str | int) -> Only:
    """Return the rule that a value is one of these."""
    return Only(values)


def scalars(*names: str) -> dict[str, Rule]:
    """Return fields that may have any value of a few bytes: a number, a truth value or a short text."""
    return dict.fromkeys(names, Scalar())


def broken(rule: Rule, value: Any, path: str, parameters: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each rule that a value, or a part of it, breaks.

    Args:
        rule: The rule.
        value: A part of an object, as JSON has it.
        path: Where it is, for the sentence.
        parameters: The installation's own, and the cluster's name.
    """
    if not rule.keeps(value, parameters):
        yield f"{path} {_wrong(rule, value, parameters)}".strip()
    if isinstance(rule, Items) and isinstance(value, list):
        for n, each in enumerate(value):
            yield from broken(rule.rule, each, f"{path}[{n}]", parameters)
    if isinstance(rule, Fields) and isinstance(value, dict):
        yield from (f"{path} must have {name}".strip() for name in rule.needed if name not in value)
        for name, inner in rule.known.items():
            if name in value:
                yield from broken(inner, value[name], f"{path}.{name}".strip("."), parameters)
        if not rule.values_keep(value, parameters):
            yield rule.values_demand(path)
        for total in rule.totals:
            if not total.keeps(value, parameters):
                yield f"{path} {said(total, parameters)}".strip()


def said(rule: Rule, parameters: Mapping[str, str]) -> str:
    """Return what a rule demands, with the value of its parameter."""
    return rule.demand().replace("{}", parameters[rule.parameter] if rule.parameter else "")


def _wrong(rule: Rule, value: Any, parameters: Mapping[str, str]) -> str:
    """Return what a rule demands, and what there is instead; first what a long list of fields would hide."""
    if isinstance(rule, Fields) and isinstance(value, dict) and (unknown := rule.unknown(value, parameters)):
        return f"must not have {', '.join(unknown)[:_QUOTED]}: it {said(rule, parameters)}"
    given = "" if isinstance(value, dict | list) else f", not {json.dumps(value)[:_QUOTED]}"
    return said(rule, parameters) + given


def quantity(value: Any) -> float | None:
    """Return an amount of Kubernetes' (`500m`, 2, `1Gi`) as a number; None if it is not written like this."""
    found = re.fullmatch(QUANTITY, str(value)) if type(value) in {str, int, float} else None
    if found is None:
        return None
    unit = found[2] or ""
    return float(str(value).removesuffix(unit)) * _UNITS[unit]


def cap(parameters: Mapping[str, str], name: str) -> float:
    """Return a parameter that is an amount; 0 for one that is malformed."""
    return quantity(parameters[name]) or 0


def literal(value: str | int) -> str:
    """Return a value as CEL has it: JSON, whose escapes CEL shares."""
    return json.dumps(value, ensure_ascii=False)


def _amount(at: str) -> str:
    return f"quantity(string({at})).asApproximateFloat()"


def _cap(name: str) -> str:
    return f"quantity(params.data.{name}).asApproximateFloat()"
