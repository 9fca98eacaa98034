"""Applying a plan: what is refused before the first write, and the requests of each change."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError

from tidepool.deploy.reconcile import apply
from tidepool.deploy.reconcile.comparison import Comparison
from tidepool.deploy.reconcile.plan import Action, ActualResource, Change, Difference, Kind, Plan, Resource
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BUILD = {"build": [{"tidepool.deploy.steps.validate": {}}, {"prefect_docker.deployments.steps.build_docker_image": {}}]}


class Client:
    """Keeps the requests that write; each DELETE is answered with that status, and deployments are found there."""

    def __init__(self, status: int = 204) -> None:
        self.status = status
        self.requests: list[Any] = []
        self.there: dict[str, Any] = {
            "/deployments/filter": [{"id": "id-one", "name": "one", "flow_id": "id-f"}],
            "/flows/filter": [{"id": "id-f", "name": "f"}],
        }

    def read_work_pool(self, name: str) -> Any:
        return SimpleNamespace(base_job_template={"variables": {"properties": {"cpu": {"default": f"{name}'s"}}}})

    def request(self, method: str, path: str, json: Any = None) -> Any:
        if path in self.there:
            return SimpleNamespace(json=lambda: self.there[path])
        self.requests.append((method, path, json) if json is not None else (method, path))
        if method == "DELETE" and self.status >= 400:
            response = httpx.Response(self.status, request=httpx.Request(method, f"http://server{path}"))
            raise PrefectHTTPStatusError.from_httpx_error(
                httpx.HTTPStatusError("refused", request=response.request, response=response)
            )
        return None


def actual(kind: Kind, name: str, **more: Any) -> ActualResource:
    return ActualResource(kind, name, {}, **{"id": f"id-{name}", "managed": True, "updated": NOW, **more})


def change(action: Action, kind: Kind, name: str, *differences: Difference, parent: str = "", **fields: Any) -> Change:
    return Change(
        action=action,
        desired=None if action is Action.DELETE else Resource(kind, name, fields, parent=parent),
        actual=None if action is Action.CREATE else actual(kind, name, parent=parent),
        differences=differences,
    )


TEMPLATE = {"variables": {"properties": {"cpu": {"type": "string", "default": "git's"}}}}


def applied(*changes: Change, client: Any = None, manifest: Any = None, deploy: Any = None) -> list[str]:
    """Apply a plan of these changes."""
    configs = {"f/one": {"name": "one"}}
    desired: Any = SimpleNamespace(manifest=manifest or {}, configs=configs, templates={"p": TEMPLATE})
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
    assert str(caught.value).splitlines()[:-1] == [
        "stopped half-way: refused",
        "  written (0): nothing",
        "  outcome unknown (1): variable v",
        "  not written (1): variable w",
    ]


def test_an_error_without_a_text_is_told_by_its_name() -> None:
    def deploy(*_: Any) -> Iterator[str]:
        raise httpx.ReadTimeout("")
        yield ""

    with pytest.raises(apply.PartialApplyError, match=r"^stopped half-way: ReadTimeout\n"):
        applied(change(Action.UPDATE, Kind.DEPLOYMENT, "f/one"), deploy=deploy)


def test_a_new_deployment_is_written_with_its_schedules() -> None:
    """A second request for one of them would be refused: it is there."""
    client = Client()
    new = change(Action.CREATE, Kind.DEPLOYMENT, "f/one")
    its = change(Action.CREATE, Kind.SCHEDULE, "f/one#a", parent="f/one", slug="a")
    other = change(Action.CREATE, Kind.SCHEDULE, "f/two#b", parent="f/two", slug="b")
    written = applied(new, its, other, client=client, deploy=lambda *_: iter(["f/one"]))
    assert written == ["deployment f/one", "schedule f/one#a", "schedule f/two#b"]
    assert client.requests == [("POST", "/deployments/None/schedules", [{"slug": "b", "active": True}])]


def test_a_work_pool_is_made_from_git_and_keeps_what_its_installation_has_set() -> None:
    client = Client()
    applied(change(Action.CREATE, Kind.WORK_POOL, "p", type="kubernetes"), client=client)
    applied(change(Action.UPDATE, Kind.WORK_POOL, "p", type="kubernetes"), client=client)
    there = {"variables": {"properties": {"cpu": {"type": "string", "default": "p's"}}}}
    assert client.requests == [
        ("POST", "/work_pools/", {"name": "p", "type": "kubernetes", "base_job_template": TEMPLATE}),
        ("PATCH", "/work_pools/id-p", {"base_job_template": there}),
    ]


def deployed(folder: Path, printed: str, code: int) -> list[str]:
    """Run `prefect deploy` where a module of that name in the repository prints this, and exits with this."""
    (folder / "prefect.py").write_text(f"print({printed!r})\nraise SystemExit({code})\n")
    return list(apply.prefect_deploy(folder, {"deployments": []}))


def test_deployments_are_told_as_prefect_writes_them(tmp_path: Path) -> None:
    printed = "\n".join(
        f"│ Deployment 'f/{name}' successfully created with id 'b0b6de5f-ea00'. │" for name in ("one", "two")
    )
    assert deployed(tmp_path, printed, 0) == ["f/one", "f/two"]


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("KeyError: 'a'\nValueError: b\nhttpx.ConnectError: refused\nbye", "httpx.ConnectError: refused"),
        (
            "KeyError: 'a'\nValueError: no registry\nprefect.deployments.steps.core.StepExecutionError: push failed",
            "prefect.deployments.steps.core.StepExecutionError: push failed: ValueError: no registry",
        ),
        ("Discovered a work pool\nUnknown option\n", "Unknown option"),
        ("", "exit code 3"),
    ],
)
def test_a_deploy_that_fails_has_its_last_error_as_reason(tmp_path: Path, printed: str, reason: str) -> None:
    with pytest.raises(apply.DeployError) as caught:
        deployed(tmp_path, printed, 3)
    assert str(caught.value) == f"prefect deploy: {reason}"
