"""tidepool.upstream.kopf: changes of a registry that has been filled."""

from __future__ import annotations

import asyncio
from typing import Any

import kopf
import pytest

from tidepool.upstream.kopf import check_first, remove_timer


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
