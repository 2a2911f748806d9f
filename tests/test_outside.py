"""What lies outside of a line is nothing: polygons, frames and transparency, against plain lines.

Every comparison is of strips: a line cut out, against the same line on its own paper colour.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.outside import painted, polygon
from data import find_lines
from writer_search.demo import generator, make_line, sample_hand, sample_sheet
from writer_search.lines.decoding import DecodedLine, decode_line
from writer_search.lines.outside import find_outside

Grey = NDArray[np.uint8]
Mask = NDArray[np.bool_]
HEIGHT = 64
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG": ("PNG", {}),
    "TIFF": ("TIFF", {}),
    "JPEG": ("JPEG", {"quality": 75}),
    "WebP": ("WEBP", {"quality": 80}),
}


def written_line(seed: int) -> Grey:
    """A line of synthetic handwriting on textured paper: (96, width), paper about 190."""
    rng = generator(seed, 17)
    drawn = make_line(sample_hand(rng), sample_sheet(rng), 96, rng).convert("L")
    grey = np.asarray(drawn).astype(float)
    return (40 + 150 * np.minimum(1, (grey - grey.min()) / (np.median(grey) - grey.min()))
            + rng.normal(0, 2, grey.shape)).astype(np.uint8)  # fmt: skip


def encoded(image: Grey | Image.Image, kind: str = "PNG") -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    name, options = FORMATS[kind]
    image.save(file, name, **options)
    return file.getvalue()


def read(image: Grey | Image.Image, kind: str = "PNG") -> DecodedLine:
    return decode_line(encoded(image, kind), HEIGHT)


def on_its_paper(grey: Grey, inside: Mask) -> Grey:
    return np.where(inside, grey, np.median(grey[inside])).astype(np.uint8)


def difference(one: DecodedLine, other: DecodedLine) -> float:
    """Mean difference of two strips in grey levels."""
    assert one.ink.shape == other.ink.shape
    return float(np.abs(one.ink.astype(float) - other.ink.astype(float)).mean())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("outside", ["black", "white", "transparent"])
def test_a_polygon_is_read_as_if_on_its_own_paper(outside: str, kind: str) -> None:
    if (outside, kind) == ("transparent", "JPEG"):
        pytest.skip("JPEG has no transparency")
    for seed in range(8):
        grey = written_line(seed)
        for kept, slope in ((0.5, 0.0), (0.65, 0.1), (0.8, 0.0), (0.95, 0.0)):
            inside = polygon(grey.shape, kept, seed, slope)
            plain = read(on_its_paper(grey, inside), kind)
            cut = read(painted(grey, inside, outside), kind)
            assert difference(cut, plain) < 2, (seed, kept)
            assert not cut.is_light
            assert (cut.version, plain.version) == (2 if outside == "transparent" else 3, 1)


@pytest.mark.parametrize("light_ink", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("outside", [0, 255])
@pytest.mark.parametrize("width", [3, 12, 40])
def test_a_frame_is_nothing(width: int, outside: int, kind: str, light_ink: bool) -> None:
    for seed in range(4):
        grey = 255 - written_line(seed) if light_ink else written_line(seed)
        framed = np.pad(grey, width, constant_values=outside)
        plain = read(np.pad(grey, width, constant_values=int(np.median(grey))), kind)
        assert difference(read(framed, kind), plain) < (2 if kind == "PNG" else 3)
        assert read(framed, kind).is_light == light_ink


def test_a_black_polygon_within_a_white_frame_is_nothing() -> None:
    grey = written_line(3)
    inside = polygon(grey.shape, 0.8, 3)
    cut = np.pad(np.where(inside, grey, 0).astype(np.uint8), 20, constant_values=255)
    plain = np.pad(on_its_paper(grey, inside), 20, constant_values=int(np.median(grey[inside])))
    assert difference(read(cut), read(plain)) < 2


@pytest.mark.parametrize("outside", [0, 255])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_polygon_that_leaves_out_a_corner_alone(kind: str, outside: int) -> None:
    """Lines that are cut out end as the column does: their right end may be oblique."""
    for seed in range(4):
        grey = written_line(seed).clip(20, 235)
        x, y = np.arange(grey.shape[1])[None, :], np.arange(grey.shape[0])[:, None]
        inside = x < grey.shape[1] - 2 - y / 4
        plain = read(on_its_paper(grey, inside), kind)
        cut = read(np.where(inside, grey, outside).astype(np.uint8), kind)
        assert difference(cut, plain) < 1, seed
        assert cut.version == 5, "an earlier version read it otherwise"


def test_noise_of_jpeg_beside_white_is_no_paper_that_fades() -> None:
    for seed in range(4):
        grey = written_line(seed) - 8
        inside = polygon(grey.shape, 0.8, seed, 0.15)
        noisy = np.where(inside, grey, 255).astype(np.float32)
        beside = inside & ~(inside & np.roll(inside, 5, 0) & np.roll(inside, -5, 0))
        noisy[beside & (np.random.default_rng(seed).random(grey.shape) < 0.4)] = 226
        cut = read(noisy.astype(np.uint8))
        assert (cut.version, cut.is_light) == (5, False), seed
        assert difference(cut, read(on_its_paper(grey, inside))) < 6


def test_a_soft_edge_leaves_no_outline() -> None:
    """Exporters that turn a line smooth the edge of its polygon."""
    for seed in range(4):
        grey = written_line(seed)
        alpha = polygon(grey.shape, 0.7, seed) * 255
        soft = np.asarray(Image.fromarray(alpha.astype(np.uint8)).resize((600, 60))) / 255
        small = np.asarray(Image.fromarray(grey).resize((600, 60)))
        paper = np.median(small)
        for outside in (0, 255):
            cut = (soft * small + (1 - soft) * outside).astype(np.uint8)
            plain = (soft * small + (1 - soft) * paper).astype(np.uint8)
            assert difference(read(cut), read(plain)) < 3


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("outside", [0, 65535])
def test_an_outside_takes_no_grey_levels_from_a_line_of_few_bits(outside: int, bits: int) -> None:
    for seed in range(4):
        grey = written_line(seed)
        inside = polygon(grey.shape, 0.8, seed)
        deep = grey.astype(np.uint16) << (bits - 8)
        cut = read(Image.fromarray(np.where(inside, deep, outside).astype(np.uint16)), "TIFF")
        paper = np.median(deep[inside])
        plain = read(Image.fromarray(np.where(inside, deep, paper).astype(np.uint16)), "TIFF")
        assert difference(cut, plain) < 2, seed
        assert cut.version == (3 if bits == 16 or not outside else 4)


@pytest.mark.parametrize("paper", [0, 65535])
def test_strokes_of_few_levels_are_no_line_within_an_outside(paper: int) -> None:
    """Paper clipped at an extreme, and ink that is all alike, as of 12 bits."""
    grey = written_line(5)
    ink = grey < np.median(grey) - 40
    noise = np.random.default_rng(0).integers(0, 3000, grey.shape)
    deep = np.where(ink, abs(paper - 60000) + noise, paper).astype(np.uint16)
    binary = np.where(ink, 255 - paper // 257, paper // 257).astype(np.uint8)
    line = read(Image.fromarray(deep), "TIFF")
    assert line.version == 1
    assert difference(line, read(binary)) < 2


@pytest.mark.parametrize("height", [130, 300])
def test_a_jpeg_that_is_decoded_smaller_leaves_no_outline(height: int) -> None:
    """Its edge is mixed with paper then, more in some rows than in others."""
    for seed in range(6):
        grey = written_line(seed)
        width = grey.shape[1] * height // grey.shape[0]
        grey = np.asarray(Image.fromarray(grey).resize((width, height)))
        inside = polygon(grey.shape, 0.7, seed)
        plain = read(on_its_paper(grey, inside), "JPEG")
        for outside in ("black", "white"):
            assert difference(read(painted(grey, inside, outside), "JPEG"), plain) < 0.8


def test_a_camera_s_picture_is_the_one_before_its_preview() -> None:
    grey = Image.fromarray(written_line(0))
    file = io.BytesIO()
    grey.save(file, "MPO", save_all=True, append_images=[grey.resize((40, 10))])
    with Image.open(io.BytesIO(file.getvalue())) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)  # type: ignore[attr-defined]
    assert decode_line(file.getvalue(), HEIGHT).size == grey.size


def test_big_pictures_are_read_like_small_ones() -> None:
    grey = np.asarray(Image.fromarray(written_line(1)).resize((9000, 1000)))
    inside = polygon(grey.shape, 0.7, 1)
    cut, plain = np.where(inside, grey, 0).astype("u1"), on_its_paper(grey, inside)
    assert difference(read(cut), read(plain)) < 2


def bleached(grey: Grey) -> Grey:
    """Paper at 255, as scanners stretch it; ink keeps its greys."""
    return (grey * (255 / np.percentile(grey, 30))).clip(max=255).astype(np.uint8)


def binary(grey: Grey) -> Grey:
    return np.where(grey < 120, 0, 255).astype(np.uint8)


def cut_by_the_border(grey: Grey) -> Grey:
    """Only the middle of the writing: strokes of pure black that the border cuts."""
    rows = np.flatnonzero((binary(grey) == 0).any(1))
    return binary(grey)[rows[0] + len(rows) // 4 : rows[-1] - len(rows) // 4]


TRAPS = {
    "bleached": bleached,
    "binary": binary,
    "cut by the border": cut_by_the_border,
    "plain": lambda grey: grey,
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("trap", TRAPS)
def test_paper_that_is_constant_up_to_the_border_is_no_outside(
    trap: str, negative: bool, kind: str
) -> None:
    for seed in range(12):
        grey = TRAPS[trap](written_line(seed))
        line = read(255 - grey if negative else grey, kind)
        assert line.version == 1, seed
        assert line.is_light == negative


def test_a_binary_line_within_black_keeps_its_letters() -> None:
    """Strokes that touch the black outside are as black as it."""
    for seed in range(8):
        ink = binary(written_line(seed))
        inside = polygon(ink.shape, 0.8, seed)
        cut = read(np.where(inside, ink, 0).astype(np.uint8))
        plain = read(np.where(inside, ink, 255).astype(np.uint8))
        assert not cut.is_light
        assert difference(cut, plain) < 6
        assert np.corrcoef(cut.ink.ravel(), plain.ink.ravel())[0, 1] > 0.85


@pytest.mark.parametrize("ink", ["black", "white"])
def test_ink_on_transparency_is_ink(ink: str) -> None:
    for seed in range(4):
        grey = written_line(seed)
        image = Image.new("RGBA", grey.shape[::-1], ink)
        image.putalpha(Image.fromarray((190 - np.minimum(grey, 190)).astype(np.uint8)))
        plain = read(np.minimum(grey, 190))
        assert difference(read(image), plain) < 2


def test_a_picture_of_one_colour_has_no_outside() -> None:
    for colour in (0, 255, 128):
        assert find_outside(np.full((40, 300), colour, np.uint8)) is None


def test_real_lines_are_read_as_before_and_cut_ones_like_them(real_lines: Path) -> None:
    lines = find_lines(real_lines)
    for number, line in enumerate(lines[:: len(lines) // 60]):
        content = (real_lines / line.path).read_bytes()
        whole = decode_line(content, HEIGHT)
        assert (whole.version, whole.is_light) == (1, False)
        grey = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        inside = polygon(grey.shape, (0.5, 0.65, 0.8, 0.95)[number % 4], number)
        plain = read(on_its_paper(grey, inside))
        for outside in ("black", "white", "transparent"):
            cut = read(painted(grey, inside, outside))
            assert not cut.is_light
            assert difference(cut, plain) < 5
