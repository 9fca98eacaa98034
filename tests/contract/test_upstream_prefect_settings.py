"""`tidepool.upstream.prefect_settings`: the values of Prefect's own, without its import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

READ = """
import json, sys
from dataclasses import asdict
from tidepool.upstream.prefect_settings import client_settings
if sys.argv[1] == "prefect":
    import prefect
found = client_settings()
assert client_settings() is found or sys.argv[1] == "prefect", "what is imported for it is not freed"
assert ("prefect" in sys.modules) == (sys.argv[1] == "prefect")
from prefect import flow, get_client
with get_client(sync_client=True) as client:
    used = str(client.api_url)
print(json.dumps([asdict(found), used]))
"""
PROFILES = """
active = "one"
[profiles.one]
PREFECT_API_URL = "http://one:4200/api"
PREFECT_API_AUTH_STRING = "kim:secret"
[profiles.two]
PREFECT_API_URL = "https://two/api"
PREFECT_API_AUTH_STRING = "lee:secret"
PREFECT_API_TLS_INSECURE_SKIP_VERIFY = "true"
"""


@pytest.mark.parametrize(
    ("variables", "project", "url"),
    [
        ({}, "", "http://one:4200/api"),
        ({"PREFECT_PROFILE": "two"}, "", "https://two/api"),
        ({}, 'api.url = "http://project/api"', "http://project/api"),
        (
            {"PREFECT_API_URL": "http://three/api", "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X": "y"}'},
            "",
            "http://three/api",
        ),
    ],
)
def test_the_values_are_those_of_a_process_that_has_imported_prefect(
    tmp_path: Path, variables: dict[str, str], project: str, url: str
) -> None:
    (tmp_path / "prefect.toml").write_text(project)
    (tmp_path / "profiles.toml").write_text(PROFILES)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}

    def read(way: str) -> list[object]:
        done = subprocess.run(
            [sys.executable, "-c", READ, way],
            env={**kept, "PREFECT_HOME": str(tmp_path), **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, done.stderr
        found: list[object] = json.loads(done.stdout)
        return found

    ours = read("tidepool")
    assert ours == read("prefect")
    assert ours[1] == f"{url}/"
