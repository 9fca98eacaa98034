"""Finding frames in raw data, decoding them, and encoding an animated GIF of them. Pure functions."""

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
_CONVERTED = SEPARATOR.replace(b"\n", b"\r\n")
# The widths (pixels) that a preview tries, and the steps in which it then leaves frames out.
_PREVIEW_WIDTHS = (160, 80)
_PREVIEW_STEPS = (1, 2, 3, 4, 6, 9, 18, 36, 72)
_FIRST_BYTES = 16


def default_key(data_url: str) -> str:
    """Derive the store's key for the data of a URL: its file name, and part of the URL's hash to avoid collisions."""
    name = PurePosixPath(urlsplit(data_url).path)
    digest = hashlib.sha256(data_url.encode()).hexdigest()[:8]
    return f"image_etl/data/{name.stem or 'data'}-{digest}{name.suffix}"


def pieces(data: bytes) -> list[tuple[int, int]]:
    """Find the pieces between separators of four newline bytes, as (start, end); empty pieces are dropped.

    Raises:
        InputError: the separators are four CR LF, as in a file that was converted as text, which damages images.
    """
    if SEPARATOR not in data and _CONVERTED in data:
        raise InputError("separators of four CR LF: the file was converted as text; copy it again as binary data")
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
    """Name the file of a frame: `frame_00.gif`, with at least two digits and enough to sort `count` frames."""
    return f"frame_{index:0{max(2, len(str(count - 1)))}}.gif"


def as_gif(piece: bytes) -> bytes:
    """Convert an image to GIF; one that is a GIF already is returned unchanged.

    Raises:
        InputError: it cannot be decoded completely; shows its first bytes.
    """
    try:
        image = _decoded(piece)
    except (
        OSError,
        SyntaxError,
        ValueError,
    ) as error:  # what Pillow raises for data that is not an image, or is truncated
        raise InputError(f"not an image: {len(piece)} bytes that begin with {piece[:_FIRST_BYTES]!r}") from error
    return piece if image.format == "GIF" else _encoded([image], duration_ms=0)


def animation(frames: Iterable[bytes], duration_ms: int) -> bytes:
    """Encode the frames, in order, as one animated GIF that loops indefinitely.

    A frame that equals the previous one is not stored again: the previous one is shown for longer.

    Args:
        frames: At least one image; all are fitted into the size of the first.
        duration_ms: Duration of each, milliseconds; GIF stores hundredths of a second.
    """
    return _encoded(_fitted(map(_decoded, frames)), duration_ms)


def preview(gif: bytes, limit_bytes: int) -> bytes:
    """Return the animation if it is small enough, else a smaller one of the same length, if need be with fewer frames.

    Args:
        gif: An animated GIF.
        limit_bytes: Maximum size of the preview.

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
