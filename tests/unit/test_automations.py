"""Automations as they are written to the server: the links to their runbooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tidepool.deploy.config import automations
from tidepool.deploy.config.models import Automation
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENTRY = Automation.model_validate(
    {
        "name": "late",
        "description": "Late. Runbook docs/runbooks/late.md",
        "trigger": {"type": "event", "posture": "Reactive", "expect": ["x"], "threshold": 1, "within": 0},
        "actions": [{"type": "notify", "subject": "late", "body": "Runbook: docs/runbooks/late.md"}],
    }
)
BLOCK = "11111111-1111-4111-8111-111111111111"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets TIDEPOOL_REPOSITORY_URL."""

    def use(url: str) -> None:
        monkeypatch.setenv("TIDEPOOL_REPOSITORY_URL", url)
        settings.cache_clear()

    yield use
    settings.cache_clear()


def test_the_runbook_of_an_automation_is_a_link_in_its_description_and_message(address: Callable[[str], None]) -> None:
    address("https://host/main/")
    written = automations.model(ENTRY, "tidepool", {automations.NOTIFY: BLOCK}).model_dump(mode="json")
    assert written["description"] == "Late. Runbook https://host/main/docs/runbooks/late.md"
    assert written["actions"][0]["body"] == "Runbook: https://host/main/docs/runbooks/late.md"


def test_a_comparison_without_the_address_finds_no_difference(address: Callable[[str], None]) -> None:
    address("https://host/main")
    server = automations.model(ENTRY, "tidepool", {automations.NOTIFY: BLOCK}).model_dump(mode="json")
    known = {BLOCK: automations.NOTIFY}

    def differs() -> bool:
        return automations.normal(server, known) != automations.fields(ENTRY, "tidepool", notified=True)

    assert not differs()
    address("")
    assert not differs()
    address("https://elsewhere")
    assert differs()
