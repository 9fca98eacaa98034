"""What a local Dask cluster is started with; tests/integration/test_compute.py starts real ones."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import dask.config
import distributed

from tidepool.compute.clusters import local
from tidepool.compute.clusters.local import quiet_dask
from tidepool.settings import SizeSettings

if TYPE_CHECKING:
    import pytest

SIZE = SizeSettings(workers=3, threads=2, cpu=1, memory_gib=1.5)


def test_a_local_cluster_has_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    patience: list[float] = []
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(local, "set_dask_defaults", patience.append)
    monkeypatch.setattr(local, "settings", lambda: SimpleNamespace(compute=SimpleNamespace(no_worker_seconds=77)))
    monkeypatch.setattr(distributed, "LocalCluster", lambda **options: started.append(options))
    for cores, processes in ((2, True), (None, True), (8, True), (2, False)):
        monkeypatch.setattr(local.os, "cpu_count", lambda cores=cores: cores)
        local.local_cluster(SIZE, processes=processes, silence_logs=30)
    assert [each["n_workers"] for each in started] == [2, 1, 3, 3], "processes: no more than cores"
    assert {each["threads_per_worker"] for each in started} == {2}
    assert [each["memory_limit"] for each in started] == ["1.5GiB", "1.5GiB", "1.5GiB", None]
    assert [each["host"] for each in started] == ["127.0.0.1", "127.0.0.1", "127.0.0.1", None]
    assert {each["dashboard_address"] for each in started} == {"127.0.0.1:0"}, "several runs at a time"
    assert {each["silence_logs"] for each in started} == {30}
    assert patience == [77] * 4


def test_dask_logs_warnings_only_unless_the_user_has_configured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Prefect's handler on the root logger, each INFO of the scheduler was on the terminal."""
    logger = logging.getLogger("distributed")
    monkeypatch.setattr(logger, "level", logging.INFO)
    with dask.config.set({"logging": {"distributed": "info"}}):
        quiet_dask()
    assert logger.level == logging.INFO
    quiet_dask()
    assert logger.level == logging.WARNING
