"""What the operator makes of the answers of Dask schedulers, which may be anything."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tidepool.operate import schedulers
from tidepool.upstream.dask_kubernetes import SchedulerCommError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import KubernetesServer

DEPLOYMENTS = "/apis/apps/v1/namespaces/ns/deployments"


def answering(monkeypatch: pytest.MonkeyPatch, response: httpx.Response) -> list[httpx.Request]:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return response

    monkeypatch.setattr(
        schedulers, "client", lambda: httpx.AsyncClient(transport=httpx.MockTransport(answer), timeout=4)
    )
    return asked


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x" * 65536


async def slow() -> AsyncIterator[bytes]:
    while True:
        yield b" "
        await asyncio.sleep(0.01)


UNUSABLE = {
    "another status": lambda: httpx.Response(500, json={"idle_since": 1.5, "workers": 1}),
    "a redirect": lambda: httpx.Response(302, headers={"Location": "http://kubernetes.default"}),
    "no JSON": lambda: httpx.Response(200, text="half an ans"),
    "nested too deeply": lambda: httpx.Response(200, text="[" * 100_000),
    "endless": lambda: httpx.Response(200, content=endless()),
    "slow": lambda: httpx.Response(200, content=slow()),
    "packed": lambda: httpx.Response(
        200, headers={"Content-Encoding": "gzip"}, content=gzip.compress(b'{"idle_since": 1.5, "workers": 1}')
    ),
}


@pytest.mark.parametrize("unusable", UNUSABLE)
def test_an_answer_that_is_not_as_it_should_be_is_none(unusable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedulers, "_SECONDS", 0.5)
    answering(monkeypatch, UNUSABLE[unusable]())

    async def ask() -> Any:
        async with schedulers.client() as http:
            return await schedulers.ask(http, "GET", "http://c-scheduler.ns:8787/api/v1/check_idle")

    assert asyncio.run(ask()) is None


@pytest.mark.parametrize(
    ("answer", "since"),
    [
        ('{"idle_since": 1764221234.5}', 1764221234.5),
        ('{"idle_since": 0.0}', None),
        ('{"idle_since": null}', None),
        ("{}", None),
        ("[1]", None),
        ('{"idle_since": "1"}', None),
        ('{"idle_since": NaN}', None),
        ('{"idle_since": -1e400}', None),
        ('{"idle_since": -1.5}', None),
        (f'{{"idle_since": {"9" * 4000}}}', None),
    ],
)
def test_only_a_time_says_that_a_scheduler_is_idle(
    answer: str, since: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, httpx.Response(200, text=answer))

    async def ask() -> float | None:
        async with schedulers.client() as http:
            return await schedulers.idle_since(http, "http://c-scheduler.ns:8787")

    assert asyncio.run(ask()) == since


def test_a_scheduler_says_how_many_workers_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, httpx.Response(200, json={"workers": 3}))
    assert asyncio.run(schedulers.desired_workers("c-scheduler", "ns")) == 3
    assert [str(each.url) for each in asked] == ["http://c-scheduler.ns:8787/api/v1/adaptive_target"]


@pytest.mark.parametrize("answer", ["{}", '{"workers": "3"}', '{"workers": true}', '{"workers": 1.5}', "3"])
def test_another_answer_than_a_number_scales_nothing(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, httpx.Response(200, text=answer))
    with pytest.raises(SchedulerCommError):
        asyncio.run(schedulers.desired_workers("c-scheduler", "ns"))


def retire(kubernetes: KubernetesServer, number: int = 2) -> list[str]:
    own = [{"metadata": {"name": f"w-{each}", "namespace": "ns"}} for each in range(4)]
    kubernetes.answers = [(200, {"items": own})]
    return asyncio.run(schedulers.retire_workers(number, "c-scheduler", "c-default", "ns", logging.getLogger(__name__)))


def test_a_scheduler_chooses_the_workers_that_go(kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, httpx.Response(200, json={"tls://1": {"name": "w-2"}, "tls://2": {"name": "w-0"}}))
    assert retire(kubernetes) == ["w-0", "w-2"]
    assert str(asked[0].url) == "http://c-scheduler.ns:8787/api/v1/retire_workers"
    assert json.loads(asked[0].content) == {"n": 2}
    assert "dask.org%2Fworkergroup-name%3Dc-default" in kubernetes.requests[-1]


def test_a_scheduler_chooses_among_its_own_workers_and_no_more_than_were_asked_for(
    kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "../../../../kubernetes.dask.org/v1/namespaces/other/daskclusters/victim"
    names = [path, "victim-worker", 7, None, "w-1", "w-3", "w-0"]
    answering(monkeypatch, httpx.Response(200, json={str(number): {"name": name} for number, name in enumerate(names)}))
    assert retire(kubernetes, 1) == ["w-0"]
    answering(monkeypatch, httpx.Response(200, json={"a": {"name": path}, "b": "w-1"}))
    assert retire(kubernetes) == []


def test_without_an_answer_the_last_workers_go(kubernetes: KubernetesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, httpx.Response(503))
    assert retire(kubernetes) == ["w-2", "w-3"]
