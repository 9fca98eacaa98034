"""What would change: the desired state, in Git, against the live one, on the server. Pure: no server, file or clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime


class Kind(StrEnum):
    """The kinds of thing that Git owns, in the order in which they are written."""

    WORK_POOL = "work pool"
    VARIABLE = "variable"
    CONCURRENCY_LIMIT = "concurrency limit"
    NOTIFICATION = "notification block"
    DEPLOYMENT = "deployment"
    SCHEDULE = "schedule"
    AUTOMATION = "automation"


class Action(StrEnum):
    """What becomes of a thing."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    CONFLICT = "conflict"  # the name is taken by somebody else's: nothing may be written


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
"""A desired value that only the build step knows. It is equal to whatever is live."""
ABSENT: Final = Mark("none")
"""There is no such key."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Something that Git wants on the server.

    Attributes:
        kind: What it is.
        name: Its identity: `flow/deployment`, `flow/deployment#slug` for a schedule, else its own name.
        fields: What it is made of, in one normal form for both sides. Only these are compared.
        parent: Of a schedule: its deployment's name.
        replaces: Name of the live thing that it is the new name of.
    """

    kind: Kind
    name: str
    fields: Mapping[str, Any]
    parent: str = ""
    replaces: str = ""


@dataclass(frozen=True, kw_only=True)
class Live(Thing):
    """Something that is on the server.

    Attributes:
        id: The server's id.
        owned: It carries this repository's ownership mark: it may be changed and deleted.
        updated: When it was last written.
        active: False: somebody paused or disabled it.
    """

    id: str
    owned: bool
    updated: datetime | None = None
    active: bool = True


@dataclass(frozen=True)
class Difference:
    """One field that differs; the way into nested fields is written with dots."""

    field: str
    old: Any
    new: Any


@dataclass(frozen=True, kw_only=True)
class Change:
    """What becomes of one thing.

    Attributes:
        action: See `Action`.
        desired: As Git wants it; None for a deletion.
        live: As it is; None for a creation.
        differences: Field by field.
    """

    action: Action
    desired: Thing | None
    live: Live | None
    differences: tuple[Difference, ...] = ()

    @property
    def thing(self) -> Thing:
        """Whichever side there is, the desired one first."""
        thing = self.desired or self.live
        if thing is None:
            raise ValueError("a change has a desired or a live side")
        return thing


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that would change, and what stays.

    Attributes:
        changes: In the order in which they are carried out: writes by kind, then deletions.
        unchanged: What is as Git wants it.
        paused: What somebody paused or disabled; a deploy leaves that alone.
        foreign: Schedules that a person added to a deployment of ours; a deploy leaves them alone.
    """

    changes: tuple[Change, ...] = ()
    unchanged: tuple[Live, ...] = ()
    paused: tuple[Live, ...] = ()
    foreign: tuple[Live, ...] = ()

    def of(self, *actions: Action) -> list[Change]:
        """The changes with one of these actions."""
        return [change for change in self.changes if change.action in actions]

    def __bool__(self) -> bool:
        return bool(self.changes)


@dataclass
class _Sorted:
    changes: list[Change] = field(default_factory=list)
    unchanged: list[Live] = field(default_factory=list)


def plan(desired: Iterable[Thing], live: Iterable[Live]) -> Plan:
    """Compares Git with the server.

    Args:
        desired: All that Git wants. Names are unique within a kind.
        live: All that is owned, and whatever else has a name that Git wants.
    """
    wanted, existing = list(desired), list(live)
    by_name: dict[tuple[Kind, str], list[Live]] = {}
    for thing in existing:
        by_name.setdefault((thing.kind, thing.name), []).append(thing)
    # Somebody else's deployments, whose schedules are theirs too.
    taken = {thing.name for thing in existing if thing.kind is Kind.DEPLOYMENT and not thing.owned}

    result = _Sorted()
    kept: set[str] = set()
    order = list(Kind)
    # A live thing of the right name is taken before one that would get a new name.
    for each in sorted(wanted, key=lambda one: (order.index(one.kind), bool(one.replaces))):
        if each.parent in taken:
            continue
        _compare(each, by_name, kept, result)
    gone = [thing for thing in existing if thing.owned and thing.id not in kept and thing.parent not in taken]
    without_parent = {thing.name for thing in gone if thing.kind is Kind.DEPLOYMENT}
    deletions = [
        Change(action=Action.DELETE, desired=None, live=thing)
        for thing in sorted(gone, key=lambda each: (-order.index(each.kind), each.name))
        if thing.parent not in without_parent  # a deployment takes its schedules with it
    ]
    ours = {thing.name for thing in existing if thing.kind is Kind.DEPLOYMENT and thing.owned}
    return Plan(
        changes=tuple(result.changes + deletions),
        unchanged=tuple(result.unchanged),
        paused=tuple(thing for thing in existing if _is_paused(thing, ours, wanted)),
        foreign=tuple(t for t in existing if t.kind is Kind.SCHEDULE and not t.owned and t.parent in ours),
    )


def _compare(thing: Thing, by_name: Mapping[tuple[Kind, str], Sequence[Live]], kept: set[str], result: _Sorted) -> None:
    same = by_name.get((thing.kind, thing.name), [])
    found = next((each for each in same if each.owned), same[0] if same else None)
    if found is None and thing.replaces:
        old = by_name.get((thing.kind, thing.replaces), [])
        found = next((each for each in old if each.owned and each.id not in kept), None)
    if found is None:
        differences = tuple(Difference(name, ABSENT, value) for name, value in thing.fields.items())
        result.changes.append(Change(action=Action.CREATE, desired=thing, live=None, differences=differences))
        return
    if not found.owned:
        result.changes.append(Change(action=Action.CONFLICT, desired=thing, live=found))
        return
    kept.add(found.id)
    differences = tuple(
        difference
        for name, value in thing.fields.items()
        for difference in compare(found.fields.get(name, ABSENT), value, name)
    )
    if differences:
        result.changes.append(Change(action=Action.UPDATE, desired=thing, live=found, differences=differences))
    else:
        result.unchanged.append(found)


def compare(old: Any, new: Any, path: str = "") -> Iterator[Difference]:
    """The differences between two values, inside mappings too."""
    if new is UNKNOWN:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from compare(old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else str(key))
    elif old != new or isinstance(old, bool) is not isinstance(new, bool):  # 1 is no True
        yield Difference(path, old, new)


def _is_paused(thing: Live, ours: set[str], wanted: Sequence[Thing]) -> bool:
    if thing.active or not (thing.owned or thing.parent in ours):
        return False
    asked = next(
        (each.fields.get("paused") for each in wanted if (each.kind, each.name) == (thing.kind, thing.name)), 0
    )
    return asked is not True  # an environment that wants it paused is no somebody


def excess(found: Plan, live: Iterable[Live], share: float) -> list[str]:
    """Kinds of which a plan deletes more than a share of what is owned, each as `2 of 5 deployments`."""
    owned = Counter(thing.kind for thing in live if thing.owned)
    deleted = Counter(change.thing.kind for change in found.of(Action.DELETE))
    return [
        f"{deleted[kind]} of {owned[kind]} {kind}s"
        for kind in Kind
        if deleted[kind] and deleted[kind] > share * owned[kind]
    ]
