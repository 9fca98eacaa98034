"""The judgements of `tidepool doctor`, without a server or Kubernetes."""

from __future__ import annotations

import asyncio
import threading
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tidepool.operate import doctor
from tidepool.operate.doctor import Check

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "registry/tidepool@sha256:" + "0" * 64


def deployment(name: str, image: str = DIGEST, ready: int = 1) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "ns", "name": name},
        "spec": {"replicas": 1, "template": {"spec": {"containers": [{"image": image}]}}},
        "status": {"readyReplicas": ready, "updatedReplicas": 1} if ready else {},
    }


@pytest.mark.parametrize(
    ("deployments", "words"),
    [
        ([deployment("server"), deployment("worker")], ["ok", "ok"]),
        ([deployment("server", ready=0), deployment("worker")], ["wrong", "ok"]),
        ([deployment("server"), deployment("worker", DIGEST.replace("0", "1"))], ["ok", "wrong"]),
        ([deployment("server", "registry/tidepool:latest")], ["ok", "warning"]),
    ],
)
def test_an_installation(deployments: list[dict[str, Any]], words: list[str]) -> None:
    assert [each.word for each in doctor._release("ns/tidepool", deployments)] == words


@pytest.mark.parametrize(("server", "word"), [("same", "ok"), ("same minor", "warning"), ("2.20.1", "wrong")])
def test_versions(server: str, word: str) -> None:
    from prefect import __version__

    other = {"same": __version__, "same minor": f"{'.'.join(__version__.split('.')[:2])}.999"}.get(server, server)
    assert doctor._version(other).word == word


@pytest.mark.parametrize(("seconds", "word"), [(0, "ok"), (-4, "ok"), (30, "wrong"), (-30, "wrong")])
def test_the_clock(seconds: float, word: str) -> None:
    now = 1_700_000_000.0
    answer = httpx.Response(200, headers={"Date": formatdate(now + seconds, usegmt=True)})
    assert [each.word for each in doctor._clock(answer, now, now + 0.1)] == [word]
    assert doctor._clock(httpx.Response(200), now, now) == []


@pytest.mark.parametrize(
    ("pool", "workers", "word"),
    [
        ({}, ["ONLINE", "OFFLINE"], "ok"),
        ({}, ["OFFLINE"], "wrong"),
        ({"unused": True}, [], "warning"),
        ({"is_paused": True}, ["ONLINE"], "warning"),
        ({"type": "ecs:push"}, [], "ok"),
    ],
)
def test_a_work_pool(pool: dict[str, Any], workers: list[str], word: str) -> None:
    whole = {"name": "kubernetes", "type": "kubernetes", "is_paused": False} | pool
    deployments = 0 if "unused" in pool else 2
    assert doctor._workers(whole, [{"status": each} for each in workers], deployments).word == word


@pytest.mark.parametrize(
    ("vacuum", "words"),
    [
        ({"enabled": ["events", "flow_runs"], "retention_period": "P90D"}, ["ok"]),
        ({"enabled": ["events"]}, ["warning"]),
    ],
)
def test_retention(vacuum: dict[str, Any], words: list[str]) -> None:
    assert [each.word for each in doctor._retention({"server": {"services": {"db_vacuum": vacuum}}})] == words


def test_a_check_that_does_not_end_or_breaks_is_unknown_and_holds_up_no_other() -> None:
    end = threading.Event()

    def hangs() -> list[Check]:
        end.wait()
        return []

    def raises() -> list[Check]:
        raise RuntimeError("its connection is closed")

    hanging, raising = (asyncio.run(doctor._part("store", doctor._in_thread(each), 0.5)) for each in (hangs, raises))
    assert hanging == [Check("store", "unknown", "no answer within 0.5 s")]
    assert raising == [Check("store", "unknown", "its connection is closed")]
    assert not end.is_set()
    end.set()


def test_what_is_installed_is_held_against_the_lock_file(tmp_path: Path) -> None:
    lock = tmp_path / "runtime.txt"
    assert [each.name for each in doctor._packages(lock)] == ["python"]
    other = "pytest==0.1 ; python_full_version < '3'"
    lock.write_text(
        f"# locked\n{other} \\\n    --hash=sha256:0\npytest=={pytest.__version__} \\\n    --hash=sha256:0\n"
    )
    assert doctor._packages(lock)[1].word == "ok"
    lock.write_text("pytest==0.1\n")
    found = doctor._packages(lock)[1]
    assert (found.word, found.text) == ("wrong", f"pytest {pytest.__version__} instead of ==0.1")


def test_lines_fit_the_terminal_and_say_what_to_do() -> None:
    text = doctor.as_text([Check("storage", "wrong", "no such bucket " * 8, "Create it.")], 80)
    assert text.startswith("wrong    storage               no such bucket")
    assert text.endswith("Create it.")
    assert max(map(len, text.splitlines())) <= 80
