"""Cut lines out of pages that ALTO files describe, as eScriptorium and kraken export them.

    git clone https://github.com/HTRomance-Project/medieval-italian
    python -m benchmarks.cut_lines medieval-italian/data --output hands

Of each ALTO file with an image of its name beside it, up to 13 lines, evenly spread over the page,
go into `hands/<directory>/<page>/line_001.png`: black outside of their polygon. A directory is
taken for one hand. Only the default kind of lines is taken, none that is lower than 20 pixels or
shorter than three times its height, and no page with fewer than five lines.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from writer_search.lines.kinds import SUFFIXES

Polygon = list[tuple[float, float]]
LEAST_LINES, LEAST_HEIGHT, LEAST_ASPECT = 5, 20, 3  # of a page; of a line in pixels


def polygons(alto: Path, size: tuple[int, int]) -> list[Polygon]:
    """Read the polygons of a page's lines, in pixels of its image of this width and height."""
    root = ElementTree.parse(alto).getroot()
    kinds = {tag.get("ID"): tag.get("LABEL", "") for tag in root.iterfind(".//{*}OtherTag")}
    page = next(root.iterfind(".//{*}Page"))
    scale = size[0] / float(page.get("WIDTH") or size[0])
    found = []
    for line in root.iterfind(".//{*}TextLine"):
        kind = kinds.get((line.get("TAGREFS") or "").split(" ")[0], "")
        polygon = line.find(".//{*}Polygon")
        if polygon is None or not (kind or "default").casefold().startswith("default"):
            continue
        values = [scale * float(v) for v in polygon.get("POINTS", "").replace(",", " ").split()]
        points = list(zip(values[::2], values[1::2], strict=True))
        within = np.clip(points or [(0, 0)], 0, size)
        width, height = np.ptp(within, axis=0)
        if height >= LEAST_HEIGHT and width >= LEAST_ASPECT * height:
            found.append(points)
    return found


def evenly(lines: Sequence[Polygon], most: int) -> list[Polygon]:
    """Take so many of the lines, from the first to the last."""
    places = np.linspace(0, len(lines) - 1, min(most, len(lines))).round().astype(int)
    return [lines[place] for place in places]


def cut(page: Image.Image, points: Polygon) -> Image.Image:
    """Cut a line out of its page; what lies outside of its polygon is black."""
    least, most = np.min(points, axis=0).astype(int), np.max(points, axis=0).astype(int) + 1
    left, top = np.maximum(least, 0).tolist()
    right, bottom = np.minimum(most, page.size).tolist()
    line = page.crop((left, top, right, bottom))
    outside = Image.new("L", line.size, 255)
    ImageDraw.Draw(outside).polygon([(x - left, y - top) for x, y in points], fill=0)
    line.paste(0, mask=outside)
    return line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", type=Path, nargs="+", help="searched to any depth")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=13, help="of each page, at most")
    args = parser.parse_args(argv)
    written, hands = 0, dict[str, Path]()
    for alto in sorted(path for d in args.directories for path in d.rglob("*.xml")):
        beside = sorted(path for path in alto.parent.iterdir() if path.stem == alto.stem)
        path = next((path for path in beside if path.suffix.lower() in SUFFIXES), None)
        if path is None:
            print(f"{alto}: left out, no image of its name")
            continue
        hand = hands.setdefault(alto.parent.name, alto.parent)
        if hand != alto.parent:
            parser.error(f"{hand} and {alto.parent} have the same name: one hand, or two?")
        with Image.open(path) as image:
            page = image.convert("RGB")
        lines = polygons(alto, page.size)
        if len(lines) < LEAST_LINES:
            print(f"{path}: left out, {len(lines)} lines")
            continue
        into = args.output / hand.name / path.stem
        into.mkdir(parents=True, exist_ok=True)
        for number, points in enumerate(evenly(lines, args.lines), 1):
            cut(page, points).save(into / f"line_{number:03d}.png")
            written += 1
    print(f"{written} lines in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
