"""`tidepool doctor` beside a real Prefect server and a store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Any

from tests.integration.server_api import ask

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Receiver


def doctor(api: str, root: str, *arguments: str, **more: str) -> tuple[int, dict[str, Any]]:
    variables = {**os.environ, "PREFECT_API_URL": api, "TIDEPOOL_STORAGE_ROOT": root, "KUBECONFIG": "/nowhere", **more}
    command = (sys.executable, "-m", "tidepool.cli", "doctor", "--json", *arguments)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, {each["name"]: each for each in json.loads(done.stdout)["checks"]}


def test_what_is_there_and_what_is_not(prefect_server: str, tmp_path: Path, receiver: Receiver) -> None:
    pool = f"0-{uuid.uuid4().hex[:8]}"
    ask(prefect_server, "POST", "/work_pools/", {"name": pool, "type": "kubernetes"})
    flow = ask(prefect_server, "POST", "/flows/", {"name": "sell"})["id"]
    ask(prefect_server, "POST", "/deployments/", {"name": pool, "flow_id": flow, "work_pool_name": pool})
    code, found = doctor(prefect_server, f"file://{tmp_path}/store", "--notify", TIDEPOOL_NOTIFY_URLS=receiver.target)
    ask(prefect_server, "DELETE", f"/work_pools/{pool}")
    words = {name: each["word"] for name, each in found.items()}
    assert {words[name] for name in ("python", "Prefect", "clock", "database", "storage", "notifications")} == {"ok"}
    assert words["Kubernetes"] == "unknown"
    assert found[f"work pool {pool}"]["text"] == "no worker online"
    assert code == 1, "a work pool without a worker is wrong"
    assert [each["title"] for each in receiver.got] == ["tidepool doctor"]
    assert list((tmp_path / "store" / "doctor").iterdir()) == [], "nothing is left in the store"


def test_a_store_that_cannot_be_written_and_a_server_that_is_away(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, found = doctor("http://127.0.0.1:9/api", f"file://{tmp_path}/file")
    assert code == 1
    assert found["storage"]["word"] == "wrong"
    assert "TIDEPOOL_STORAGE_ROOT" in found["storage"]["do"]
    assert found["Prefect server"]["word"] == "wrong"
