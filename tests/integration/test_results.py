"""Results that another attempt of a flow run takes over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from prefect import flow, get_client, task
from prefect.flow_engine import run_flow
from prefect.states import Pending

from tidepool import settings as settings_module
from tidepool import storage
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("prefect_server")

computed: list[int] = []


@task(persist_result=True)
def double(number: int) -> int:
    computed.append(number)
    return 2 * number


@task
def forget(number: int) -> int:
    computed.append(number)
    return number


@flow
def doubles(*, fails: bool) -> list[int]:
    storage.keep_results()
    results = [double(number) for number in (1, 2)]
    if fails:
        raise ValueError("half-way")
    return [*results, double(3), forget(4)]


@pytest.fixture(params=["file", "memory"])
def root(request: pytest.FixtureRequest, storage_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store by path and one by URL: Prefect has a file system for each."""
    chosen = storage_root if request.param == "file" else "memory://kept"
    monkeypatch.setenv("TIDEPOOL_STORAGE_ROOT", chosen)
    settings_module.settings.cache_clear()
    computed.clear()
    yield chosen
    for each in storage.listing(f"{chosen}/results"):
        storage.delete(each)


def test_another_attempt_of_a_run_computes_what_is_missing(root: str) -> None:
    state: Any = doubles(fails=True, return_state=True)
    run_id = state.state_details.flow_run_id
    assert state.is_failed()
    assert storage.listing(f"{root}/results/{run_id}")

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Pending(), force=True)
        again = client.read_flow_run(run_id)
    # The cache of the first attempt's process is gone with it.
    assert run_flow(doubles, flow_run=again, parameters={"fails": False}) == [2, 4, 6, 4]
    assert computed == [1, 2, 3, 4]

    assert doubles(fails=False) == [2, 4, 6, 4]
    assert computed == [1, 2, 3, 4, 1, 2, 3, 4], "another run shares nothing"


def test_results_are_kept_inside_of_a_flow_only() -> None:
    with pytest.raises(UsageError, match="inside a flow function only"):
        storage.keep_results()
