"""`make kind-demo`, with programs that only record their command lines: what it applies, what it says of the runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[2]
IMAGE, STORE = (f"localhost:5000/{name}@sha256:{digit * 64}" for name, digit in (("tidepool", "a"), ("store", "b")))
FLOWS = {
    "csv-etl",
    "image-etl",
    "most-generous-riders",
    "taxi-tip-amounts",
    "ticket-model-evaluation",
    "weekly-forecast",
}


class Machine:
    """Programs, and a Prefect server whose runs end at once."""

    def __init__(self) -> None:
        self.commands: list[tuple[tuple[str, ...], str]] = []
        self.started: list[str] = []
        self.secret_exists = False
        self.ends = dict.fromkeys(FLOWS, ("COMPLETED", "Completed", "completed"))

    def command(self, *arguments: str, text: str | None = None, **_: Any) -> str:
        self.commands.append((arguments, text or ""))
        if arguments[0] == "make":
            return f"building\n{IMAGE if 'image' in arguments else STORE}\n"
        if arguments[:2] == ("kubectl", "kustomize"):
            return "containers:\n- image: localhost:5000/tidepool-store:1\n  name: store\n"
        if "get" in arguments:
            items = [{"kind": "Secret", "metadata": {"name": "store"}}] if self.secret_exists else []
            return json.dumps({"items": items})
        return ""

    def applied(self) -> list[dict[str, Any]]:
        return [yaml.safe_load(text) for _, text in self.commands if text]


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def demo(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    folder = TOP / "tests" / "cluster"
    monkeypatch.syspath_prepend(folder)
    for name in ("kube", "installed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("kind_demo", folder / "demo.py")
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import kube

    @contextmanager
    def forwarded(_self: object, target: str, port: int) -> Iterator[int]:
        assert (target, port) == ("service/tidepool-server", 4200)
        yield 1

    def start(_self: object, deployment: str) -> str:
        machine.started.append(deployment)
        return deployment.partition("/")[0]

    def run(_self: object, run_id: str) -> dict[str, Any]:
        return {"state": dict(zip(("type", "name", "message"), machine.ends[run_id], strict=True))}

    monkeypatch.setattr(module, "command", machine.command)
    monkeypatch.setattr(kube, "command", machine.command)
    monkeypatch.setattr(module.Namespace, "forwarded", forwarded)
    monkeypatch.setattr(module.Platform, "start", start)
    monkeypatch.setattr(module.Platform, "run", run)
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    monkeypatch.setenv("REGISTRY", "localhost:5000")
    for name in ("IMAGE", "STORE"):
        monkeypatch.delenv(name, raising=False)
    yield module
    for name in ("kube", "installed"):
        sys.modules.pop(name, None)


def test_it_installs_what_it_has_built_and_runs_the_six_flows(
    demo: Any, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main() == 0
    assert set(machine.started) == {f"{name}/{name}" for name in FLOWS}
    first = [arguments for arguments, _ in machine.commands if arguments[0] == "make"]
    assert [arguments[3] for arguments in first] == ["image", "store-image"]
    helm = next(arguments for arguments, _ in machine.commands if arguments[0] == "helm")
    assert f"--set=image.digest={IMAGE.partition('@')[2]}" in helm
    assert helm[helm.index("--namespace") + 1] == "tidepool-dev"
    key, credentials, store = machine.applied()
    assert credentials["stringData"]["AWS_SECRET_ACCESS_KEY"] == key["stringData"]["secret-key"]
    assert credentials["stringData"]["AWS_ENDPOINT_URL"] == "http://store.tidepool-dev:7070"
    assert store["containers"] == [{"image": STORE, "name": "store"}]
    assert "all 6 are Completed" in capsys.readouterr().out


def test_a_second_call_keeps_the_credentials_and_builds_nothing_that_is_given(
    demo: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.secret_exists = True
    monkeypatch.setenv("IMAGE", IMAGE)
    monkeypatch.setenv("STORE", STORE)
    assert demo.main() == 0
    assert [arguments for arguments, _ in machine.commands if arguments[0] == "make"] == []
    assert [each for each in machine.applied() if each.get("kind") == "Secret"] == []


@pytest.mark.parametrize("name", ["FAILED", "CRASHED", "CANCELLED"])
def test_a_run_that_is_not_completed_is_named(
    demo: Any, machine: Machine, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    machine.ends["image-etl"] = (name, name.title(), "driver out of memory")
    assert demo.main() == 1
    out = capsys.readouterr().out
    assert f"image-etl: {name.title()} driver out of memory" in out
    assert "not Completed: image-etl; " in out


def test_a_run_that_does_not_end_is_named(
    demo: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "RUN_SECONDS", 0.2)
    machine.ends["csv-etl"] = ("RUNNING", "Running", "")
    assert demo.main() == 1
    assert "csv-etl: not ended after 0.2 s" in capsys.readouterr().out
