"""Files and objects by URL: written atomically, read, listed, compared by content.

A *target* is a key (`tickets/trials/x.json`, meaning `TIDEPOOL_STORAGE_ROOT/tickets/trials/x.json`), a URL (`file://`,
`s3://`, `memory://`, and to read also `http(s)://`) or a path of this machine. A reader never sees half a file: local
files are written beside the target and renamed, and on an object store the put is the commit.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from contextlib import contextmanager
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from tidepool.errors import StorageError
from tidepool.settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

_SCHEMES = ("file", "s3", "memory", "http", "https")
_CHUNK = 1024 * 1024
_SERVER_ERROR = 500
_TRY_AGAIN = (408, 429)  # request timeout, too many requests


def url(target: str) -> str:
    """The absolute URL of a target.

    Raises:
        StorageError: the scheme is none that tidepool reads, or a key climbs out of the storage root with `..`.
    """
    scheme = urlsplit(target).scheme
    if "://" in target:
        if scheme not in _SCHEMES:
            raise StorageError(f"{target}: scheme {scheme!r} is not read; the schemes are {', '.join(_SCHEMES)}")
        if scheme == "file":
            return _absolute(target.removeprefix("file://"))
        return target
    if Path(target).is_absolute():
        return _absolute(target)
    if ".." in target.split("/"):
        raise StorageError(f"{target}: a key must stay below the storage root, without '..'")
    return f"{root()}/{target}"


def root() -> str:
    """The absolute URL of the storage root, without a slash at its end."""
    place = settings().storage.root
    return url(place if "://" in place else f"file://{place}").rstrip("/")


def source(name: str) -> str:
    """The URL of an input: unlike an output's key, a relative path starts at the current folder.

    Raises:
        StorageError: the scheme is none that tidepool reads.
    """
    return url(name) if "://" in name else _absolute(name)


def exists(target: str) -> bool:
    """Whether there is a file or an object, complete, at the target."""
    filesystem, path = _open(target)
    return bool(filesystem.isfile(path))


def size(target: str) -> int | None:
    """Bytes of the object; None when an HTTP server does not say.

    Raises:
        StorageError: there is none.
    """
    filesystem, path = _open(target)
    with _absent_is_an_error(target):
        return cast("int | None", filesystem.size(path))


def read(target: str, start: int | None = None, end: int | None = None) -> bytes:
    """The whole object, or its bytes from `start` up to but not including `end`.

    Raises:
        StorageError: there is none.
    """
    filesystem, path = _open(target)
    with _absent_is_an_error(target):
        # One request: a stream would fail when the object is replaced between two of its requests.
        return cast("bytes", filesystem.cat_file(path, start=start, end=end))


@contextmanager
def reader(target: str) -> Iterator[IO[bytes]]:
    """A stream of the object's bytes.

    Raises:
        StorageError: there is none.
    """
    filesystem, path = _open(target)
    with _absent_is_an_error(target):
        stream = filesystem.open(path, "rb")
    with stream:
        yield cast("IO[bytes]", stream)


def write(target: str, data: bytes) -> str:
    """Puts the object at the target, atomically, in place of what was there.

    Returns:
        The URL.
    """
    with writer(target) as stream:
        stream.write(data)
    return url(target)


def create(target: str, data: bytes) -> str:
    """Like `write`, but never puts other content in the place of an object that is there already.

    Returns:
        The URL. Writing the same bytes again is no error: a re-run of a run produces the same files.

    Raises:
        StorageError: there is an object with other content.
    """
    if exists(target):
        if content_hash(target) != _digest(io.BytesIO(data)):
            raise StorageError(
                f"{url(target)} exists with other content and is not overwritten; name another destination"
            )
        return url(target)
    return write(target, data)


@contextmanager
def writer(target: str) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the object when the block ends; nothing is left when the block raises."""
    filesystem, path = _open(target)
    if _scheme(target) == "file":
        with _local_writer(Path(path)) as stream:
            yield stream
        return
    if _scheme(target) == "memory":
        # fsspec's memory files are visible from their first byte.
        buffer = io.BytesIO()
        yield buffer
        filesystem.pipe_file(path, buffer.getvalue())
        return
    stream = filesystem.open(path, "wb", autocommit=False)
    try:
        yield cast("IO[bytes]", stream)
    except BaseException:
        stream.discard()
        stream.closed = True  # or its finaliser would upload what it still buffers
        raise
    stream.close()
    stream.commit()


def delete(target: str) -> None:
    """Removes the object; no error when there is none."""
    filesystem, path = _open(target)
    if filesystem.isfile(path):
        filesystem.rm_file(path)


def listing(target: str) -> list[str]:
    """The URLs of all objects below the target, or of all that match when it holds `*`, sorted."""
    filesystem, path = _open(target)
    found = filesystem.glob(path, detail=True) if "*" in path else filesystem.find(path, detail=True)
    scheme = _scheme(target)
    return sorted(_with_scheme(scheme, name) for name, info in found.items() if info["type"] == "file")


def content_hash(target: str) -> str:
    """The content of the object as `sha256:<hex>`, whatever store it is in.

    Raises:
        StorageError: there is none.
    """
    with reader(target) as stream:
        return _digest(stream)


def put_frame(target: str, frame: pd.DataFrame) -> str:
    """Writes a table as Parquet: the way to hand data to a task, by reference.

    Returns:
        The URL, to pass to the task in the place of the table.
    """
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return write(target, buffer.getvalue())


def get_frame(target: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Reads a Parquet table, or only some of its columns (which is all that is then transferred).

    Raises:
        StorageError: there is none.
    """
    import pandas as pd

    with reader(target) as stream:
        return pd.read_parquet(stream, columns=list(columns) if columns is not None else None)


def is_transient(error: object) -> bool:
    """Whether an error is one of input or output that may be gone when the same is tried again: the network, the store.

    What is absent, forbidden or not what it must be stays so; nor is any other kind of error one of input or output.
    """
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    status = getattr(error, "status", None)  # aiohttp's answers
    if isinstance(status, int) and status:
        return status >= _SERVER_ERROR or status in _TRY_AGAIN
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in {"aiohttp", "botocore"}


def retry_transient_errors(_task: Task[..., Any], _task_run: TaskRun, state: State[Any]) -> bool:
    """Retry a task after a transient error of input or output: for `@task(retry_condition_fn=…)`."""
    return is_transient(state.data)


def options(target: str) -> dict[str, Any]:
    """What fsspec needs to open the target, for libraries that open URLs themselves (`storage_options=`)."""
    if _scheme(target) != "s3":
        return {}
    timeout = settings().storage.timeout_seconds
    return {
        "anon": settings().storage.anonymous or not _has_credentials(),
        # Another process may write between two calls: a cached listing would be wrong.
        "use_listings_cache": False,
        "config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout},
    }


@contextmanager
def _local_writer(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is only atomic within one file system.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _share(Path(name))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _share(path: Path) -> None:
    """Gives a temporary file, which only its owner may read, the permissions that an ordinary new file has."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _open(target: str) -> tuple[Any, str]:
    import fsspec

    place = url(target)
    filesystem, path = fsspec.core.url_to_fs(place, **options(place))
    return filesystem, path


def _scheme(target: str) -> str:
    return urlsplit(url(target)).scheme


def _with_scheme(scheme: str, path: str) -> str:
    if scheme == "file":
        return _absolute(path)
    return path if "://" in path else f"{scheme}://{path.lstrip('/')}"


def _absolute(path: str) -> str:
    return f"file://{Path(path).expanduser().absolute()}"


@contextmanager
def _absent_is_an_error(target: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        # fsspec says "not found" whatever kept it from a web server's answer; only a 404 means that.
        cause = error.__cause__
        if _scheme(target) in {"http", "https"} and cause and getattr(cause, "status", None) != HTTPStatus.NOT_FOUND:
            raise cause from None
        raise StorageError(f"{url(target)} does not exist") from None


@cache
def _has_credentials() -> bool:
    import botocore.session

    return botocore.session.get_session().get_credentials() is not None
