"""What the deploy tests need besides the fixtures of tidepool/testing.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.deploy_support import Proxy, Shop, recorded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def proxy(prefect_server: str) -> Iterator[Proxy]:
    """The requests to the server."""
    with recorded(prefect_server) as each:
        yield each


@pytest.fixture
def shop(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """An empty repository with a work pool on the server."""
    del proxy  # it reaches the server through it
    made = Shop(tmp_path / "shop", monkeypatch)
    made.create_pool()
    return made
