"""The pytest plugin in a project that is not this repository."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def run(folder: Path, test: str) -> str:
    """Run a test module in a folder of its own; return pytest's output."""
    (folder / "test_it.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    # Another test of this process may have started its server, whose address is in the environment.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TIDEPOOL_", "PREFECT_"))}
    env["HOME"] = str(folder)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_imports_and_sets_nothing_until_a_fixture_is_asked_for(tmp_path: Path) -> None:
    run(
        tmp_path,
        "import os, sys\n"
        "def test_it():\n"
        "    loaded = {name for name in sys.modules if name.partition('.')[0] == 'tidepool'}\n"
        "    assert loaded == {'tidepool', 'tidepool.testing'}\n"
        "    heavy = {'prefect', 'dask', 'distributed', 'httpx', 'pandas', 'numpy', 'pydantic', 'certifi'}\n"
        "    assert not heavy & set(sys.modules)\n"
        "    assert not [name for name in os.environ if name.startswith(('TIDEPOOL_', 'PREFECT_'))]\n",
    )


def test_store_and_threads_need_no_server(tmp_path: Path) -> None:
    run(
        tmp_path,
        "from tidepool import storage\n"
        "from tidepool.settings import settings\n"
        "def test_it(storage_root, threads):\n"
        "    assert storage.write(storage.url('a/b'), b'x') == f'{storage_root}/a/b'\n"
        "    assert settings().compute.provider == 'threads'\n"
        "def test_after_it():\n"
        "    assert settings().compute.provider == 'local'\n",
    )


def test_a_fixture_of_the_project_takes_precedence(tmp_path: Path) -> None:
    run(
        tmp_path,
        "import pytest\n"
        "@pytest.fixture\n"
        "def threads():\n"
        "    return 4\n"
        "def test_it(threads):\n"
        "    assert threads == 4\n",
    )
