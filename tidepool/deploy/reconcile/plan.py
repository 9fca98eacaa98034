"""The difference between desired state, in Git, and actual state, on the server. Pure: no server, file or clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
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


UNKNOWN: Final = Mark("known after the build")
"""A desired value that only the build step knows. It is equal to any actual value."""
ABSENT: Final = Mark("none")
"""Stands for a missing key."""


@dataclass(frozen=True)
class Resource:
    """A resource of the desired state.

    Attributes:
        kind: See `Kind`.
        name: Its identity: `flow/deployment`, `flow/deployment#slug` for a schedule, else its own name.
        fields: Its content, in one normal form for both states. Only these are compared; a `SecretStr` is never shown.
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
    updated: datetime
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
        return cast("Resource", self.desired or self.actual)

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
        paused_in_git: Names of the deployments that the desired state pauses.
    """

    changes: tuple[Change, ...] = ()
    unchanged: tuple[ActualResource, ...] = ()
    paused: tuple[ActualResource, ...] = ()
    unmanaged: tuple[ActualResource, ...] = ()
    paused_in_git: frozenset[str] = frozenset()

    def of(self, *actions: Action) -> list[Change]:
        """Return the changes with one of these actions."""
        return [change for change in self.changes if change.action in actions]

    def __bool__(self) -> bool:
        return bool(self.changes)


def make_plan(desired: Iterable[Resource], actual: Iterable[ActualResource]) -> Plan:
    """Compare desired with actual state.

    Args:
        desired: All resources in Git. Names are unique within a kind.
        actual: All managed resources, and unmanaged ones with a desired name.
    """
    wanted, existing = list(desired), list(actual)
    deployments = [each for each in existing if each.kind is Kind.DEPLOYMENT]
    managed = {each.name for each in deployments if each.managed}
    # Schedules of an unmanaged deployment are unmanaged too.
    taken = {each.name for each in deployments if not each.managed}
    # Of several resources of one name, the first managed one counts.
    by_name: dict[tuple[Kind, str], ActualResource] = {}
    for each in sorted(existing, key=lambda one: not one.managed):
        by_name.setdefault((each.kind, each.name), each)
    changes: list[Change] = []
    kept: dict[str, ActualResource] = {}
    order = list(Kind)
    # An actual resource of the right name is taken before one that would be renamed.
    for one in sorted(wanted, key=lambda one: (order.index(one.kind), bool(one.replaces))):
        if one.parent in taken:
            continue
        found = by_name.get((one.kind, one.name))
        old = by_name.get((one.kind, one.replaces))
        if found is None and old is not None and old.managed and old.id not in kept:
            found = old
        if found is not None and found.managed:
            kept[found.id] = found
        changes += _compare(one, found)
    gone = [each for each in existing if each.managed and each.id not in kept and each.parent not in taken]
    without_parent = {each.name for each in gone if each.kind is Kind.DEPLOYMENT}
    changes += [
        Change(action=Action.DELETE, desired=None, actual=resource)
        for resource in sorted(gone, key=lambda each: (-order.index(each.kind), each.name))
        if resource.parent not in without_parent  # deleting a deployment deletes its schedules
    ]
    changed = {change.actual.id for change in changes if change.actual}
    # An environment may desire a paused deployment: nothing to report then.
    wanted_paused = {each.name for each in wanted if each.fields.get("paused") is True}
    ours = [each for each in existing if each.managed or each.parent in managed]
    return Plan(
        changes=tuple(changes),
        unchanged=tuple(each for key, each in kept.items() if key not in changed),
        paused=tuple(each for each in ours if not each.active and (each.parent or each.name) not in wanted_paused),
        unmanaged=tuple(each for each in ours if not each.managed),
        paused_in_git=frozenset(wanted_paused),
    )


def _compare(desired: Resource, actual: ActualResource | None) -> Iterator[Change]:
    """Yield the change that makes the actual state the desired one, if there is one."""
    if actual is None:
        new = tuple(Difference(name, ABSENT, value) for name, value in desired.fields.items())
        yield Change(action=Action.CREATE, desired=desired, actual=None, differences=new)
    elif not actual.managed:
        yield Change(action=Action.CONFLICT, desired=desired, actual=actual)
    elif changed := tuple(
        difference
        for name, value in desired.fields.items()
        for difference in differences(actual.fields.get(name, ABSENT), value, name)
    ):
        yield Change(action=Action.UPDATE, desired=desired, actual=actual, differences=changed)


def differences(old: Any, new: Any, path: str = "") -> Iterator[Difference]:
    """Yield the differences between two values, inside mappings too."""
    if new is UNKNOWN:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from differences(old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else str(key))
    elif old != new or isinstance(old, bool) is not isinstance(new, bool):  # 1 == True in Python, not in JSON
        yield Difference(path, old, new)


def lost_pauses(plan: Plan) -> list[str]:
    """Return a sentence about each paused schedule that would be deleted while its deployment gets new ones.

    One of them may be the paused one under another slug, and would run.
    """
    created = [each.resource for each in plan.of(Action.CREATE) if each.resource.kind is Kind.SCHEDULE]
    deleted = [each.actual for each in plan.of(Action.DELETE) if each.actual and each.actual.kind is Kind.SCHEDULE]
    gone = [each for each in deleted if not each.active and each.parent not in plan.paused_in_git]
    found = ((old.name, [new.fields["slug"] for new in created if new.parent == old.parent]) for old in gone)
    return [lost_pause(schedule, slugs) for schedule, slugs in found if slugs]


def lost_pause(schedule: str, slugs: Iterable[str]) -> str:
    """Return the sentence about a paused schedule (`flow/deployment#slug`) that new ones with these slugs replace."""
    deployment, _, slug = schedule.partition("#")
    return (
        f"schedule {schedule} is paused on the server and no longer in Git: if {' or '.join(slugs)} is its new name, "
        f"write `replaces: {slug}` there, and the pause stays; if not, end it first: `tidepool resume {deployment}`"
    )


def excessive_deletions(plan: Plan, actual: Iterable[ActualResource], share: float) -> list[str]:
    """Return each kind of which a plan deletes more than a share of the managed ones, as `2 of 5 deployments`."""
    managed = Counter(each.kind for each in actual if each.managed)
    deleted = Counter(change.resource.kind for change in plan.of(Action.DELETE))
    return [
        f"{deleted[kind]} of {managed[kind]} {kind}s"
        for kind in Kind
        if deleted[kind] and deleted[kind] > share * managed[kind]
    ]
