"""Draw synthetic handwritten lines: cursive, right to left, one hand per writer.

For demonstrations and tests only: the shapes resemble Arabic letters but spell nothing.
Pixels are those of a line 64 pixels high; other heights are scaled.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

PAGES_PER_SPLIT: Mapping[str, int] = MappingProxyType({"train": 4, "val": 2, "test": 2})
SUPERSAMPLING = 2
SAMPLES_PER_SPAN = 4
MARGIN = 10  # pixels left and right of the text
NOMINAL_HEIGHT = 64

Array = NDArray[np.floating[Any]]


class Letter(NamedTuple):
    """A pen path from the joint at (0, 0), in tooth heights: x grows to the left, y upwards.

    path (points, 2);  y above 1 is ascender, below 0 descender
    dots: the counts to draw from, negative ones below the letter
    """

    path: Array
    dots: tuple[int, ...] = (0,)


def letter(*points: tuple[float, float], dots: tuple[int, ...] = (0,)) -> Letter:
    return Letter(np.array(points), dots)


# Each shape names the Arabic letter it was modelled on. Teeth and stems are the commonest shapes
# of the script, hence their two entries.
MEDIAL = (
    letter((0.3, 0.95), (0.5, 0.1), dots=(1, 2, 3, -1, -2)),  # ba
    letter((0.3, 0.95), (0.5, 0.1), dots=(1, 2, -1, -2)),  # ya
    letter((0.22, 1), (0.3, 2), (0.38, 1), (0.5, 0.1)),  # lam
    letter((0.25, 0.75), (0.42, 0.1), (0.68, 0.7), (0.85, 0.1), (1.1, 0.8), (1.28, 0.1)),  # sin
    letter((0.5, 0.1), (0.75, 0.55), (0.45, 0.95), (0.2, 0.55), (0.5, 0.05), dots=(1, 2)),  # fa
    letter((0.3, 0.35), (0.65, 0.2), (0.55, -0.3), (0.2, -0.2), (0.4, 0.05)),  # mim
    letter((0.2, 0.1), (0.7, 0.8), (1.3, 0.85), (1.4, 0.3), (0.7, 0), (1.2, 0), (1.6, 0.5)),  # sad
    letter((0.05, 0.7), (0.45, 0.95), (0.8, 0.75), (0.3, 0.2), (0.5, 0), dots=(0, 1, -1)),  # jim
    letter((0.3, 0.5), (0.1, 0.9), (0.5, 0.95), (0.6, 0.6), (0.35, 0.1), dots=(0, 1)),  # ayn
    letter((0.3, 0.9), (0.05, 1.3), (-0.5, 1.8), (0.05, 1.35), (0.55, 0.9), (0.65, 0.1)),  # kaf
    letter((0.5, 0.1), (0.65, 0.85), (0.2, 0.7), (0.3, -0.3), (0.75, -0.15), (0.6, 0.1)),  # ha
)
UNJOINED = (
    letter((0.25, 0.1), (0.38, 1), (0.38, 2)),  # alif
    letter((0.25, 0.1), (0.36, 1), (0.34, 2)),  # alif
    letter((0.25, 0.15), (0.45, -0.1), (0.6, -0.5), (1, -0.85), dots=(0, 1)),  # ra
    letter((0.4, 0.1), (0.3, 0.7), (0.65, 0.75), (0.7, 0.2), (0.8, -0.35), (1.2, -0.8)),  # waw
    letter((0.15, 0.9), (0.45, 0.65), (0.6, 0.1), (1, 0.05), dots=(0, 1)),  # dal
)
FINAL = (
    UNJOINED[2],  # ra
    letter((0.2, 0.1), (0.3, -0.5), (0.75, -1), (1.35, -0.7), (1.5, 0.3), dots=(1,)),  # nun
    letter((0.4, 0.45), (0.3, -0.1), (0.75, -0.4), (0.6, -0.95), (-0.5, -0.85), dots=(0, -2)),  # ya
    letter((0.05, 0.7), (0.6, 0.8), (0.2, 0.2), (0, -0.6), (0.5, -1.1), (1.2, -0.9)),  # jim
    letter((0.25, 0.7), (0.45, 0), (1.1, -0.15), (1.8, 0), (2, 0.5), dots=(1, 2, 3, -1)),  # ba
    letter((0.3, 0.4), (0.6, 0.3), (0.4, -0.1), (0.2, 0.1), (0.55, -0.1), (0.6, -1.2)),  # mim
    letter((0.25, 1), (0.3, 2), (0.4, 0.2), (0.6, -0.7), (1.1, -0.8), (1.4, 0.1)),  # lam
)


@dataclass(frozen=True)
class Hand:
    """What is a writer's own. Lengths without a unit are in tooth heights.

    The letters' paths begin with the joint, which may sag below the baseline or rise above it.
    """

    medial: tuple[Letter, ...]
    unjoined: tuple[Letter, ...]
    final: tuple[Letter, ...]
    tooth: float  # pixels
    join: float  # length of the stroke between two letters
    roundness: float  # spline tangent factor: 0 is angular, 0.5 is Catmull-Rom
    slant: float  # shear, positive where stems lean to the left
    word_gap: float
    cascade: float  # height lost from one letter of a word to the next
    wobble: float  # amplitude of the baseline
    drift: float  # slope of the baseline, positive where it rises to the left
    nib_width: float  # pixels
    nib_angle: float  # radians from the horizontal
    hairline: float  # thinnest stroke, pixels
    dot_height: float
    dot_spread: float
    dash: bool  # draws two dots as one dash


def sample_hand(rng: np.random.Generator) -> Hand:
    ascender, descender, width = rng.uniform([0.9, 0.7, 0.85], [1.7, 1.15, 1.35])
    joint = [[0, rng.uniform(-0.15, 0.12)]]

    def own(model: Letter) -> Letter:
        x, y = (model.path + rng.normal(0, 0.09, model.path.shape)).T
        y = np.where(y > 1, 1 + (y - 1) * ascender, np.where(y < 0, y * descender, y))
        return Letter(np.concatenate([joint, np.stack([x * width, y], axis=1)]), model.dots)

    return Hand(
        medial=tuple(map(own, MEDIAL)),
        unjoined=tuple(map(own, UNJOINED)),
        final=tuple(map(own, FINAL)),
        tooth=rng.uniform(9.5, 12.5),
        join=rng.uniform(0.15, 0.6),
        roundness=rng.uniform(0.2, 0.6),
        slant=rng.uniform(-0.35, 0.35),
        word_gap=rng.uniform(0.5, 1.2),
        cascade=rng.uniform(0, 0.2),
        wobble=rng.uniform(0.05, 0.2),
        drift=rng.uniform(-0.008, 0.008),
        nib_width=rng.uniform(1.6, 4),
        nib_angle=rng.uniform(0.2, 1.5),
        hairline=rng.uniform(1, 1.8),
        dot_height=rng.uniform(0.4, 0.8),
        dot_spread=rng.uniform(0.3, 0.5),
        dash=bool(rng.random() < 0.4),
    )


def vary_hand(hand: Hand, rng: np.random.Generator) -> Hand:
    """Return the hand as it is on one line: a writer's pen and mood change from line to line."""
    return replace(
        hand,
        tooth=hand.tooth * rng.normal(1, 0.04),
        join=hand.join * rng.uniform(0.7, 1.3),
        slant=hand.slant + rng.normal(0, 0.06),
        drift=hand.drift + rng.normal(0, 0.004),
        nib_width=hand.nib_width * rng.normal(1, 0.12),
        nib_angle=hand.nib_angle + rng.normal(0, 0.12),
        hairline=hand.hairline * rng.normal(1, 0.1),
    )


def dot_strokes(hand: Hand, path: Array, count: int) -> list[Array]:
    """Return the strokes of the dots above (count > 0) or below (count < 0) a path."""
    heights = path[:, 1]
    edge = max(heights.max(), 0.8) if count > 0 else min(heights.min(), 0)
    centre = np.array([path[:, 0].mean(), edge + np.sign(count) * hand.dot_height])
    pair = centre + np.array([[-hand.dot_spread, 0.1], [hand.dot_spread, -0.1]])
    if abs(count) == 2 and hand.dash:
        return [pair]
    third = centre + np.array([0, 1.3 * hand.dot_spread])
    middles = ((), (centre,), tuple(pair), (*pair, third))[abs(count)]
    # Drawn across the nib, a short stroke is the lozenge that a reed pen leaves.
    half = 0.4 * hand.nib_width / hand.tooth
    across = half * np.array([np.sin(hand.nib_angle), np.cos(hand.nib_angle)])
    return [np.array([middle - across, middle + across]) for middle in middles]


def write_word(hand: Hand, rng: np.random.Generator) -> tuple[list[Array], float]:
    """Return the strokes of a random word of 2 to 5 letters as control points, and its width."""
    x = 0.0
    strokes: list[Array] = []
    dots: list[Array] = []
    stroke: list[Array] = []
    for remaining in reversed(range(rng.integers(2, 6))):
        joined = remaining > 0 and rng.random() < 0.7
        alphabet = hand.medial if joined else hand.unjoined if remaining else hand.final
        model = alphabet[rng.integers(len(alphabet))]
        path = model.path + np.array([x, hand.cascade * remaining])
        stroke.append(path)
        if count := model.dots[rng.integers(len(model.dots))]:
            dots += dot_strokes(hand, path, count)
        if joined:
            x = path[-1, 0] + hand.join
        else:
            strokes.append(np.concatenate(stroke))
            stroke = []
            x = path[:, 0].max() + 0.3
    return strokes + dots, float(x)


def write_line(hand: Hand, length: float, rng: np.random.Generator) -> tuple[list[Array], float]:
    """Fill a length in pixels with words; return strokes (n, 2) in pixels and their width.

    x is counted from the right end of the line to the left, y upwards from the baseline.
    """
    strokes: list[Array] = []
    start = end = 0.0
    while True:
        word, width = write_word(hand, rng)
        if (start + width) * hand.tooth > length:
            break
        strokes += [stroke + np.array([start, 0]) for stroke in word]
        end = start + width
        start = end + hand.word_gap * rng.uniform(0.7, 1.4)
    points = np.concatenate(strokes)
    points += rng.normal(0, 0.05, points.shape)
    x, y = points.T
    phase = rng.uniform(0, 2 * np.pi, 2)
    wobble = np.sin(0.12 * x + phase[0]) + 0.6 * np.sin(0.45 * x + phase[1])
    rise = hand.drift * (x - end / 2) + hand.wobble * wobble
    points = hand.tooth * np.stack([x + hand.slant * y, y + rise], axis=1)
    return splines(points, [len(stroke) for stroke in strokes], hand.roundness), end * hand.tooth


def splines(points: Array, lengths: list[int], roundness: float) -> list[Array]:
    """Return cardinal splines as polylines, one for each run of so many control points (n, 2).

    All in one go: NumPy's cost for each call would otherwise be most of a line's time.
    """
    ends = np.cumsum(lengths)
    last = np.zeros(len(points), dtype=bool)
    last[ends - 1] = True
    following = np.arange(len(points)) + ~last
    tangents = roundness * (points[following] - np.roll(points, 1, axis=0))
    # Without a tangent, the span that follows a run's last point stays on that point.
    tangents[last | np.roll(last, 1)] = 0
    t = np.linspace(0, 1, SAMPLES_PER_SPAN, endpoint=False)[:, None]
    polyline = (
        (1 + 2 * t) * (1 - t) ** 2 * points[:, None]
        + t * (1 - t) ** 2 * tangents[:, None]
        + t**2 * (3 - 2 * t) * points[following, None]
        + t**2 * (t - 1) * tangents[following, None]
    )
    return [run.reshape(-1, 2) for run in np.split(polyline, ends[:-1])]


def draw_strokes(strokes: list[Array], hand: Hand, size: tuple[int, int], scale: float) -> Array:
    """Return the ink's coverage (height, width) in [0, 1] on an image of size (width, height).

    scale: image pixels per pixel of a line of nominal height
    """
    width, height = size
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    factor = scale * SUPERSAMPLING
    hairline = max(round(hand.hairline * factor), 2)
    direction = np.array([np.cos(hand.nib_angle), -np.sin(hand.nib_angle)])
    nib = 0.5 * hand.nib_width * factor * direction
    origin = SUPERSAMPLING * np.array([width - MARGIN * scale, 0.58 * height])
    # A broad nib's trace is its stroke shifted along the nib: a few polylines, which Pillow draws
    # in C, instead of a polygon for each segment.
    copies = 2 + int(hand.nib_width * factor / (0.9 * hairline))
    offsets = np.linspace(-1, 1, copies)[:, None] * nib
    for stroke in strokes:
        shifted = origin - factor * stroke + offsets[:, None]
        for polyline in shifted.reshape(copies, -1).tolist():
            draw.line(polyline, fill=255, width=hairline)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


@dataclass(frozen=True)
class Sheet:
    """A page's paper and ink, drawn apart from the hand: paper must be no label of the writer."""

    paper: float  # grey, 0-255
    ink: float  # grey, 0-255
    tilt: tuple[float, float]  # grey levels gained across the width and the height
    blotches: float  # grey levels
    noise: float  # grey levels
    fading: float  # share of the ink lost where the pen runs dry


def sample_sheet(rng: np.random.Generator) -> Sheet:
    return Sheet(
        paper=rng.uniform(140, 235),
        ink=rng.uniform(15, 80),
        tilt=(rng.uniform(-20, 20), rng.uniform(-20, 20)),
        blotches=rng.uniform(4, 20),
        noise=rng.uniform(2, 9),
        fading=rng.uniform(0.05, 0.5),
    )


def smooth_field(cells: tuple[int, int], shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Return noise in [-1, 1] of so many rows and columns, stretched to a shape."""
    grid = Image.fromarray(rng.uniform(-1, 1, cells).astype(np.float32))
    return np.asarray(grid.resize(shape[::-1], Image.Resampling.BILINEAR))


def ink_on_paper(coverage: Array, sheet: Sheet, rng: np.random.Generator) -> Image.Image:
    """Blend ink of a coverage (height, width) in [0, 1] into paper; return a grey image."""
    height, width = shape = coverage.shape
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32) * sheet.tilt[0]
    down = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * sheet.tilt[1]
    paper = rng.standard_normal(shape, dtype=np.float32) * sheet.noise
    paper += sheet.blotches * smooth_field((3, 12), shape, rng) + across + (down + sheet.paper)
    opacity = coverage * (1 - sheet.fading * (0.5 + 0.5 * smooth_field((2, 16), shape, rng)))
    pixels = paper + opacity * (sheet.ink - paper)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_line(hand: Hand, sheet: Sheet, line_height: int, rng: np.random.Generator) -> Image.Image:
    hand = vary_hand(hand, rng)
    height = round(line_height * rng.uniform(0.92, 1.08))
    scale = line_height / NOMINAL_HEIGHT
    strokes, length = write_line(hand, rng.uniform(480, 660), rng)
    size = (round((length + 2 * MARGIN) * scale), height)
    return ink_on_paper(draw_strokes(strokes, hand, size, scale), sheet, rng)


def make_lines(
    root: Path,
    num_writers: int = 8,
    pages_per_split: Mapping[str, int] = PAGES_PER_SPLIT,
    lines_per_page: int = 6,
    line_height: int = NOMINAL_HEIGHT,
    seed: int = 0,
    books: int = 0,
) -> None:
    """Write root/{split}/{writer}/[{book}/]{page}/line_001.png and so on, as 8-bit grey.

    An existing root, even an empty one, is left alone, so the same command can be run again; a
    new one appears whole. A split named "" adds no directory; with books > 0, a writer's pages
    go to book_1 ... book_{books} in turn. Pages are numbered across the splits. line_height is in
    pixels and varies by 8 %. A line depends on the seed and its writer, page and line numbers.
    """
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as workplace:
        complete = Path(workplace) / root.name
        complete.mkdir()
        # Counted from 1: to SeedSequence, a trailing 0 is the same as no number.
        for writer in range(1, num_writers + 1):
            hand = sample_hand(generator(seed, writer))
            splits = [split for split, pages in pages_per_split.items() for _ in range(pages)]
            for page, split in enumerate(splits, start=1):
                book = f"book_{(page - 1) % books + 1}" if books else ""
                folder = complete / split / f"writer_{writer:02d}" / book / f"page_{page:02d}"
                folder.mkdir(parents=True)
                sheet = sample_sheet(generator(seed, writer, page))
                for line in range(1, lines_per_page + 1):
                    rng = generator(seed, writer, page, line)
                    image = make_line(hand, sheet, line_height, rng)
                    # Noise hardly compresses: level 6 takes 3.3 ms and 24 KB, level 1 2.3 ms and
                    # 26 KB a line (one core of a 2-core VM, 2026-11-23).
                    image.save(folder / f"line_{line:03d}.png", compress_level=1)
        try:
            os.replace(complete, root)
        except OSError:
            if not root.exists():  # otherwise another command was quicker with the same lines
                raise


def generator(*entropy: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(entropy))
