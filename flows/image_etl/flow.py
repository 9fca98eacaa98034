"""image-etl: write the frames of a raw image file, one by one and as one animated GIF.

Produces: `image_etl/<run id>/frame_00.gif` … and `image_etl/<run id>/<gif_name>`; the downloaded data stays under
`image_etl/data/` for the next run.
Deployment: `image-etl`, nightly (prefect.yaml).
Idempotent: data that is already complete in the store is not downloaded again, and each run writes below its own id. A
retry repeats no finished frame.
Runbook: docs/runbooks/image-etl.md
"""

from __future__ import annotations

import base64
import hashlib
from typing import Annotated, Any

from prefect import flow, get_run_logger, task, unmapped
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFutureList
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from flows.image_etl import transform
from tidepool import report, storage
from tidepool.compute import dask_runner, use_workers
from tidepool.errors import InputError

NAME = "image-etl"

_COPY_BYTES = 1024 * 1024
_BAD_SHOWN = 20
# Base64 makes it a third larger, and the page also contains text.
_INLINE_BYTES = report.LIMIT_BYTES * 3 // 4 - 4096


@flow(
    name=NAME,
    task_runner=dask_runner("small"),
    flow_run_name=report.run_name("{gif_name} of {data_url}"),
    timeout_seconds=3600,
)
def image_etl(
    data_url: Annotated[
        str, Field(min_length=1)
    ] = "https://github.com/cicdw/image-data/blob/master/all-images.img?raw=true",
    data_file: Annotated[str | None, Field(min_length=1)] = None,
    gif_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*\.gif$")] = "clip.gif",
    n_workers: Annotated[int, Field(ge=1, le=64)] = 4,
    frame_duration_ms: Annotated[int, Field(ge=20, le=60_000)] = 100,
    *,
    allow_bad_frames: bool = False,
) -> dict[str, Any]:
    """Turn a file of frames, separated by four newline bytes, into one animated GIF.

    Args:
        data_url: The raw data: a path, which starts at the current folder, or a file, s3 or http(s) URL.
        data_file: Key of the data under the storage root, such as image_etl/raw.img, or a file or s3 URL. Empty:
            derived from data_url.
        gif_name: File name of the animation: letters, digits, dots, hyphens and underscores, ending in .gif.
        n_workers: Dask workers that write frames, 1 to 64.
        frame_duration_ms: Duration of a frame in milliseconds, 20 to 60,000; GIF stores hundredths of a second.
        allow_bad_frames: Leave out frames that are not images. Off: one bad frame fails the run.

    Returns:
        `gif` (URL), its `bytes`, the number of its `frames`, and the indexes of the `bad_frames` left out.
    """
    storage.keep_results()
    use_workers(n_workers)
    data = storage.url(data_file or transform.default_key(storage.source(data_url)))
    folder = storage.url(f"image_etl/{flow_run.id}")
    download(data_url, data)
    version, pieces = split(data)
    names = [transform.frame_name(index, len(pieces)) for index in range(len(pieces))]
    fixed = [unmapped(each) for each in (data, version, folder)]
    writing = write_frame.map(list(range(len(pieces))), pieces, names, *fixed)
    frames, bad = _sorted_out(writing, allow_bad=allow_bad_frames)
    gif = combine(frames, f"{folder}/{gif_name}", frame_duration_ms)
    return publish(gif, frames, bad)


@task(
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=storage.retry_transient_errors,
    task_run_name=report.task_name("download {data_url}"),
)
def download(data_url: str, data: str) -> State[str] | None:
    """Copy the raw data into the store, unless it is already there and complete.

    Args:
        data_url: Source of the data.
        data: URL in the store.

    Returns:
        Nothing, or the state that shows the download as skipped.
    """
    source = storage.source(data_url)
    present = storage.size(data) if storage.exists(data) else None
    expected = _length(source, needed=present is None)
    if present is not None and expected in {None, present}:
        return Completed(name="Cached", message=f"already present: {data}, {present} bytes", data=data)
    if present is not None:
        get_run_logger().warning("%s has %s bytes, its source %s: downloading it again", data, present, expected)
    with storage.reader(source) as stream, storage.writer(data) as target:
        copied = 0
        while block := stream.read(_COPY_BYTES):
            target.write(block)
            copied += len(block)
        if expected is not None and copied != expected:
            raise ConnectionError(f"{source}: received {copied} of {expected} bytes")
    get_run_logger().info("Downloaded %s bytes from %s to %s", copied, source, data)
    return None


@task(retries=2, retry_delay_seconds=2, retry_condition_fn=storage.retry_transient_errors)
def split(data: str) -> tuple[str, list[tuple[int, int]]]:
    """Find the frames in the raw data.

    Returns:
        The data's hash; the first byte of each frame and the one after its last.
    """
    content = storage.read(data)
    try:
        pieces = transform.pieces(content)
    except InputError as error:
        raise InputError(f"{data}: {error}") from None
    if not pieces:
        raise InputError(f"{data}: no frame in {storage.size(data)} bytes; frames are separated by four newline bytes")
    get_run_logger().info("%s frames in %s", len(pieces), data)
    return hashlib.sha256(content).hexdigest(), pieces


@task(
    persist_result=True,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=storage.retry_transient_errors,
    task_run_name="{name}",
)
def write_frame(
    index: int,
    piece: tuple[int, int],
    name: str,
    data: str,
    version: str,  # noqa: ARG001 - other data is another task run for the cache
    folder: str,
) -> str:
    """Write one frame as a GIF.

    Args:
        index: Number of the frame, from 0.
        piece: Its position in the data (start and end, bytes): frames are passed by reference.
        name: File name of the frame.
        data: URL of the raw data.
        version: Hash of the raw data, which another run may replace.
        folder: URL of the run's folder.

    Returns:
        The URL of the frame.

    Raises:
        InputError: the piece is not an image.
    """
    start, end = piece
    try:
        gif = transform.as_gif(storage.read(data, start, end))
    except InputError as error:
        raise InputError(f"{data}: frame {index} (bytes {start} to {end}) is {error}") from None
    return storage.write(f"{folder}/{name}", gif)


@task(retries=2, retry_delay_seconds=2, retry_condition_fn=storage.retry_transient_errors)
def combine(frames: list[str], gif: str, frame_duration_ms: int) -> str:
    """Combine the frames, in their order, into one animated GIF.

    Returns:
        Its URL.
    """
    return storage.write(gif, transform.animation(map(storage.read, frames), frame_duration_ms))


@task
def publish(gif: str, frames: list[str], bad: dict[int, str]) -> dict[str, Any]:
    """Publish the animation and the list of frames.

    Args:
        gif: URL of the animation.
        frames: URLs of its frames.
        bad: The reason why a frame was left out, by index.

    Returns:
        The flow's summary.
    """
    data = storage.read(gif)
    name = gif.rpartition("/")[2]
    shown = transform.preview(data, _INLINE_BYTES)
    left_out = f", {len(bad)} bad left out" if bad else ""
    headline = f"{name}: {len(frames)} frames{left_out}, {len(data):,} bytes"
    page = [
        f"# {headline}",
        f"![{name}](data:image/gif;base64,{base64.b64encode(shown).decode()})",
        "" if shown == data else "A small preview; the full animation is in the file.",
        f"Animation: `{gif}`",
        f"Frames: `{frames[0]}` to `{frames[-1].rpartition('/')[2]}`",
        *(f"- Left out: {reason}" for reason in list(bad.values())[:_BAD_SHOWN]),
    ]
    report.page(f"{NAME}-clip", "\n\n".join(page), headline)
    report.table(
        f"{NAME}-frames",
        [{"frame": url.rpartition("/")[2], "size": report.size(storage.size(url) or 0), "url": url} for url in frames],
        headline,
    )
    report.outputs(NAME, [gif, *frames])
    return {"gif": gif, "bytes": len(data), "frames": len(frames), "bad_frames": sorted(bad)}


def _length(source: str, *, needed: bool) -> int | None:
    """Return the size that the source reports (bytes); None if unknown, or unreachable and not needed."""
    try:
        return storage.size(source)
    except Exception as error:
        if needed or not storage.is_transient(error):
            raise
        get_run_logger().warning("size of %s unknown (%s); using the data that is already in the store", source, error)
        return None


def _sorted_out(futures: PrefectFutureList[str], *, allow_bad: bool) -> tuple[list[str], dict[int, str]]:
    """Return the URLs of the good frames, and the reasons why the others are bad, by index.

    Raises:
        InputError: bad frames are not allowed and there are some, or all are bad. No frame is then left in the store.
    """
    progress = report.Progress(f"{NAME}-progress", len(futures), "Frames written")
    good: list[str] = []
    bad: dict[int, str] = {}
    for index, future in enumerate(futures):
        result: Any = future.result(raise_on_failure=False)
        if isinstance(result, InputError):
            bad[index] = str(result)
        elif isinstance(result, BaseException):
            raise result
        else:
            good.append(result)
        progress.update(index + 1)
    if not bad or (allow_bad and good):
        return good, bad
    for frame in good:
        storage.delete(frame)
    advice = "" if allow_bad else "; allow_bad_frames=true leaves bad frames out"
    raise InputError(f"{len(bad)} of {len(futures)} frames are bad, the first: {next(iter(bad.values()))}{advice}")
