"""Storage against three stores: local files, memory, and S3 servers over HTTP that the tests start on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pandas as pd
import pytest
from moto.server import ThreadedMotoServer

from tidepool import settings as settings_module
from tidepool import storage
from tidepool.errors import StorageError
from tidepool.local.server import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY, SECRET = "test-access-key", "test-secret-key"


def _s3_environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage._has_credentials.cache_clear()


def _make_bucket(name: str) -> None:
    import s3fs

    # A new server behind the same settings must not meet the old one's connections.
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    deadline = time.monotonic() + 30
    while True:
        try:
            filesystem.mkdir(name)
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def versitygw_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which("versitygw")
    if program is None:
        pytest.skip("versitygw, a second S3 server, is not on PATH")
    folder = tmp_path_factory.mktemp("versitygw")
    (folder / "data").mkdir()
    port = free_port()
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [program, "--port", f"127.0.0.1:{port}", "posix", str(folder / "data")],
            env={**os.environ, "ROOT_ACCESS_KEY": KEY, "ROOT_SECRET_KEY": SECRET},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        server.wait(20)


@pytest.fixture(params=["file", "memory", "s3-moto", "s3-versitygw"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty storage root in each store."""
    kind, _, server = request.param.partition("-")
    bucket = f"test-{abs(hash(request.node.name)) % 10**10}"
    if kind == "s3":
        _s3_environment(monkeypatch, request.getfixturevalue(f"{server}_endpoint"))
        _make_bucket(bucket)
    root = {"file": f"file://{tmp_path}/root", "memory": f"memory://{bucket}", "s3": f"s3://{bucket}/root"}[kind]
    monkeypatch.setenv("TIDEPOOL_STORAGE_ROOT", root)
    settings_module.settings.cache_clear()
    yield root
    settings_module.settings.cache_clear()
    storage._has_credentials.cache_clear()


def test_written_bytes_are_read_back(store: str) -> None:
    assert storage.write("a/b.txt", b"hello") == f"{store}/a/b.txt"
    assert storage.exists("a/b.txt")
    assert storage.read("a/b.txt") == b"hello"
    assert storage.read(f"{store}/a/b.txt") == b"hello", "the URL names the same object as the key"
    assert storage.size("a/b.txt") == 5


def test_write_replaces(store: str) -> None:
    storage.write("x", b"old and longer")
    storage.write("x", b"new")
    assert storage.read("x") == b"new"
    assert storage.size("x") == 3, f"a cached size of {store}"


def test_create_is_idempotent_and_refuses_other_content(store: str) -> None:
    storage.create("x", b"first")
    storage.create("x", b"first")
    with pytest.raises(
        StorageError, match="exists with other content and is not overwritten; choose another destination"
    ):
        storage.create("x", b"second")
    assert storage.read(f"{store}/x") == b"first"


def _fail_half_way(target: str) -> NoReturn:
    with storage.writer(target) as stream:
        stream.write(b"half")
        raise RuntimeError("the power went")


def test_a_write_that_fails_leaves_nothing(store: str) -> None:
    with pytest.raises(RuntimeError, match="the power went"):
        _fail_half_way("x")
    assert not storage.exists("x")
    assert storage.listing(store) == []


def test_a_write_that_fails_leaves_the_old_object(store: str) -> None:
    storage.write("x", b"old")
    with pytest.raises(RuntimeError, match="the power went"):
        _fail_half_way("x")
    assert storage.read("x") == b"old"
    assert storage.listing(store) == [f"{store}/x"]


def test_a_large_object_goes_in_parts(store: str) -> None:
    """Over 5 MiB an object store takes several parts, and commits them at the end."""
    block = bytes(range(256)) * 4096 * 6
    with storage.writer("large") as stream:
        for _ in range(2):
            stream.write(block)
        assert not storage.exists("large"), f"visible in {store} before it is whole"
    assert storage.size("large") == 2 * len(block)
    assert storage.read("large") == block * 2


def test_absent_objects_are_named(store: str) -> None:
    assert not storage.exists("nothing")
    for act in (storage.read, storage.size, storage.content_hash):
        with pytest.raises(StorageError, match=f"^{store}/nothing does not exist$"):
            act("nothing")


def test_the_listing_is_sorted_and_recursive(store: str) -> None:
    for key in ("d/2", "d/1", "d/sub/3", "other"):
        storage.write(key, b"")
    assert storage.listing("d") == [f"{store}/d/1", f"{store}/d/2", f"{store}/d/sub/3"]
    assert storage.listing("d/*") == [f"{store}/d/1", f"{store}/d/2"], "a pattern names objects, not folders"
    assert storage.listing("no/such/folder") == []


def test_the_content_hash_is_that_of_the_bytes(store: str) -> None:
    storage.write("x", b"abc")
    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.content_hash("x") == expected, store


def test_delete_is_idempotent(store: str) -> None:
    storage.write("x", b"1")
    storage.delete("x")
    storage.delete("x")
    assert storage.listing(store) == []


def test_a_table_is_passed_by_reference(store: str) -> None:
    frame = pd.DataFrame({"hour": [1, 2], "tip": [0.5, 1.5], "note": ["a", None]})
    place = storage.put_frame("frames/x.parquet", frame)
    assert place == f"{store}/frames/x.parquet"
    pd.testing.assert_frame_equal(storage.get_frame(place), frame)
    assert list(storage.get_frame(place, columns=["tip"]).columns) == ["tip"]


def test_a_reader_never_sees_a_partial_file(store: str) -> None:
    """While one thread replaces the object again and again, every read is one of the two contents, whole."""
    contents = {b"a" * 200_000, b"b" * 200_000}
    storage.write("x", min(contents))
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for content in contents:
                storage.write("x", content)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(30):
            assert storage.read("x") in contents, store
    finally:
        stop.set()
        thread.join()


def test_a_relative_key_stays_below_the_root() -> None:
    with pytest.raises(StorageError, match=r"^\.\./x: a key must stay below the storage root; remove '\.\.'$"):
        storage.write("../x", b"")


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(StorageError, match="unsupported scheme 'ftp'; supported: file, s3, memory, http, https"):
        storage.read("ftp://host/x")


def test_an_input_path_starts_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text("1\n")
    assert storage.source("in.csv") == f"file://{tmp_path}/in.csv"
    assert storage.read(storage.source("in.csv")) == b"1\n"
    assert storage.source("s3://bucket/in.csv") == "s3://bucket/in.csv"


def test_local_files_get_ordinary_permissions(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    storage.write(str(tmp_path / "ours"), b"")
    assert (tmp_path / "ours").stat().st_mode == ordinary.stat().st_mode


def test_without_credentials_s3_is_read_anonymously(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    storage._has_credentials.cache_clear()
    assert storage.options("s3://bucket/x")["anon"] is True
    storage._has_credentials.cache_clear()
    _s3_environment(monkeypatch, "http://127.0.0.1:9")
    assert storage.options("s3://bucket/x")["anon"] is False
    storage._has_credentials.cache_clear()
