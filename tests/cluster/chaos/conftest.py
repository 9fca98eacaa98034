"""Fixtures of the chaos suite: the cluster tests' installation, of an image that has flows to break."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from faults import undo
from installed import Platform, build
from world import Watch, World

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def image(image: str) -> str:
    """The image under test with the flows of this suite; CHAOS_IMAGE is one that has them."""
    return os.environ.get("CHAOS_IMAGE") or build(f"{image.partition('@')[0]}:chaos", HERE / "image", image)


@pytest.fixture(scope="session")
def world(installation: Platform) -> Iterator[World]:
    """The installation, whose store can be stopped: its server gets signals from another process of its pod."""
    shared = {"template": {"spec": {"shareProcessNamespace": True}}}
    patch = {"spec": {"strategy": {"type": "Recreate", "rollingUpdate": None}, **shared}}
    installation.namespace.kubectl("patch", "deployment", "store", f"--patch={json.dumps(patch)}")
    installation.namespace.kubectl("rollout", "status", "deployment/store", "--timeout=120s")
    with Watch(installation) as watch:
        found = World(installation, watch)
        undo(found)
        yield found
