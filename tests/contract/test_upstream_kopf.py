"""tidepool.upstream.kopf: taking a timer out of a registry that has been filled."""

from __future__ import annotations

from typing import Any

import kopf

from tidepool.upstream.kopf import remove_timer


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
