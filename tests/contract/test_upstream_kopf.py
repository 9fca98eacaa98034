"""tidepool.upstream.kopf: changes of a registry that has been filled."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock

import kopf
import pytest
from kopf._core.intents import causes, registries

from tidepool.upstream.kopf import check_first, not_at_creation, remove_handlers, remove_timer


def test_only_the_timer_of_that_function_is_removed() -> None:
    registry = kopf.OperatorRegistry()

    @kopf.timer("one", interval=1, registry=registry)
    @kopf.timer("two", interval=1, registry=registry)
    def unwanted(**_: Any) -> None:
        pass

    @kopf.timer("one", interval=1, registry=registry)
    @kopf.on.create("one", registry=registry)
    def wanted(**_: Any) -> None:
        pass

    remove_timer(registry, unwanted)

    assert [each.fn for each in registry._spawning.get_all_handlers()] == [wanted]
    assert [each.fn for each in registry._changing.get_all_handlers()] == [wanted]


def test_a_check_comes_before_every_handler() -> None:
    registry = kopf.OperatorRegistry()
    called = []

    @kopf.timer("one", interval=1, registry=registry)
    @kopf.on.create("one", registry=registry)
    @kopf.on.field("one", field="spec.a", registry=registry)
    async def handle(*, body: str, **_: Any) -> str:
        called.append(body)
        return "done"

    async def check(*, body: str, **_: Any) -> bool:
        if body == "bad":
            raise kopf.PermanentError(body)
        return body == "good"

    before = [each.id for each in registry._changing.get_all_handlers()]
    check_first(registry, check)

    handlers = [*registry._changing.get_all_handlers(), *registry._spawning.get_all_handlers()]
    assert len(handlers) == 3
    assert [each.id for each in registry._changing.get_all_handlers()] == before, "kopf notes progress by these names"
    for each in handlers:
        assert asyncio.run(each.fn(body="good", namespace="ns")) == "done"
        assert asyncio.run(each.fn(body="known", namespace="ns")) is None
        with pytest.raises(kopf.PermanentError):
            asyncio.run(each.fn(body="bad", namespace="ns"))
    assert called == ["good"] * 3


def test_only_handlers_of_those_functions_are_removed() -> None:
    registry = kopf.OperatorRegistry()

    @kopf.on.create("one", registry=registry)
    @kopf.on.field("two", field="status.phase", registry=registry)
    def unwanted(**_: Any) -> None:
        pass

    @kopf.on.field("one", field="status.phase", registry=registry)
    def wanted(**_: Any) -> None:
        pass

    remove_handlers(registry, unwanted)

    assert [each.fn for each in registry._changing.get_all_handlers()] == [wanted]
    assert {each.any_name for each in registry._changing.get_all_selectors()} == {"one"}, "what kopf watches"


def test_a_handler_of_a_field_is_called_for_a_change_and_not_for_a_new_object() -> None:
    registry = kopf.OperatorRegistry()

    @kopf.on.field("one", field="spec.replicas", registry=registry)
    def scale(**_: Any) -> None:
        pass

    def called(old: dict[str, Any] | None) -> bool:
        [handler] = registry._changing.get_all_handlers()
        cause = Mock(spec=causes.ChangingCause, old=old, new={"spec": {"replicas": 2}}, kwargs={})
        return registries._matches_field_changes(handler, cause, {})

    assert called(None)
    not_at_creation(registry, scale)
    assert not called(None)
    assert called({"spec": {"replicas": 1}})
