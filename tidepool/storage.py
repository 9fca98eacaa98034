"""Files and objects by URL: written atomically, read, listed, compared by content.

A *target* is a key (`tickets/trials/x.json`, meaning `TIDEPOOL_STORAGE_ROOT/tickets/trials/x.json`), a URL (`file://`,
`s3://`, `memory://`, and for reading also `http(s)://`) or a local path. A reader never sees a partial file: local
files are written beside the target and renamed, and on an object store the put is the commit.

A key is text without control characters, its parts between `/` are neither empty nor `.` nor `..`: two keys are never
one object, and every other key is refused. `*` has a meaning in `listing` only.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import unicodedata
from contextlib import contextmanager, suppress
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from uuid import uuid4

from tidepool.errors import MissingError, StorageError, UnavailableError, UsageError
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

_SCHEMES = ("file", "s3", "memory", "http", "https")
_WEB = ("http", "https")
# What the system or a store refuses for good, unlike errors that may pass.
_PERMANENT = (errno.EPERM, errno.ENAMETOOLONG, errno.ENOSYS)
_NETWORK = ("aiohttp", "botocore", "httpx", "requests", "urllib3")
# A store that restarts refuses connections for a while. The waits between botocore's attempts grow to 20 s at random:
# these are 36 s in all (14 to 57); the four that it makes by itself are 8 s.
_S3_RETRIES = {"mode": "standard", "total_max_attempts": 8}


def url(target: str) -> str:
    """Resolve a target to its absolute URL.

    Raises:
        StorageError: the scheme is not supported, or the key is refused (see the module).
    """
    scheme, separator, path = target.partition("://")
    if separator and "/" not in scheme:
        if scheme not in _SCHEMES:
            raise StorageError(f"{target}: unsupported scheme {scheme!r}; supported: {', '.join(_SCHEMES)}")
        if scheme == "file":
            return _absolute(path)
        if scheme not in _WEB:
            _check_key(path.rstrip("/"), target)
        return target
    if Path(target).is_absolute():
        return _absolute(target)
    _check_key(target, target)
    root = settings().storage.root
    return f"{url(root if '://' in root else f'file://{root}').rstrip('/')}/{target}"


def source(name: str) -> str:
    """Resolve an input to its URL: unlike an output's key, a relative path starts at the current folder.

    Raises:
        StorageError: the scheme is not supported.
    """
    return url(name) if "://" in name else _absolute(name)


def exists(target: str) -> bool:
    """Tell whether a complete file or object exists at the target.

    Raises:
        StorageError: the store does not tell.
    """
    try:
        with _existing(target) as (filesystem, path):
            # Not isfile(), which takes every error for a missing object.
            return bool(filesystem.info(path)["type"] == "file")
    except MissingError:
        return False


def size(target: str) -> int | None:
    """Return the size of the object in bytes; None when an HTTP server does not report it.

    Raises:
        StorageError: it does not exist.
    """
    with _existing(target) as (filesystem, path):
        return cast("int | None", filesystem.size(path))


def read(target: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read the object, or its bytes from `start` up to but not including `end`.

    Raises:
        StorageError: it does not exist.
    """
    with _existing(target) as (filesystem, path):
        # One request: a stream would fail when the object is replaced between two of its requests.
        return cast("bytes", filesystem.cat_file(path, start=start, end=end))


@contextmanager
def reader(target: str) -> Iterator[IO[bytes]]:
    """Open a stream of the object's bytes.

    Raises:
        StorageError: it does not exist.
    """
    with _existing(target) as (filesystem, path):
        stream = filesystem.open(path, "rb")
    with stream:
        yield stream


def write(target: str, data: bytes) -> str:
    """Write the object atomically, replacing an existing one.

    Returns:
        The URL.

    Raises:
        StorageError: it may not be written, or its folder or bucket cannot exist.
    """
    with writer(target) as stream:
        stream.write(data)
    return url(target)


def create(target: str, data: bytes) -> str:
    """Write the object like `write`, but never replace an existing one that has other content.

    Returns:
        The URL. Idempotent: writing the same bytes again succeeds, because a re-run of a run produces the same files.

    Raises:
        StorageError: an object with other content exists.
    """
    if exists(target):
        if read(target) != data:
            raise StorageError(
                f"{url(target)} exists with other content and is not overwritten; choose another destination"
            )
        return url(target)
    return write(target, data)


@contextmanager
def writer(target: str) -> Iterator[IO[bytes]]:
    """Open a stream whose bytes become the object when the block ends; an error in the block leaves nothing."""
    filesystem, path = _open(target)
    scheme = _scheme(target)
    if scheme == "file":
        with _local_writer(Path(path), target) as stream:
            yield stream
    elif scheme == "memory":
        # fsspec's memory files are visible from their first byte.
        buffer = io.BytesIO()
        yield buffer
        with _named(target):
            if filesystem.isdir(path):  # as on a disk; otherwise it would be both
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            filesystem.pipe_file(path, buffer.getvalue())
    else:
        with _named(target):
            stream = filesystem.open(path, "wb", autocommit=False)
        try:
            yield stream
        except BaseException:
            stream.discard()
            stream.closed = True  # otherwise its finaliser would upload its buffer
            raise
        with _named(target):
            stream.close()
            stream.commit()


def delete(target: str) -> None:
    """Delete the object, if it exists."""
    filesystem, path = _open(target)
    if exists(target):
        with _named(target):
            filesystem.rm_file(path)


def listing(target: str) -> list[str]:
    """List the URLs of all objects below the target, or of all that match if it contains `*`, sorted."""
    filesystem, path = _open(target)
    with _named(target):
        if "*" in path:
            # Of the characters with a meaning in fsspec's patterns, only `*` has it here.
            found = filesystem.glob(re.sub(r"[\[?]", r"[\g<0>]", path), detail=True)
        else:
            found = filesystem.find(path, detail=True)
    scheme = _scheme(target)
    names = (name for name, info in found.items() if info["type"] == "file")
    return sorted(name if scheme in _WEB else _url(scheme, name) for name in names)


def content_hash(target: str) -> str:
    """Hash the content of the object as `sha256:<hex>`, the same in every store.

    Raises:
        StorageError: it does not exist.
    """
    with reader(target) as stream:
        return f"sha256:{hashlib.file_digest(cast('io.BufferedReader', stream), 'sha256').hexdigest()}"


def put_frame(target: str, frame: pd.DataFrame) -> str:
    """Write a table as Parquet: the way to pass data to a task by reference.

    Returns:
        The URL, to pass to the task instead of the table.
    """
    return write(target, frame.to_parquet(index=False))


def get_frame(target: str, columns: list[str] | None = None) -> pd.DataFrame:
    """Read a Parquet table, or some of its columns; only those are transferred.

    Raises:
        StorageError: it does not exist.
    """
    import pandas as pd

    with reader(target) as stream:
        return pd.read_parquet(stream, columns=columns)


def is_transient(error: object) -> bool:
    """Tell whether an error of input or output may disappear when it is tried again: of the network, of the store.

    Missing, forbidden or invalid objects stay so; errors of any other kind are not errors of input or output.
    """
    if isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError
    ):
        return False
    if isinstance(error, ConnectionError | TimeoutError | UnavailableError):
        return True
    status = getattr(error, "status", None)  # aiohttp's answers
    if isinstance(status, int) and status:
        again = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
        return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in again
    if type(error).__module__.partition(".")[0] in _NETWORK:
        return True
    # Without a number it is not of the system nor of a store: libraries report invalid data so, such as a false .gz.
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _PERMANENT


def retry_transient_errors(_task: Task[..., Any], _task_run: TaskRun, state: State[Any]) -> bool:
    """Retry a task after a transient error of input or output: for `@task(retry_condition_fn=…)`."""
    return is_transient(state.data)


def options(target: str) -> dict[str, Any]:
    """Return the `storage_options=` of a target, for libraries that open URLs with fsspec themselves."""
    if _scheme(target) != "s3":
        return {}
    timeout = settings().storage.timeout_seconds
    return {
        "anon": settings().storage.anonymous or not _has_credentials(),
        # Another process may write between two calls: a cached listing would be out of date.
        "use_listings_cache": False,
        "config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout, "retries": dict(_S3_RETRIES)},
    }


def keep_results() -> None:
    """Keep the results of `@task(persist_result=True)` in the store, where another attempt of the flow run finds them.

    Call it in the flow, before these tasks. By itself Prefect keeps results in a folder of the machine, which is gone
    with its pod. In a retry of the same flow run such a task is not executed again with the same inputs and source
    code: it is Cached. The results, and the errors of what failed, are pickled below `results/<flow run id>/`; nothing
    deletes them.

    Raises:
        UsageError: called outside of a flow run.
    """
    from prefect.context import FlowRunContext
    from prefect.filesystems import LocalFileSystem, RemoteFileSystem

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise UsageError("storage.keep_results() works inside a flow function only")
    folder = url(f"results/{context.flow_run.id}")
    if _scheme(folder) == "file":
        context.result_store.result_storage = LocalFileSystem(basepath=folder.removeprefix("file://"))
    else:
        context.result_store.result_storage = RemoteFileSystem(basepath=folder, settings=options(folder))


@contextmanager
def _local_writer(path: Path, target: str) -> Iterator[IO[bytes]]:
    # Beside the target, because a rename is atomic within one file system only; short, as a file's name is limited.
    part = path.with_name(f".{uuid4().hex}.part")
    try:
        with _named(target):
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = part.open("xb")
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        with _named(target):
            part.replace(path)
    finally:
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # it was not made
            part.unlink()


def _open(target: str) -> tuple[Any, str]:
    """Return a target's file system and its path there.

    The path is not read from the URL by fsspec, for which `::`, for example, begins another URL.
    """
    import fsspec

    place = url(target)
    scheme, _, path = place.partition("://")
    filesystem = fsspec.filesystem(scheme, **options(place))
    return filesystem, place if scheme in _WEB else f"/{path}" if scheme == "memory" else path


def _url(scheme: str, path: str) -> str:
    """Return the URL of a path of a file system."""
    return f"{scheme}://{path.lstrip('/') if scheme == 'memory' else path}"


def _scheme(target: str) -> str:
    return url(target).partition("://")[0]


def _absolute(path: str) -> str:
    found = f"file://{Path(os.path.expanduser(path)).absolute()}"  # noqa: PTH111 - Path's refuses a `~` without a user
    _check_characters(found, found)
    return found


def _check_key(key: str, target: str) -> None:
    """Refuse keys that a store would take for another one.

    Raises:
        StorageError: with the part of it.
    """
    parts = key.split("/")
    if ".." in parts:
        raise StorageError(f"{target}: a key must stay below the storage root; remove '..'")
    if "" in parts or "." in parts:
        raise StorageError(f"{target!r}: a part of a key between '/' must not be empty or '.'")
    if "?versionId=" in key:
        raise StorageError(f"{target}: a key must not contain '?versionId='")
    _check_characters(key, target)


def _check_characters(key: str, target: str) -> None:
    if bad := next((each for each in key if unicodedata.category(each) in {"Cc", "Cs"}), ""):
        raise StorageError(f"{target!r}: a key must not contain the character {bad!r}")


@contextmanager
def _named(target: str) -> Iterator[None]:
    """Raise a StorageError with the target's URL for what a store refuses for good, or if it does not answer."""
    try:
        yield
    except PermissionError as error:
        lists = "; without s3:ListBucket, S3 answers so for a missing object too" if _scheme(target) == "s3" else ""
        raise StorageError(f"{url(target)}: access denied: {error.strerror or error}{lists}") from error
    except OSError as error:
        if is_transient(error) or _scheme(target) in _WEB:
            raise
        raise StorageError(f"{url(target)}: {error.strerror or error}") from error
    except Exception as error:
        # botocore's errors of a connection, after its attempts; their own text begins with a class and a long URL.
        told = getattr(error, "kwargs", None)
        endpoint = told.get("endpoint_url") if _scheme(target) == "s3" and isinstance(told, dict) else None
        if not endpoint:
            raise
        store = "/".join(str(endpoint).split("/")[:3])
        why = "no connection" if type(error).__name__ == "EndpointConnectionError" else type(error).__name__
        raise UnavailableError(f"the store {store} does not answer: {why} for {url(target)}") from None


@contextmanager
def _existing(target: str) -> Iterator[tuple[Any, str]]:
    """Open the target's file system; a missing object is a StorageError."""
    with _named(target):
        try:
            yield _open(target)
        except (FileNotFoundError, NotADirectoryError) as error:
            # fsspec raises it for every failed request to a web server; only a 404 means "not found".
            cause = error.__cause__
            if _scheme(target) in _WEB and cause and getattr(cause, "status", None) != HTTPStatus.NOT_FOUND:
                raise cause from None
            raise MissingError(f"{url(target)} does not exist") from None


@cache
def _has_credentials() -> bool:
    import botocore.session

    return botocore.session.get_session().get_credentials() is not None
