"""Private parts of Prefect's client of its API."""

from __future__ import annotations

import ssl
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import certifi
from prefect._internal import version_checking
from prefect.client import orchestration
from prefect.settings import PREFECT_API_SSL_CERT_FILE


@cache
def share_tls_contexts() -> None:
    """Have Prefect's clients of one process, and of those that it forks, share their TLS contexts.

    A file of certificates that has changed is read again.

    Why: each client reads all certificates that it may need, 20 ms of CPU time, also for an API without TLS; until a
    flow begins, the two processes of its driver create twelve clients.
    Watch: `PrefectClient.__init__`, `SyncPrefectClient.__init__` and `check_server_version`: a context of its own each.
    Delete when: Prefect creates a context once, or for https only.
    """

    @cache
    def read(cafile: str, _changed: int) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=cafile)

    def shared(*arguments: Any, cafile: str | None = None, **options: Any) -> ssl.SSLContext:
        if arguments or options or cafile is None:
            return ssl.create_default_context(*arguments, cafile=cafile, **options)
        return read(str(cafile), Path(cafile).stat().st_mtime_ns)

    module = ModuleType("ssl")
    module.__dict__.update(vars(ssl), create_default_context=shared)
    orchestration.ssl = version_checking.ssl = module  # type: ignore[attr-defined]
    with suppress(OSError):  # a client says what is wrong with it
        shared(cafile=PREFECT_API_SSL_CERT_FILE.value() or certifi.where())
