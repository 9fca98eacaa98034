"""`tidepool chart`: the Helm chart and the cluster objects of this version, from the package.

`kubernetes/` beside this file has links to `helm/tidepool` and folders of `k8s/` in tidepool's own repository; a wheel
has copies of their files. So a repository that installs the package needs no checkout of tidepool.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from tidepool.errors import TidepoolError, UsageError

_FOLDER = Path(__file__).parent / "kubernetes"
WRITTEN = ("chart", "cluster", "crds")
"""The folders that `write` writes: the chart, the objects of a Kubernetes cluster, and the definitions among these."""


def packed(name: str) -> Path:
    """Return a folder of the package: `chart`, `cluster`, `crds`, `base` or `overlays`.

    Raises:
        TidepoolError: this installation does not have it.
    """
    folder = _FOLDER / name
    if not folder.is_dir():
        # Such as the image of tidepool's own repository, whose build sees the package only.
        raise TidepoolError(f"this installation of tidepool has no {name}/: install its wheel; nothing was written")
    return folder


def write(folder: Path) -> None:
    """Write chart and cluster objects to a folder, instead of those that an earlier call has written there.

    Args:
        folder: It does not exist, is empty, or was written by this command.

    Raises:
        UsageError: the folder has other content; nothing was written.
        TidepoolError: it cannot be written, or this installation does not have the files.
    """
    folder = folder.absolute()
    _check(folder)
    sources = {name: packed(name) for name in WRITTEN}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=folder) as temporary:
            for name, source in sources.items():
                shutil.copytree(source, Path(temporary) / name)
            for name in WRITTEN:
                # Moved, and deleted last: half of a version is never there.
                if (folder / name).exists():
                    (folder / name).rename(Path(temporary) / f"former-{name}")
                (Path(temporary) / name).rename(folder / name)
    except OSError as error:
        raise TidepoolError(f"{error.filename or folder}: {error.strerror}; the chart was not written") from error


def _check(folder: Path) -> None:
    there = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
    # A chart or a folder of that name that someone else has made stays.
    earlier = there == set(WRITTEN) and (folder / "cluster" / "admission.yaml").is_file()
    if (there and not earlier) or (os.path.lexists(folder) and not folder.is_dir()):
        raise UsageError(f"{folder} has other content; choose a new or empty folder, nothing was written")
