"""Storage against three stores: local files, memory, and S3 servers over HTTP that the tests start on this machine."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import aiohttp
import botocore.exceptions
import hypothesis
import pandas as pd
import PIL
import pytest
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from tidepool import settings as settings_module
from tidepool import storage
from tidepool.errors import InputError, StorageError, UnavailableError
from tidepool.local.server import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    storage.put_frame("frames/x.parquet", frame[frame.hour > 1])
    pd.testing.assert_frame_equal(storage.get_frame(place), frame[frame.hour > 1].reset_index(drop=True))


def test_a_listing_has_what_another_process_wrote_meanwhile(store: str) -> None:
    storage.write("d/1", b"")
    assert storage.listing("d/*") == storage.listing("d") == [f"{store}/d/1"]
    other, path = storage._open("d/2")
    if store.startswith("s3:"):
        import s3fs

        # Another process has another file system: it tells this one's nothing.
        other = s3fs.S3FileSystem(skip_instance_cache=True)
    other.pipe_file(path, b"")
    assert storage.exists("d/2")
    assert storage.listing("d/*") == storage.listing("d") == [f"{store}/d/1", f"{store}/d/2"]


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


@pytest.mark.parametrize("target", ["s3://bucket/../x", "memory://bucket/a/../../x"])
def test_a_url_of_a_store_is_one_key(target: str) -> None:
    with pytest.raises(StorageError, match=rf"^{target}: a key must stay below the storage root; remove '\.\.'$"):
        storage.url(target)
    assert storage.url("memory://bucket/a/") == "memory://bucket/a/", "of a folder, to list it"


def test_a_relative_key_stays_below_the_root() -> None:
    with pytest.raises(StorageError, match=r"^\.\./x: a key must stay below the storage root; remove '\.\.'$"):
        storage.write("../x", b"")


# Characters and parts with a meaning for fsspec, a URL or a shell among them.
KEYS = st.lists(
    st.text(st.sampled_from("ab:?#%&=*[]~+@!$\\ .'\"é\n\x00\u2028"), max_size=6)
    | st.sampled_from(["::", "?versionId=1", "s3:", "..", ".", "a?b=c", "#x", "%2F", "[a]", "~", "file:", "zip:"]),
    min_size=1,
    max_size=3,
).map("/".join)


@hypothesis.settings(max_examples=25, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(keys=st.lists(KEYS, min_size=2, max_size=5, unique=True))
def test_each_key_is_one_object_or_is_refused(store: str, keys: list[str]) -> None:
    for found in storage.listing(store):
        storage.delete(found)
    kept: dict[str, bytes] = {}
    for number, key in enumerate(keys):
        if Path(key).is_absolute() or "://" in key:  # a path or a URL, not a key
            continue
        try:
            place = storage.write(key, str(number).encode())
        except StorageError:
            continue
        except OSError as error:
            if "ObjectParentIsFile" not in str(error):  # a store on a file system has no key that is a folder, too
                raise
            continue
        assert place == f"{store}/{key}"
        kept[key] = str(number).encode()
    assert {key: storage.read(key) for key in kept} == kept, "another key's bytes"
    assert {key: storage.read(f"{store}/{key}") for key in kept} == kept, "the URL names the same object"
    assert storage.listing(store) == sorted(f"{store}/{key}" for key in kept)
    assert all(storage.exists(key) and storage.size(key) == len(kept[key]) for key in kept)
    for key in list(kept):
        storage.delete(key)
        kept.pop(key)
        assert storage.listing(store) == sorted(f"{store}/{key}" for key in kept), f"deleted {key!r}"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("a//b", "'a//b': a part of a key between '/' must not be empty or '.'"),
        ("a/", "'a/': a part of a key between '/' must not be empty or '.'"),
        ("./a", "'./a': a part of a key between '/' must not be empty or '.'"),
        ("a\n", "'a\\n': a key must not contain the character '\\n'"),
        ("a?versionId=1", "a?versionId=1: a key must not contain '?versionId='"),
    ],
)
def test_a_refused_key_names_why(key: str, message: str) -> None:
    with pytest.raises(StorageError) as error:
        storage.write(key, b"")
    assert str(error.value) == message


class _Forbidding(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer  # noqa: N815 - the base class's names

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def forbidding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 server that answers 403 to every request."""
    import s3fs

    with ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        _s3_environment(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        s3fs.S3FileSystem.clear_instance_cache()
        storage._has_credentials.cache_clear()
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("forbidding")
@pytest.mark.parametrize(
    "act",
    [
        storage.read,
        storage.exists,
        storage.size,
        storage.delete,
        storage.listing,
        storage.content_hash,
        lambda target: storage.write(target, b"x"),
        lambda target: storage.create(target, b"x"),
    ],
)
def test_a_forbidden_object_is_named_and_not_tried_again(act: Callable[[str], object]) -> None:
    with pytest.raises(StorageError, match=r"^s3://bucket/secret: access denied: ") as error:
        act("s3://bucket/secret")
    assert not storage.is_transient(error.value)


@pytest.mark.parametrize(
    "act",
    [
        storage.read,
        storage.exists,
        storage.listing,
        lambda target: storage.write(target, b"x"),
        lambda target: storage.create(target, b"x"),
    ],
)
def test_a_store_that_does_not_answer_is_a_sentence_and_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[str], object]
) -> None:
    import s3fs
    from botocore.retries.standard import ExponentialBackoff

    store = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)
    _s3_environment(monkeypatch, store)
    s3fs.S3FileSystem.clear_instance_cache()
    text = f"^the store {store} does not answer: no connection for s3://bucket/object$"
    with pytest.raises(UnavailableError, match=text) as error:
        act("s3://bucket/object")
    assert storage.is_transient(error.value)
    s3fs.S3FileSystem.clear_instance_cache()
    storage._has_credentials.cache_clear()


class _Holding(BaseHTTPRequestHandler):
    """An S3 server with one object."""

    def answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else b"here")

    do_GET = do_HEAD = answer  # noqa: N815 - the base class's names

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_a_store_that_refuses_connections_while_it_restarts_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from botocore.retries.standard import ExponentialBackoff

    port = free_port()
    servers: list[ThreadingHTTPServer] = []
    waits: list[float] = []
    delay = ExponentialBackoff.delay_amount

    def not_waiting(backoff: ExponentialBackoff, context: Any) -> float:
        waits.append(delay(backoff, context))
        if len(waits) == 7:
            servers.append(ThreadingHTTPServer(("127.0.0.1", port), _Holding))
            threading.Thread(target=servers[0].serve_forever, kwargs={"poll_interval": 0.01}).start()
        return 0.0

    monkeypatch.setattr(ExponentialBackoff, "delay_amount", not_waiting)
    _s3_environment(monkeypatch, f"http://127.0.0.1:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    assert storage.read("s3://bucket/object") == b"here"
    assert len(waits) == 7
    s3fs.S3FileSystem.clear_instance_cache()
    storage._has_credentials.cache_clear()
    servers[0].shutdown()
    servers[0].server_close()


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "x"
    assert not storage.exists(str(below))
    with pytest.raises(StorageError, match=f"^file://{below}: "):
        storage.write(str(below), b"")
    with pytest.raises(StorageError, match=f"^file://{tmp_path}: Is a directory"):
        storage.write(str(tmp_path), b"")


def test_data_that_is_not_what_it_claims_is_not_tried_again() -> None:
    for error in (gzip.BadGzipFile("x"), PIL.UnidentifiedImageError("x"), OSError("Invalid data stream")):
        assert not storage.is_transient(error)
    for passing in (
        ConnectionError("x"),
        TimeoutError("x"),
        OSError(5, "input/output error"),
        OSError(16, "slow down"),
    ):
        assert storage.is_transient(passing)


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


def answer(status: int) -> aiohttp.ClientResponseError:
    request = aiohttp.RequestInfo(URL("http://x"), "GET", CIMultiDictProxy(CIMultiDict()), URL("http://x"))
    return aiohttp.ClientResponseError(request, (), status=status)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(5, "Input/output error"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"), True),
        *((answer(status), True) for status in (408, 429, 500, 503)),
        *((answer(status), False) for status in (400, 403, 404, 410)),
        (answer(0), True),  # aiohttp's, for an answer that was not one
        (IsADirectoryError(), False),
        (NotADirectoryError(), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (StorageError("absent"), False),
        (InputError("bad"), False),
        (KeyError("a bug"), False),
    ],
)
def test_is_transient(error: Exception, passes: bool) -> None:  # noqa: FBT001 - a column of the table above
    assert storage.is_transient(error) is passes
