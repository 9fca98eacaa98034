"""The web server of `tidepool exporter`, and its refusals."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from tidepool import cli
from tidepool.errors import UsageError
from tidepool.operate.exporter import service
from tidepool.operate.exporter.service import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    with Snapshot("127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(snapshot: Snapshot, path: str) -> tuple[int, str]:
    answer = httpx.get(f"http://127.0.0.1:{snapshot.server_port}{path}", timeout=60)
    return answer.status_code, answer.text


def test_there_is_no_page_before_the_first_reading(snapshot: Snapshot) -> None:
    assert get(snapshot, "/metrics") == (503, "no figures yet\n"), "Prometheus must not take it for an empty page"
    assert get(snapshot, "/healthz") == (503, "no figures yet\n")


def test_a_page_has_its_age(snapshot: Snapshot) -> None:
    snapshot.write(b"x 1\n")
    code, text = get(snapshot, "/metrics")
    lines = text.splitlines()
    assert (code, lines[0]) == (200, "x 1")
    name, age = lines[-1].split()
    assert name == "tidepool_exporter_snapshot_age_seconds"
    assert 0 <= float(age) < 60
    assert get(snapshot, "/healthz")[0] == 200
    assert get(snapshot, "/other") == (404, "the figures are at /metrics\n")


def test_a_loop_that_hangs_is_not_healthy_and_its_page_says_how_old_it_is(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot.write(b"x 1\n")
    written = snapshot._written
    assert written is not None
    monkeypatch.setattr(service.time, "monotonic", lambda: written + 130)
    assert snapshot.page().endswith(b"tidepool_exporter_snapshot_age_seconds 130.000\n")
    assert get(snapshot, "/healthz") == (503, "the figures are 130 s old\n")


def test_a_port_in_use_is_one_sentence(snapshot: Snapshot) -> None:
    with pytest.raises(UsageError, match=r"cannot listen at 127\.0\.0\.1:\d+: Address already in use; choose another"):
        Snapshot("127.0.0.1", snapshot.server_port)


def test_without_a_server_the_command_ends_with_one_sentence() -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        done = CliRunner().invoke(cli.app, ["exporter"])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception).startswith("PREFECT_API_URL is not set: give the address of the Prefect server")
