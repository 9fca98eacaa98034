"""Files and objects by URL: written atomically, read, listed, compared by content.

A *target* is a key (`tickets/trials/x.json`, meaning `TIDEPOOL_STORAGE_ROOT/tickets/trials/x.json`), a URL (`file://`,
`s3://`, `memory://`, and for reading also `http(s)://`) or a local path. A reader never sees a partial file: local
files are written beside the target and renamed, and on an object store the put is the commit.
"""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import contextmanager
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit
from uuid import uuid4

from tidepool.errors import StorageError, UsageError
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

_SCHEMES = ("file", "s3", "memory", "http", "https")


def url(target: str) -> str:
    """Resolve a target to its absolute URL.

    Raises:
        StorageError: the scheme is not supported, or a key leaves the storage root with `..`.
    """
    if "://" in target:
        scheme = urlsplit(target).scheme
        if scheme not in _SCHEMES:
            raise StorageError(f"{target}: unsupported scheme {scheme!r}; supported: {', '.join(_SCHEMES)}")
        return _absolute(target.removeprefix("file://")) if scheme == "file" else target
    if Path(target).is_absolute():
        return _absolute(target)
    if ".." in target.split("/"):
        raise StorageError(f"{target}: a key must stay below the storage root; remove '..'")
    root = settings().storage.root
    return f"{url(root if '://' in root else f'file://{root}').rstrip('/')}/{target}"


def source(name: str) -> str:
    """Resolve an input to its URL: unlike an output's key, a relative path starts at the current folder.

    Raises:
        StorageError: the scheme is not supported.
    """
    return url(name) if "://" in name else _absolute(name)


def exists(target: str) -> bool:
    """Tell whether a complete file or object exists at the target."""
    filesystem, path = _open(target)
    return bool(filesystem.isfile(path))


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
        with _local_writer(Path(path)) as stream:
            yield stream
    elif scheme == "memory":
        # fsspec's memory files are visible from their first byte.
        buffer = io.BytesIO()
        yield buffer
        filesystem.pipe_file(path, buffer.getvalue())
    else:
        stream = filesystem.open(path, "wb", autocommit=False)
        try:
            yield stream
        except BaseException:
            stream.discard()
            stream.closed = True  # otherwise its finaliser would upload its buffer
            raise
        stream.close()
        stream.commit()


def delete(target: str) -> None:
    """Delete the object, if it exists."""
    filesystem, path = _open(target)
    if filesystem.isfile(path):
        filesystem.rm_file(path)


def listing(target: str) -> list[str]:
    """List the URLs of all objects below the target, or of all that match if it contains `*`, sorted."""
    filesystem, path = _open(target)
    found = filesystem.glob(path, detail=True) if "*" in path else filesystem.find(path, detail=True)
    urls = (filesystem.unstrip_protocol(name) for name, info in found.items() if info["type"] == "file")
    return sorted(each.replace("memory:///", "memory://") for each in urls)


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
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    status = getattr(error, "status", None)  # aiohttp's answers
    if isinstance(status, int) and status:
        again = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
        return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in again
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in {"aiohttp", "botocore"}


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
        "config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout},
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
def _local_writer(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic within one file system only.
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _open(target: str) -> tuple[Any, str]:
    import fsspec

    place = url(target)
    return cast("tuple[Any, str]", fsspec.core.url_to_fs(place, **options(place)))


def _scheme(target: str) -> str:
    return urlsplit(url(target)).scheme


def _absolute(path: str) -> str:
    return f"file://{Path(path).expanduser().absolute()}"


@contextmanager
def _existing(target: str) -> Iterator[tuple[Any, str]]:
    """Open the target's file system; a missing object is a StorageError."""
    try:
        yield _open(target)
    except FileNotFoundError as error:
        # fsspec raises it for every failed request to a web server; only a 404 means "not found".
        cause = error.__cause__
        if _scheme(target) in {"http", "https"} and cause and getattr(cause, "status", None) != HTTPStatus.NOT_FOUND:
            raise cause from None
        raise StorageError(f"{url(target)} does not exist") from None


@cache
def _has_credentials() -> bool:
    import botocore.session

    return botocore.session.get_session().get_credentials() is not None
