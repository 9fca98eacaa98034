"""The difference between desired state, in Git, and actual state, on the server. Pure: no server, file or clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime


class Kind(StrEnum):
    """Kinds of resource, in the order in which they are written."""

    WORK_POOL = "work pool"
    VARIABLE = "variable"
    CONCURRENCY_LIMIT = "concurrency limit"
    NOTIFICATION = "notification block"
    DEPLOYMENT = "deployment"
    SCHEDULE = "schedule"
    AUTOMATION = "automation"


class Action(StrEnum):
    """Action on one resource."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    CONFLICT = "conflict"  # an unmanaged resource has the name: nothing may be written


class Mark:
    """A value that stands for something else; shown in parentheses."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return f"({self._text})"


@dataclass(frozen=True)
class Masked:
    """A secret: compared, and never shown."""

    value: str

    def __repr__(self) -> str:
        return "(secret)"


UNKNOWN: Final = Mark("known after the build")
"""A desired value that only the build step knows. It is equal to any actual value."""
ABSENT: Final = Mark("none")
"""Stands for a missing key."""


@dataclass(frozen=True, kw_only=True)
class Resource:
    """A resource of the desired state.

    Attributes:
        kind: Its kind.
        name: Its identity: `flow/deployment`, `flow/deployment#slug` for a schedule, else its own name.
        fields: Its content, in one normal form for both states. Only these are compared.
        parent: Of a schedule: its deployment's name.
        replaces: Name of the actual resource that it is the new name of.
    """

    kind: Kind
    name: str
    fields: Mapping[str, Any]
    parent: str = ""
    replaces: str = ""


@dataclass(frozen=True, kw_only=True)
class ActualResource(Resource):
    """A resource of the actual state.

    Attributes:
        id: The server's id.
        managed: It carries this repository's mark, and so may be changed and deleted.
        updated: Time of the last write.
        active: False: it was paused or disabled on the server.
    """

    id: str
    managed: bool
    updated: datetime | None = None
    active: bool = True


@dataclass(frozen=True)
class Difference:
    """One field that differs; the path into nested fields is written with dots."""

    field: str
    old: Any
    new: Any


@dataclass(frozen=True, kw_only=True)
class Change:
    """A planned change of one resource.

    Attributes:
        action: See `Action`.
        desired: Its desired state; None for a deletion.
        actual: Its actual state; None for a creation.
        differences: Field by field.
    """

    action: Action
    desired: Resource | None
    actual: ActualResource | None
    differences: tuple[Difference, ...] = ()

    @property
    def resource(self) -> Resource:
        """Its desired state, or its actual state for a deletion."""
        resource = self.desired or self.actual
        if resource is None:
            raise ValueError("a change has a desired or an actual state")
        return resource

    @property
    def label(self) -> str:
        """Kind and name: `schedule csv-etl/csv-etl#nightly`."""
        return f"{self.resource.kind} {self.resource.name}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All changes, and what stays.

    Attributes:
        changes: In the order in which they are applied: writes by kind, then deletions.
        unchanged: Resources whose states are equal.
        paused: Resources that were paused or disabled on the server; a deploy leaves that alone.
        unmanaged: Schedules that were added to a managed deployment on the server; a deploy leaves them alone.
    """

    changes: tuple[Change, ...] = ()
    unchanged: tuple[ActualResource, ...] = ()
    paused: tuple[ActualResource, ...] = ()
    unmanaged: tuple[ActualResource, ...] = ()

    def of(self, *actions: Action) -> list[Change]:
        """Return the changes with one of these actions."""
        return [change for change in self.changes if change.action in actions]

    def __bool__(self) -> bool:
        return bool(self.changes)


@dataclass
class _Compared:
    changes: list[Change] = field(default_factory=list)
    unchanged: list[ActualResource] = field(default_factory=list)


def make_plan(desired: Iterable[Resource], actual: Iterable[ActualResource]) -> Plan:
    """Compare desired with actual state.

    Args:
        desired: All resources in Git. Names are unique within a kind.
        actual: All managed resources, and unmanaged ones with a desired name.
    """
    wanted, existing = list(desired), list(actual)
    by_name: dict[tuple[Kind, str], list[ActualResource]] = {}
    for resource in existing:
        by_name.setdefault((resource.kind, resource.name), []).append(resource)
    # Schedules of an unmanaged deployment are unmanaged too.
    taken = {each.name for each in existing if each.kind is Kind.DEPLOYMENT and not each.managed}

    result = _Compared()
    kept: set[str] = set()
    order = list(Kind)
    # An actual resource of the right name is taken before one that would be renamed.
    for each in sorted(wanted, key=lambda one: (order.index(one.kind), bool(one.replaces))):
        if each.parent not in taken:
            _compare(each, by_name, kept, result)
    gone = [each for each in existing if each.managed and each.id not in kept and each.parent not in taken]
    without_parent = {each.name for each in gone if each.kind is Kind.DEPLOYMENT}
    deletions = [
        Change(action=Action.DELETE, desired=None, actual=resource)
        for resource in sorted(gone, key=lambda each: (-order.index(each.kind), each.name))
        if resource.parent not in without_parent  # deleting a deployment deletes its schedules
    ]
    managed = {each.name for each in existing if each.kind is Kind.DEPLOYMENT and each.managed}
    return Plan(
        changes=tuple(result.changes + deletions),
        unchanged=tuple(result.unchanged),
        paused=tuple(each for each in existing if _is_paused(each, managed, wanted)),
        unmanaged=tuple(
            each for each in existing if each.kind is Kind.SCHEDULE and not each.managed and each.parent in managed
        ),
    )


def _compare(
    desired: Resource,
    by_name: Mapping[tuple[Kind, str], Sequence[ActualResource]],
    kept: set[str],
    result: _Compared,
) -> None:
    same = by_name.get((desired.kind, desired.name), [])
    found = next((each for each in same if each.managed), same[0] if same else None)
    if found is None and desired.replaces:
        old = by_name.get((desired.kind, desired.replaces), [])
        found = next((each for each in old if each.managed and each.id not in kept), None)
    if found is None:
        new = tuple(Difference(name, ABSENT, value) for name, value in desired.fields.items())
        result.changes.append(Change(action=Action.CREATE, desired=desired, actual=None, differences=new))
        return
    if not found.managed:
        result.changes.append(Change(action=Action.CONFLICT, desired=desired, actual=found))
        return
    kept.add(found.id)
    changed = tuple(
        difference
        for name, value in desired.fields.items()
        for difference in differences(found.fields.get(name, ABSENT), value, name)
    )
    if changed:
        result.changes.append(Change(action=Action.UPDATE, desired=desired, actual=found, differences=changed))
    else:
        result.unchanged.append(found)


def differences(old: Any, new: Any, path: str = "") -> Iterator[Difference]:
    """Yield the differences between two values, inside mappings too."""
    if new is UNKNOWN:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from differences(old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else str(key))
    elif old != new or isinstance(old, bool) is not isinstance(new, bool):  # 1 == True in Python, not in JSON
        yield Difference(path, old, new)


def _is_paused(actual: ActualResource, managed: set[str], desired: Sequence[Resource]) -> bool:
    if actual.active or not (actual.managed or actual.parent in managed):
        return False
    same = (each for each in desired if (each.kind, each.name) == (actual.kind, actual.name))
    # An environment may desire a paused deployment: nothing to report then.
    return not any(each.fields.get("paused") is True for each in same)


def excessive_deletions(plan: Plan, actual: Iterable[ActualResource], share: float) -> list[str]:
    """Return each kind of which a plan deletes more than a share of the managed ones, as `2 of 5 deployments`."""
    managed = Counter(each.kind for each in actual if each.managed)
    deleted = Counter(change.resource.kind for change in plan.of(Action.DELETE))
    return [
        f"{deleted[kind]} of {managed[kind]} {kind}s"
        for kind in Kind
        if deleted[kind] and deleted[kind] > share * managed[kind]
    ]
