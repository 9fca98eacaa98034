"""Messages about failed runs of a real server, at a real receiver."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.server_api import ask
from tidepool.operate.exporter import incidents
from tidepool.operate.exporter.service import Exporter, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Receiver

DEPLOYMENTS = 20
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # by a plug-in of Apprise


def deployed(api: str, number: int) -> str:
    body = {
        "name": f"d{number}-{uuid.uuid4().hex[:8]}",
        "flow_id": ask(api, "POST", "/flows/", {"name": "storm"})["id"],
        "tags": ["tier:1", "owner:media"],
        "parameters": {"token": "s3cret"},
    }
    return str(ask(api, "POST", "/deployments/", body)["id"])


def end(api: str, deployment: str, state: str, message: str = "") -> str:
    run = str(ask(api, "POST", f"/deployments/{deployment}/create_flow_run", {})["id"])
    for kind, text in (("RUNNING", ""), (state, message)):
        ask(api, "POST", f"/flow_runs/{run}/set_state", {"state": {"type": kind, "message": text}, "force": True})
    return run


@pytest.fixture
def told(
    prefect_server: str, receiver: Receiver, targets: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[list[dict[str, str]]]]:
    """Returns the messages after a first pass of the exporter, and after each step and two more."""
    from prefect.client.orchestration import get_client

    targets(receiver.target)
    monkeypatch.setattr(incidents, "HOLD_SECONDS", 0.0)
    del prefect_server

    def passes(*steps: Callable[[], Any]) -> list[list[dict[str, str]]]:
        async def scenario() -> list[list[dict[str, str]]]:
            found = []
            async with get_client() as client:
                with Snapshot("127.0.0.1", 0) as snapshot:
                    exporter = Exporter(client, snapshot)
                    for step in (lambda: None, *steps):
                        before = len(receiver.got)
                        await asyncio.to_thread(step)
                        for _ in range(2):
                            await exporter.refresh()
                            assert exporter.notifications is not None
                            await exporter.notifications.send()
                        found.append(receiver.got[before:])
            return found

        return asyncio.run(scenario())

    return passes


def test_a_storm_of_equal_failures_is_one_message_and_so_is_its_end(
    prefect_server: str, told: Callable[..., list[list[dict[str, str]]]]
) -> None:
    deployments = [deployed(prefect_server, number) for number in range(DEPLOYMENTS)]

    def fail() -> None:
        for number, each in enumerate(deployments):
            end(prefect_server, each, "FAILED", f"the store does not answer after {number} s")

    def succeed() -> None:
        for each in deployments:
            end(prefect_server, each, "COMPLETED")

    first, [storm], again, [over] = told(fail, fail, succeed)
    assert (first, again) == ([], [])
    assert "and 19 more" in storm["title"]
    assert "the store does not answer" in storm["title"]
    assert "tidepool status " in storm["message"]
    assert re.search(r"- Run: http://\S+/runs/flow-run/[0-9a-f-]{36}\n", storm["message"])
    assert re.search(r"- Report: http://\S+/artifacts/key/d\S+-run\n", storm["message"])
    assert "s3cret" not in str(storm)
    assert over["title"].startswith("Completed again: storm/d")
    assert "(after 2 failed attempts)" in over["message"]


def test_a_run_that_is_retried_is_not_told(
    prefect_server: str, told: Callable[..., list[list[dict[str, str]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deployed(prefect_server, 0)
    runs: list[str] = []

    def fail() -> None:
        monkeypatch.setattr(incidents, "HOLD_SECONDS", 3600.0)
        runs.append(end(prefect_server, deployment, "CRASHED", "lost"))

    def retry() -> None:
        body = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
        ask(prefect_server, "POST", f"/flow_runs/{runs[0]}/set_state", body)
        monkeypatch.setattr(incidents, "HOLD_SECONDS", 0.0)

    assert told(fail, retry) == [[], [], []]


def test_without_targets_nothing_is_observed(prefect_server: str, targets: Callable[..., None]) -> None:
    from prefect.client.orchestration import get_client

    del prefect_server
    targets()

    async def scenario() -> None:
        async with get_client() as client:
            with Snapshot("127.0.0.1", 0) as snapshot:
                assert Exporter(client, snapshot).notifications is None

    asyncio.run(scenario())
