"""Requests of a test to the Prefect server that it shares with others."""

from __future__ import annotations

from typing import Any

import httpx

from tests.polling import until


def ask(api: str, method: str, path: str, body: Any = None, auth: tuple[str, str] | None = None) -> Any:
    """Send a request until the server is not busy, and return the answer's JSON; None if it is empty."""
    # 503: its SQLite was locked for too long, and nothing was written.
    busy = httpx.codes.SERVICE_UNAVAILABLE
    answer = until(
        lambda: httpx.request(method, f"{api}{path}", json=body, timeout=60, auth=auth),
        lambda found: found.status_code != busy,
    ).raise_for_status()
    return answer.json() if answer.content else None


def make_unreadable(api: str, run: str, kind: str = "RUNNING") -> None:
    """Set a state of a flow run that the server stores and cannot list: too deep together with what is around it."""
    listed = {"flow_runs": {"id": {"any_": [run]}}}
    for levels in range(240, 270):
        data: list[Any] = []
        for _ in range(levels):
            data = [data]
        body = {"state": {"type": kind, "data": data}, "force": True}
        httpx.post(f"{api}/flow_runs/{run}/set_state", json=body, timeout=60)
        if (
            httpx.post(f"{api}/flow_runs/filter", json=listed, timeout=60).status_code
            == httpx.codes.INTERNAL_SERVER_ERROR
        ):
            return
    raise AssertionError("the server lists it at any depth: tidepool.operate.unreadable has nothing to do")
