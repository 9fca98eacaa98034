"""`prefect server start` with tidepool.upstream.prefect_server, as the server's pod executes it.

If it fails: compare `wrap_application` with `prefect.cli._server_utils._run_in_foreground`. To do without:
`flowRuns.api: open`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from tidepool.local.server import free_port

if TYPE_CHECKING:
    from pathlib import Path

# Prefect calls the web server with the application; tests/integration/test_flow_run_api.py lets it serve.
PROGRAM = """
import sys
import uvicorn
from prefect.cli import app
from tidepool.upstream.prefect_server import wrap_application

class Wrapped:
    def __init__(self, application):
        self.application = application

wrap_application(Wrapped)
uvicorn.run = lambda app, **_: print("served:", type(app).__name__, "around", app.application.title)
sys.argv = ["prefect", "server", "start", *sys.argv[1:]]
app()
"""


def test_the_servers_command_serves_the_wrapped_application(tmp_path: Path) -> None:
    options = ["--host", "127.0.0.1", "--port", str(free_port()), "--no-ui"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *options],
        env={**os.environ, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert "served: Wrapped around Prefect" in done.stdout, f"{done.stdout}\n{done.stderr}"
