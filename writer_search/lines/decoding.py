"""Decodes one line image into ink, by itself: paper, polarity and outside are the line's own."""

from __future__ import annotations

import io
import math
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from writer_search.common.text import one_line
from writer_search.lines.kinds import describe_content
from writer_search.lines.outside import Shape, find_outside, is_solid

VERSION = 5
INK_DEVIATION = 40.0  # grey levels that one deviation of a line's ink takes in the strip
MAX_ASPECT = 200.0  # longer side / shorter side; a real line stays below 60
EXIF_ORIENTATION, BY_A_QUARTER = 0x0112, (5, 6, 7, 8)
# What transparency leaves of a line that was cut out; ink on a transparent ground is in pieces.
VISIBLE = Shape(area=0.03, filled=0.93, single=0.85, thick=0.25)
INK_ALONE = 8.0  # grey levels that what is visible deviates, where it is ink of one colour
LEAST_OTHERS = 0.1  # of a picture is a line, and not its outside
MUCH_LESS = 0.25  # of all values' range is the line's
BIG = 16_000_000  # pixels; such pictures are decoded one at a time, to save memory
_big_pictures = threading.Lock()


class BrokenImageError(Exception):
    """An image that cannot be used, and why."""


@dataclass(frozen=True)
class DecodedLine:
    """What one image became.

    ink (width, line_height), uint8, 0 is paper.
    size: width and height of the upright picture, in its own pixels.
    is_light: the ink is lighter than its paper.
    version: the first version of this decoding that gives this ink: 1 knew no outside, took the
    geometry of a header, and reduced big pictures less; 2 left an outline of outsides in JPEGs; 3
    let an outside of 16 bits take the grey levels of a line of 12, and reduced big JPEGs twice; 4
    missed outsides at a corner alone, and white ones beside which a JPEG has noise.
    """

    ink: NDArray[np.uint8]
    size: tuple[int, int]
    is_light: bool
    version: int


def decode_line(content: bytes, line_height: int) -> DecodedLine:
    """Decode an image file into ink.

    Grey, resized to the height with its aspect kept. What lies outside of a polygon or in a frame
    gets the line's own paper colour. The paper is the median grey; ink is the distance from it
    towards the darker side (towards the lighter one where that has more contrast), divided by its
    own deviation, so that neither paper nor ink colour is a label.
    Raises BrokenImageError, and MemoryError, which is no property of the image.
    """
    try:
        grey, size, version = _read_grey(content, line_height)
    except (BrokenImageError, MemoryError):
        raise
    except UnidentifiedImageError:  # its message has but an object's address
        raise BrokenImageError(describe_content(content)) from None
    except Exception as error:  # decoders of hostile files raise nearly anything
        raise BrokenImageError(one_line(f"{type(error).__name__}: {error}", 150)) from None
    ink = _median(grey) - grey.astype(np.float32)
    is_light = bool((ink.clip(max=0) ** 2).sum() > 1.5 * (ink.clip(min=0) ** 2).sum())
    if is_light:
        ink = -ink
    ink = ink.clip(min=0)
    deviation = float(ink.std())
    if deviation < 1.0:
        raise BrokenImageError("blank: no ink")
    levels = (ink * (INK_DEVIATION / deviation)).clip(max=255).round().astype(np.uint8)
    return DecodedLine(levels.T, size, is_light, version)


def _median(grey: NDArray[np.uint8]) -> int:
    counts = np.bincount(grey.ravel(), minlength=256)
    return int(np.searchsorted(np.cumsum(counts), grey.size / 2))


def _read_grey(content: bytes, line_height: int) -> tuple[NDArray[np.uint8], tuple[int, int], int]:
    """Read (line_height, width) grey, the picture's own size, and the decoding's version."""
    if not content:
        raise BrokenImageError("empty file")
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise BrokenImageError(f"decompression bomb: {width} x {height} pixels")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BrokenImageError(f"{width} x {height} pixels is no line of text")
        pictures = _count_pictures(image)
        if pictures > 1 and image.format != "MPO":  # a camera's JPEG with a preview behind it
            raise BrokenImageError(f"holds {pictures} pictures: save each in a file of its own")
        if width * height > BIG:
            with _big_pictures:
                return _read_upright(image, line_height)
        return _read_upright(image, line_height)


def _read_upright(
    image: Image.Image, line_height: int
) -> tuple[NDArray[np.uint8], tuple[int, int], int]:
    orientation, stored = _orientation(image), image.size
    is_turned = orientation in BY_A_QUARTER
    width, height = stored[::-1] if is_turned else stored
    if image.format in ("JPEG", "MPO"):  # decodes no more than needed
        wanted = (max(1, width * line_height // height), line_height)
        image.draft("L", wanted[::-1] if is_turned else wanted)
    is_whole = image.size == stored
    image.load()
    if orientation in range(2, 9):
        ImageOps.exif_transpose(image, in_place=True)
    if is_whole:  # Pillow turns TIFFs by itself, some of its versions when it opens them
        width, height = image.size
    step = image.height // (4 * line_height) if image.width * image.height > BIG else 0
    grey, version = _to_grey(_reduced(image, step) if step > 1 else image)
    wanted = (max(1, round(width * line_height / height)), line_height)
    resized = np.asarray(grey.resize(wanted, Image.Resampling.BILINEAR))
    was_turned = orientation > 8 or (is_turned and image.format == "TIFF")  # by a header alone
    was_reduced_twice = width * height > BIG and height // (4 * line_height) > 1 and not is_whole
    of_geometry = 4 if was_reduced_twice else 2 if was_turned or step > 1 else 1
    return resized, (width, height), max(version, of_geometry)


def _orientation(image: Image.Image) -> int:
    """Read how a camera was held: 1 to 8, or any other number, which means nothing."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # a damaged note is no damage to the picture
        return 1
    return orientation if isinstance(orientation, int) else 1


def _count_pictures(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # what follows the first picture is damaged
        return 1


def _reduced(image: Image.Image, step: int) -> Image.Image:
    """Make a big picture smaller by a whole number, before what needs several bytes a pixel."""
    if not image.mode.startswith("I;16"):
        if image.mode in ("1", "P"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        return image.reduce(step)
    values = np.asarray(image)
    rows, columns = (length // step for length in values.shape)
    blocks = values[: rows * step, : columns * step].reshape(rows, step, columns, step)
    return Image.fromarray(blocks.mean((1, 3), dtype=np.float32))


def _to_grey(image: Image.Image) -> tuple[Image.Image, int]:
    """Make a picture grey; what lies outside of the line becomes paper. Also gives the version."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)
        of_line = _without_extreme(values)
        if of_line is not None and (line := _without_outside(_spread(of_line))) is not None:
            return line[0], max(4, line[1])
        grey = _spread(values)
    elif image.has_transparency_data:
        seen = image.convert("RGBA")
        grey, is_repainted = _on_paper(seen)
        if is_repainted:
            return grey, 2
    else:
        grey = image.convert("L")
    line = _without_outside(grey)
    return (grey, 1) if line is None else line


def _without_outside(grey: Image.Image) -> tuple[Image.Image, int] | None:
    """Give what lies outside of a line the grey of its paper; None where nothing does.

    Also gives the first version of the decoding that finds it.
    """
    values = np.asarray(grey)
    outside = find_outside(values)
    if outside is None:
        return None
    painted = values.copy()
    painted[outside.mask] = _median(values[~outside.mask])
    return Image.fromarray(painted), outside.version


def _without_extreme(values: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Clip one extreme value that is far from all others, as white of 16 bits is from 12.

    What stays has nearly all of the range then. None where no extreme is so far away.
    """
    whole = float(np.ptp(values))
    for extreme in (values.max(), values.min()):
        others = values[values != extreme]
        if others.size > LEAST_OTHERS * values.size:
            low, high = np.percentile(others, (0.1, 99.9)).tolist()  # a few are mixed with it
            margin = 0.1 * (high - low)
            if 0 < high - low + 2 * margin < MUCH_LESS * whole < math.inf:
                return values.clip(low - margin, high + margin)
    return None


def _spread(values: NDArray[np.float32]) -> Image.Image:
    """Spread a picture's own range over 256 greys: Pillow would clip 16 bits at 255."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BrokenImageError("holds values that are no numbers")
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-6))).astype(np.uint8))


def _on_paper(seen: Image.Image) -> tuple[Image.Image, bool]:
    """Put an RGBA picture on paper: its own where a line was cut out, else white or black.

    Also: is that another picture than on white?
    """
    alpha, grey = np.asarray(seen.getchannel("A")), np.asarray(seen.convert("L"))
    visible = alpha > 127
    paper, is_cut_out = 255, False
    if alpha.min() < 255 and visible.any():
        colour = _median(grey[visible])
        is_cut_out = is_solid(visible, VISIBLE) and float(grey[visible].std()) > INK_ALONE
        if is_cut_out:
            paper = colour
        elif colour > 127:  # light ink on nothing, as vector programs save it
            paper = 0
    ground = Image.new("RGBA", seen.size, (paper, paper, paper))
    return Image.alpha_composite(ground, seen).convert("L"), is_cut_out or paper == 0
