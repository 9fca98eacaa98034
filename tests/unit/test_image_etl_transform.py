from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from flows.image_etl import transform
from tidepool.errors import InputError


def image(color: tuple[int, int, int], size: tuple[int, int] = (8, 6), kind: str = "GIF") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format=kind)
    return buffer.getvalue()


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"\n\n\n\n", []),
        (b"a", [b"a"]),
        (b"a\n\n\n\nbc\n\n\n\n", [b"a", b"bc"]),
        (b"\n\n\n\na\n\n\n\n\n\n\n\nb", [b"a", b"b"]),
        (b"a\n\n\nb", [b"a\n\n\nb"]),
    ],
)
def test_pieces_are_what_is_between_separators(data: bytes, expected: list[bytes]) -> None:
    assert [data[start:end] for start, end in transform.pieces(data)] == expected


def test_a_file_that_was_converted_as_text_is_refused() -> None:
    with pytest.raises(InputError, match=r"^separators of four CR LF: the file was converted as text"):
        transform.pieces(image(RED) + transform.SEPARATOR.replace(b"\n", b"\r\n") + image(BLUE))


@given(st.binary().map(lambda data: data.replace(b"a", b"\n")))
def test_pieces_are_those_of_split(data: bytes) -> None:
    found = [data[start:end] for start, end in transform.pieces(data)]
    assert found == [piece for piece in data.split(transform.SEPARATOR) if piece]


def test_frame_names_sort_in_order() -> None:
    assert transform.frame_name(0, 1) == "frame_00.gif"
    assert transform.frame_name(26, 27) == "frame_26.gif"
    assert transform.frame_name(7, 101) == "frame_007.gif"
    names = [transform.frame_name(index, 1001) for index in range(1001)]
    assert names == sorted(names)


def test_namesakes_have_different_keys() -> None:
    one = transform.default_key("https://host/a/all-images.img?raw=true")
    other = transform.default_key("https://host/b/all-images.img")
    assert one.startswith("image_etl/data/all-images-")
    assert one.endswith(".img")
    assert one != other
    assert transform.default_key("https://host/").startswith("image_etl/data/data-")


def test_a_gif_stays_as_it_is_and_another_image_becomes_one() -> None:
    assert transform.as_gif(image(RED)) == image(RED)
    converted = Image.open(io.BytesIO(transform.as_gif(image(GREEN, kind="PNG"))))
    assert converted.format == "GIF"
    assert converted.convert("RGB").getpixel((0, 0)) == GREEN


@pytest.mark.parametrize("piece", [b"no image at all, but text", image(RED, (200, 200))[:60], b"GIF89a"])
def test_an_undecodable_image_is_shown_by_its_first_bytes(piece: bytes) -> None:
    with pytest.raises(InputError) as caught:
        transform.as_gif(piece)
    assert str(caught.value) == f"not an image: {len(piece)} bytes that begin with {piece[:16]!r}"


def test_the_animation_has_the_frames_in_order() -> None:
    gif = transform.animation([image(RED), image(GREEN), image(BLUE, (16, 12))], 120)
    with Image.open(io.BytesIO(gif)) as animated:
        assert animated.size == (8, 6)
        assert animated.info["loop"] == 0
        colors = []
        for frame in ImageSequence.Iterator(animated):
            assert frame.info["duration"] == 120
            colors.append(frame.convert("RGB").getpixel((4, 3)))
    assert colors == [RED, GREEN, BLUE]


def test_an_animation_of_one_frame() -> None:
    with Image.open(io.BytesIO(transform.animation([image(RED)], 100))) as single:
        assert single.n_frames == 1


def test_a_small_animation_is_its_own_preview() -> None:
    gif = transform.animation([image(RED), image(GREEN)], 100)
    assert transform.preview(gif, len(gif)) == gif


def test_the_preview_of_a_large_animation_fits_and_takes_as_long() -> None:
    noise = [Image.effect_noise((400, 300), 90 + index).convert("P") for index in range(6)]
    frames = []
    for frame in noise:
        buffer = io.BytesIO()
        frame.save(buffer, format="GIF")
        frames.append(buffer.getvalue())
    gif = transform.animation(frames, 100)
    shown = transform.preview(gif, 50_000)
    assert len(shown) <= 50_000 < len(gif)
    with Image.open(io.BytesIO(shown)) as preview:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(preview)]
        assert preview.width in {160, 80}
    assert sum(durations) == 600
    with pytest.raises(ValueError, match="no preview of 6 frames fits into 10 bytes"):
        transform.preview(gif, 10)
