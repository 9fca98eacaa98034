"""Behaviour of Prefect's client that `tidepool.upstream.prefect_client` relies on."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING

import certifi
import pytest

if TYPE_CHECKING:
    from pathlib import Path

# Counts the contexts, and those that read certificates from a file.
PROGRAM = """
import json, os, ssl, sys
read = []
create = ssl.create_default_context
def count(*arguments, **options):
    read.append(options.get("cafile"))
    return create(*arguments, **options)
ssl.create_default_context = count

import anyio
from prefect.client.orchestration import get_client
from tidepool.upstream.prefect_client import share_tls_contexts

del read[:]
if "share" in sys.argv:
    share_tls_contexts()
    share_tls_contexts()
before = len(read)

async def asynchronous():
    async with get_client():
        pass

anyio.run(asynchronous)
with get_client(sync_client=True) as client:
    shared = len(read) - before
    os.utime(os.environ["PREFECT_API_SSL_CERT_FILE"], (1, 1))
    get_client(sync_client=True)
    context = client._client._transport._pool._ssl_context
print(json.dumps([before, shared, len(read), len(set(read)), context.verify_mode, context.check_hostname]))
"""


@pytest.mark.parametrize(("argument", "contexts"), [("share", [1, 0, 2]), ("stock", [0, 2, 3])])
def test_clients_share_a_context_until_the_file_changes(tmp_path: Path, argument: str, contexts: list[int]) -> None:
    file = tmp_path / "certificates.pem"
    shutil.copy(certifi.where(), file)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        env={
            **os.environ,
            "PREFECT_API_URL": "http://127.0.0.1:9/api",
            "PREFECT_API_SSL_CERT_FILE": str(file),
            "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    *found, files, verify, hostname = json.loads(done.stdout)
    assert found == contexts
    assert files == 1
    assert (verify, hostname) == (ssl.CERT_REQUIRED, True)


def test_a_file_that_cannot_be_read_is_reported_by_the_client(tmp_path: Path) -> None:
    program = """
from tidepool.upstream.prefect_client import share_tls_contexts
share_tls_contexts()
from prefect.client.orchestration import get_client
get_client(sync_client=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "PREFECT_API_URL": "http://x/api",
            "PREFECT_API_SSL_CERT_FILE": str(tmp_path / "absent.pem"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "absent.pem" in done.stderr.splitlines()[-1]
