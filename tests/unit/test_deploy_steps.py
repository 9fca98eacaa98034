"""The step that pins the pushed image; `docker` is a program of that name here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tidepool.deploy import steps
from tidepool.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def docker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "docker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    steps.pin_image.cache_clear()


def test_the_image_that_is_registered_is_the_digest_in_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = f"sha256:{'a' * 64}"
    docker(tmp_path, monkeypatch, f'echo "$6" | sed "s/{{{{.Manifest.Digest}}}}/{digest}/"')
    assert steps.pin_image("registry:5000/team/tidepool:abc") == {"image": f"registry:5000/team/tidepool@{digest}"}


def test_an_image_that_the_registry_does_not_have_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker(tmp_path, monkeypatch, "echo 'ERROR: not found' >&2; exit 1")
    with pytest.raises(UsageError, match="image team/tidepool:abc has no digest in its registry: ERROR: not found"):
        steps.pin_image("team/tidepool:abc")
