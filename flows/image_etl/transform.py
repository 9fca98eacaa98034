"""Frames: where they are in the data, whether they are images, and the animated GIF of them."""

from __future__ import annotations

import hashlib
import io
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tidepool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from PIL.Image import Image

SEPARATOR = b"\n\n\n\n"
# The widths (pixels) that a preview tries, and the steps in which it then leaves frames out.
_PREVIEW_WIDTHS = (160, 80)
_PREVIEW_STEPS = (1, 2, 3, 4, 6, 9, 18, 36, 72)
_FIRST_BYTES = 16


def default_key(data_url: str) -> str:
    """The key that data of this URL is kept under: its file name, and a part of the URL's hash against namesakes."""
    name = PurePosixPath(urlsplit(data_url).path)
    digest = hashlib.sha256(data_url.encode()).hexdigest()[:8]
    return f"image_etl/data/{name.stem or 'data'}-{digest}{name.suffix}"


def pieces(data: bytes) -> list[tuple[int, int]]:
    """Where the pieces between separators of four newline bytes begin and end; empty pieces are dropped."""
    found = []
    start = 0
    while start <= len(data):
        end = data.find(SEPARATOR, start)
        end = len(data) if end < 0 else end
        if end > start:
            found.append((start, end))
        start = end + len(SEPARATOR)
    return found


def frame_name(index: int, count: int) -> str:
    """The file name of a frame: `frame_00.gif`, with as many digits as sort `count` frames right, at least two."""
    return f"frame_{index:0{max(2, len(str(count - 1)))}}.gif"


def as_gif(piece: bytes) -> bytes:
    """An image as GIF: the same bytes when it is one, else converted.

    Raises:
        InputError: it is no image that can be decoded to its end; shows its first bytes.
    """
    try:
        image = _decoded(piece)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for data that is no image, or is cut off
        raise InputError(f"not an image: {len(piece)} bytes that begin with {piece[:_FIRST_BYTES]!r}") from error
    return piece if image.format == "GIF" else _encoded([image], duration_ms=0)


def animation(frames: Iterable[bytes], duration_ms: int) -> bytes:
    """One animated GIF of the frames in order, repeated for ever.

    A frame that equals the one before it is not stored again: that one is shown for longer.

    Args:
        frames: At least one image; all are fitted into the size of the first.
        duration_ms: How long each is shown, milliseconds; GIF counts in hundredths of a second.
    """
    return _encoded(_fitted(map(_decoded, frames)), duration_ms)


def preview(gif: bytes, limit_bytes: int) -> bytes:
    """The animation itself if it is small enough, else one that is smaller and then has fewer frames, as long to watch.

    Args:
        gif: An animated GIF.
        limit_bytes: How large the preview may be.

    Raises:
        ValueError: not even the smallest preview is small enough.
    """
    from PIL import Image, ImageSequence

    if len(gif) <= limit_bytes:
        return gif
    with Image.open(io.BytesIO(gif)) as animated:
        duration_ms = int(animated.info.get("duration", 0))
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(animated)]
    for width in _PREVIEW_WIDTHS:
        small = [_narrowed(frame, width) for frame in frames]
        for step in _PREVIEW_STEPS:
            candidate = _encoded(small[::step], duration_ms * step)
            if len(candidate) <= limit_bytes:
                return candidate
    raise ValueError(f"no preview of {len(frames)} frames fits into {limit_bytes} bytes")


def _narrowed(frame: Image, width: int) -> Image:
    from PIL.Image import Dither, Quantize

    narrow = frame.copy()
    narrow.thumbnail((width, width))
    # Few colours and no dithering compress best, and this method is a tenth of the work of the best-looking one.
    return narrow.quantize(colors=64, method=Quantize.FASTOCTREE, dither=Dither.NONE)


def _decoded(data: bytes) -> Image:
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _fitted(images: Iterable[Image]) -> Iterator[Image]:
    from PIL import ImageOps

    size = None
    for image in images:
        size = size or image.size
        yield image if image.size == size else ImageOps.pad(image.convert("RGB"), size)


def _encoded(images: Iterable[Image] | Sequence[Image], duration_ms: int) -> bytes:
    first, *others = images
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=duration_ms, loop=0)
    return buffer.getvalue()
