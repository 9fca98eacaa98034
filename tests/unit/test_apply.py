"""Applying a plan: what is refused before the first write, and the requests of each change."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError

from tidepool.deploy.reconcile import apply
from tidepool.deploy.reconcile.comparison import Comparison
from tidepool.deploy.reconcile.plan import Action, ActualResource, Change, Difference, Kind, Plan, Resource
from tidepool.errors import UsageError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BUILD = {"build": [{"tidepool.deploy.steps.validate": {}}, {"prefect_docker.deployments.steps.build_docker_image": {}}]}


class Client:
    """Keeps the requests; each DELETE is answered with that status."""

    def __init__(self, status: int = 204) -> None:
        self.status = status
        self.requests: list[Any] = []

    def request(self, method: str, path: str, json: Any = None) -> None:
        self.requests.append((method, path, json) if json is not None else (method, path))
        if method == "DELETE" and self.status >= 400:
            response = httpx.Response(self.status, request=httpx.Request(method, f"http://server{path}"))
            raise PrefectHTTPStatusError.from_httpx_error(
                httpx.HTTPStatusError("refused", request=response.request, response=response)
            )


def actual(kind: Kind, name: str, **more: Any) -> ActualResource:
    return ActualResource(kind, name, {}, **{"id": f"id-{name}", "managed": True, "updated": NOW, **more})


def change(action: Action, kind: Kind, name: str, *differences: Difference, parent: str = "", **fields: Any) -> Change:
    return Change(
        action=action,
        desired=None if action is Action.DELETE else Resource(kind, name, fields, parent=parent),
        actual=None if action is Action.CREATE else actual(kind, name, parent=parent),
        differences=differences,
    )


def applied(*changes: Change, client: Any = None, manifest: Any = None, deploy: Any = None) -> list[str]:
    """Apply a plan of these changes."""
    desired: Any = SimpleNamespace(manifest=manifest or {}, configs={"f/one": {"name": "one"}}, templates={})
    found = Comparison(desired, [each.actual for each in changes if each.actual], Plan(changes=changes), [])
    return apply.apply(
        client or Client(), found, Path(), "tidepool", report=lambda _: None, deploy=deploy or (lambda *_: iter(()))
    )


@pytest.mark.parametrize("where", ["build", "push"])
def test_an_environment_that_builds_an_image_needs_it(where: str) -> None:
    one = change(Action.UPDATE, Kind.DEPLOYMENT, "f/one")
    manifest = {where: BUILD["build"]}
    with pytest.raises(UsageError, match=r"^this environment runs an image: choose it with --image NAME@sha256:…"):
        applied(one, manifest=manifest)
    assert applied(one, manifest={"build": BUILD["build"][:1]}) == ["deployment f/one"]
    limit = change(Action.CREATE, Kind.CONCURRENCY_LIMIT, "tidepool-l")
    assert applied(limit, manifest=manifest) == ["concurrency limit tidepool-l"], "no deployment, no image"


def test_a_work_pool_does_not_change_its_type() -> None:
    other = Difference("type", "process", "kubernetes")
    client = Client()
    expected = "the type of work pool p differs from the server's and cannot be changed: give the pool another name"
    with pytest.raises(UsageError, match=f"^{expected}$"):
        applied(change(Action.UPDATE, Kind.WORK_POOL, "p", other), client=client)
    assert client.requests == []
    variable = change(Action.UPDATE, Kind.VARIABLE, "v", Difference("type", 1, 2), value=2)
    assert applied(variable, client=client) == ["variable v"]


def test_each_change_is_one_request() -> None:
    client = Client()
    written = applied(
        change(Action.CREATE, Kind.VARIABLE, "v", value=1),
        change(Action.UPDATE, Kind.CONCURRENCY_LIMIT, "l", limit=2),
        change(Action.UPDATE, Kind.SCHEDULE, "f/one#a", slug="a"),
        change(Action.DELETE, Kind.AUTOMATION, "gone"),
        client=client,
    )
    assert written == ["variable v", "concurrency limit l", "schedule f/one#a", "automation gone"]
    assert client.requests == [
        ("POST", "/variables/", {"name": "v", "value": 1}),
        ("PATCH", "/v2/concurrency_limits/id-l", {"name": "l", "limit": 2}),
        ("PATCH", "/deployments/None/schedules/id-f/one#a", {"slug": "a"}),
        ("DELETE", "/automations/id-gone"),
    ]


@pytest.mark.parametrize("status", [403, 409, 500])
def test_only_what_is_gone_counts_as_deleted(status: int) -> None:
    gone = [change(Action.DELETE, Kind.VARIABLE, name) for name in ("v", "w")]
    assert applied(*gone, client=Client(404)) == ["variable v", "variable w"]
    with pytest.raises(apply.PartialApplyError) as caught:
        applied(*gone, client=Client(status))
    assert str(caught.value).splitlines()[1:-1] == [
        "  written (0): nothing",
        "  outcome unknown (1): variable v",
        "  not written (1): variable w",
    ]
