"""Cost and use of a Dask cluster, and the run's page about it."""

from __future__ import annotations

from typing import Any

import pytest

from tidepool.compute.clusters.kubernetes import usage
from tidepool.settings import SizeSettings

SIZE = SizeSettings(workers=2, cpu=0.5, memory_gib=2)


def counted(**worker: float) -> dict[str, Any]:
    one = {"name": "w", "seconds": 10.0, "threads": 2, "memory_limit": 2**31, "memory_peak": 2**29, "cpu_seconds": 3.0}
    return {"busy_seconds": 10.0, "workers": [{**one, **worker}, one]}


def test_usage_adds_up() -> None:
    used = usage.measure(counted(memory_peak=2**30), SIZE)
    assert (used.core_seconds, used.gib_seconds, used.cpu_seconds) == (10.0, 40.0, 6.0)
    assert used.idle_share == pytest.approx(1 - 10 / 40)
    assert used.memory_peak_gib == 1.0


def test_a_cluster_without_a_worker_used_nothing() -> None:
    used = usage.measure({"busy_seconds": 0.0, "workers": []}, SIZE)
    assert (used.core_seconds, used.idle_share) == (0, 1)


def test_the_page_holds_the_ends_of_the_logs_and_stays_within_its_limit() -> None:
    ended = {"restartCount": 1, "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
    pod = {"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": {"containerStatuses": [ended]}}
    logs = [(pod, f"first {'x' * 50_000} last")] * 4
    page = usage.page("c", "where", {"created": 0.1}, usage.measure(counted(), SIZE), logs, limit=20_000)
    assert len(page.encode()) <= 20_000
    assert page.count("last\n") == 4
    assert "first" not in page
    assert "p on n, 1 restarts, out of memory (137)" in page


def test_the_page_has_a_row_for_each_worker() -> None:
    page = usage.page("c", "where", {}, usage.measure(counted(memory_peak=2**30), SIZE), [], limit=20_000)
    assert "| w | 10.0 | 3.0 | 1024 | 2048 |\n| w | 10.0 | 3.0 | 512 | 2048 |" in page
    assert "| peak memory of a worker | 1.00 GiB |" in page


def test_of_many_logs_each_has_its_share_of_the_page() -> None:
    pod = {"metadata": {"name": "p"}, "spec": {}, "status": {}}
    logs = [(pod, "x" * 50_000)] * 2
    page = usage.page("c" * 5000, "where", {}, None, logs, limit=20_000)
    assert 19_000 < len(page.encode()) <= 20_000


def test_the_page_says_when_the_scheduler_was_lost() -> None:
    assert "Usage unknown" in usage.page("c", "where", {}, None, [], limit=20_000)
