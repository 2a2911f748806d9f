"""Finds what of a picture lies outside of the line: beyond a polygon's edge, or in a frame.

Line exports cut lines along a polygon and paint the rest black or white; scans have frames. Such an
outside has one constant extreme value and touches the border. But in binarised lines and bleached
scans the paper itself is constant white up to the border, and in their negatives constant black.
The shape of the rest tells them apart: where a line was cut out of its page, the rest is one solid
piece, and where the extreme is the paper, the rest is strokes with gaps between and above them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLACK, WHITE = 0, 255
NEAR = 8  # grey levels around an extreme that count as it: noise of JPEG in constant areas
CONSTANT = 2  # half of a constant area is so near its extreme
EDGE = 32  # the same beside the outside's edge, where JPEG makes more noise
LEAST_BORDER = 0.2  # of the picture's border is of the outside; ink that a border cuts covers less
LEAST_CORNER = 0.05  # the same where nothing else in the picture is as extreme: it is no ink then
LEAST_OUTSIDE = 0.002  # of the picture
ELSEWHERE = 1e-4  # of the picture is as extreme without being reached from the border
LEAST_CONTRAST = 12  # grey levels between outside and paper; with less it is read as paper anyway
EXACT = 0.999  # of an outside that no lossy format has touched
CLIPPED = 0.005  # of the inside is as extreme as the outside: the outside may flow into ink
FOUND_FIRST, FOUND_LATER = 3, 5  # versions of the decoding; see `DecodedLine`
ROUNDS = 4  # along rows and columns; the paper between letters would need dozens
TALL = 256  # pixels; of higher pictures only every second, third, … row and column is looked at

Mask = NDArray[np.bool_]
Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """How much of one piece an inside must be. Fractions; 1 is a rectangle."""

    area: float  # of the picture
    filled: float  # of its own columns, from its first to its last row
    single: float  # share of its columns that have one run of it
    thick: float  # area per length of edge, as a part of its height


# Measured on 1,105 real lines: ink reaches 0.92, 0.78 and 0.39, made bold by 4 pixels 0.99, 0.92
# and 0.58; polygons that keep half a line have 1, 1 and 0.7, close ones around the ink 1, 1, 0.5.
SOLID = Shape(area=0.1, filled=0.97, single=0.9, thick=0.4)
# Black on white within black: strokes that touch the outside tear the inside's shape.
SOLID_BINARY = Shape(area=0.4, filled=0.93, single=0.8, thick=0.6)


@dataclass(frozen=True)
class Outside:
    """Where a picture is not the line: mask (height, width), and the first version to find it."""

    mask: Mask
    version: int


def find_outside(grey: Grey) -> Outside | None:
    """Find the outside of a line, or None where there is none.

    grey (height, width), uint8. A black area within a white frame is found as well, and a white one
    within a black frame.
    """
    step = max(1, grey.shape[0] // TALL)
    if step == 1:
        return _find(grey)
    outside = _find(grey[::step, ::step])
    if outside is None:
        return None
    whole = _grown(outside.mask).repeat(step, 0).repeat(step, 1)
    return Outside(whole[: grey.shape[0], : grey.shape[1]], outside.version)


def _find(grey: Grey) -> Outside | None:
    nothing = np.zeros(grey.shape, bool)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    for extreme in (BLACK, WHITE):
        outside = _outside_of(grey, extreme, nothing, border)
        if outside is not None:
            beside = _grown(outside.mask)
            ring = grey[_grown(beside) & ~beside]
            within = _outside_of(grey, WHITE - extreme, outside.mask, ring)
            if within is None:
                return outside
            return Outside(within.mask, max(outside.version, within.version))
    return None


def _near(grey: Grey, extreme: int, levels: int = NEAR) -> Mask:
    return grey <= levels if extreme == BLACK else grey >= WHITE - levels


def _outside_of(grey: Grey, extreme: int, known: Mask, border: Grey) -> Outside | None:
    """Find an outside of one extreme, together with what is known to be outside already.

    border (pixels,): what lies beside the picture's edge, or beside the known outside.
    """
    on_border = np.count_nonzero(_near(border, extreme))
    if on_border < LEAST_CORNER * border.size:
        return None
    near = _near(grey, extreme)
    reached = _from_border(near | known)
    is_corner = on_border < LEAST_BORDER * border.size
    if is_corner and np.count_nonzero(near & ~reached) > ELSEWHERE * grey.size:
        return None
    own = reached & ~known
    count = np.count_nonzero(own)
    if count < LEAST_OUTSIDE * grey.size or reached.all():
        return None
    if np.count_nonzero(_near(grey[own], extreme, CONSTANT)) < 0.5 * count:
        return None  # the lightest of an uneven paper
    contrast = abs(_paper(grey[~reached]) - extreme)
    if contrast < LEAST_CONTRAST:
        return None
    if np.count_nonzero(grey[own] == extreme) < EXACT * count:
        reached = _without_noise(reached, _near(grey, extreme, min(EDGE, int(0.4 * contrast))))
    outside = _cut_out(reached, near, _near(grey, WHITE - extreme))
    if outside is None:
        return None
    paper, middle = _beside(grey, outside, extreme)
    least = 0.8 * min(contrast, 40.0)
    if middle > 2.25 * contrast or max(paper, middle) < least:  # ink, or light that fades
        return None
    outside = _over_rim(grey, _over_soft_edge(grey, outside, extreme, contrast), extreme, contrast)
    return Outside(outside, FOUND_LATER if is_corner or paper < least else FOUND_FIRST)


def _paper(values: Grey) -> float:
    """Give a grey that is paper even where ink is half of it: polygons are drawn closely."""
    return float(np.percentile(values, 75))


def _cut_out(reached: Mask, near: Mask, opposite: Mask) -> Mask | None:
    """Give the part of what was reached that lies outside, if the rest was cut out of a page."""
    inside = ~reached
    area = np.count_nonzero(inside)
    own = np.count_nonzero(near & inside)
    is_binary = own + np.count_nonzero(opposite & inside) > 0.9 * area
    is_clipped = own > CLIPPED * area
    if not is_binary and is_solid(inside, SOLID):
        return _without_strokes(reached) if is_clipped else reached
    if is_clipped:
        outside = _without_strokes(reached)
        if is_solid(~outside, SOLID_BINARY):
            return outside
    return None


def is_solid(inside: Mask, least: Shape) -> bool:
    """Tell whether an inside is one piece of a page rather than ink."""
    area = np.count_nonzero(inside)
    if area == 0 or area < least.area * inside.size:
        return False
    columns = inside.any(0)
    occupied = np.flatnonzero(columns)
    top = inside.argmax(0)[columns]
    bottom = inside.shape[0] - inside[::-1].argmax(0)[columns]
    height = int((bottom - top).sum())
    runs = inside[0].astype(np.int32) + np.count_nonzero(inside[1:] & ~inside[:-1], axis=0)
    edge = np.count_nonzero(inside[1:] != inside[:-1]) + np.count_nonzero(
        inside[:, 1:] != inside[:, :-1]
    )
    return bool(
        len(occupied) >= least.filled * (occupied[-1] - occupied[0] + 1)
        and area >= least.filled * height
        and (runs[columns] == 1).mean() >= least.single
        and 2 * area * len(occupied) >= least.thick * edge * height
    )


def _from_border(allowed: Mask) -> Mask:
    """Find what can be reached from the border within a mask, by steps to four sides."""
    reached = np.zeros_like(allowed)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        reached[edge] = allowed[edge]
    for _ in range(ROUNDS):
        before = np.count_nonzero(reached)
        reached = _along_rows(allowed.T, reached.T).T
        reached = _along_rows(allowed, reached)
        if np.count_nonzero(reached) - before < 0.001 * reached.size:
            break
    return reached


def _along_rows(allowed: Mask, reached: Mask) -> Mask:
    """Fill each horizontal run of a mask in which a pixel is reached."""
    starts = allowed.copy()
    starts[:, 1:] &= ~allowed[:, :-1]
    run = np.cumsum(starts.ravel(), dtype=np.int32).reshape(allowed.shape)
    is_reached = np.zeros(int(run[-1, -1]) + 1, bool)
    is_reached[run[reached]] = True
    return is_reached[run] & allowed


def _beside(grey: Grey, outside: Mask, extreme: int) -> tuple[float, float]:
    """Measure the contrast just beyond an outside's edge: of the paper there, and of the median.

    Beside a white outside the lightest quarter, which is taken for paper, may be a lossy format's
    noise. Where nothing is left beside it, nothing speaks against it.
    """
    beside = _grown(outside)
    others = _near(grey, extreme) | _near(grey, WHITE - extreme, EDGE)  # a polygon within a frame
    ring = grey[_grown(beside) & ~beside & ~others]
    if not ring.size:
        return float(WHITE), 0.0
    middle = float(np.median(np.abs(ring.astype(np.float32) - extreme)))
    return abs(_paper(ring) - extreme), middle


def _without_noise(reached: Mask, edge: Mask) -> Mask:
    """Add to an outside what a lossy format left of it beside its edge, specks included."""
    for _ in range(4):
        reached = reached | (_grown(reached) & edge)
    return ~_grown(~_grown(reached))


def _over_soft_edge(grey: Grey, outside: Mask, extreme: int, contrast: float) -> Mask:
    """Grow an outside over its soft edge: as long as a pixel further in looks less like it."""
    grown = _grown(outside)
    for _ in range(4):
        further = _grown(grown)
        here, there = grey[grown & ~outside], grey[further & ~grown]
        if not (here.size and there.size):
            break
        step = abs(_paper(there) - extreme) - abs(_paper(here) - extreme)
        if step < max(4.0, 0.1 * contrast):
            break
        outside, grown = grown, further
    return outside


def _over_rim(grey: Grey, outside: Mask, extreme: int, contrast: float) -> Mask:
    """Add the pixels beside an outside in which paper is mixed with it, as a smaller picture's are.

    Those that look more like it than paper does, and than the next pixel further in.
    """
    unlike, least = np.abs(grey.astype(np.int16) - extreme), max(16.0, 0.25 * contrast)
    is_mixed = unlike <= contrast - least
    rim = np.zeros_like(outside)
    for way in WAYS_IN:
        out, far, mixed, found = way(outside), way(unlike), way(is_mixed), way(rim)
        steps = far[2:] - far[1:-1] >= least
        found[1:-1] |= out[:-2] & ~out[2:] & mixed[1:-1] & steps
    return outside | rim


# Views in which one comes from outside by going down the rows: from above, below, left and right.
WAYS_IN: tuple[Callable[[NDArray[Any]], NDArray[Any]], ...] = (
    lambda picture: picture,
    lambda picture: picture[::-1],
    lambda picture: picture.T,
    lambda picture: picture.T[::-1],
)


def _without_strokes(reached: Mask) -> Mask:
    """Leave out what is thinner than an eighth of the height: ink that touches the outside."""
    size = max(3, reached.shape[0] // 8)
    whole = _box_sums(np.pad(reached, size, constant_values=True), size) == size * size
    opened = _box_sums(np.pad(whole, size - 1), size)[size:-size, size:-size] > 0
    for _ in range(2):  # corners, which a square does not reach
        opened = opened | (_grown(opened) & reached)
    return opened & reached


def _box_sums(mask: Mask, size: int) -> NDArray[np.int32]:
    """Count a mask's pixels in each square: (height - size + 1, width - size + 1)."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)
    mask.cumsum(0, dtype=np.int32).cumsum(1, out=sums[1:, 1:])
    return sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]


def _grown(mask: Mask) -> Mask:
    """Grow a mask by a pixel to all eight sides."""
    tall = mask.copy()
    tall[1:] |= mask[:-1]
    tall[:-1] |= mask[1:]
    grown = tall.copy()
    grown[:, 1:] |= tall[:, :-1]
    grown[:, :-1] |= tall[:, 1:]
    return grown
