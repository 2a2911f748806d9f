"""Does it matter how lines were cut out of their page?

    python -m benchmarks.outside --data_root latin_hands --writers 8 --epochs 20 --seeds 3

Trains the default network on whole lines, and with the same seeds on the same lines cut out along
polygons, whose outside is the line's own paper colour, black, white or transparent. All cut lines
differ from the whole ones in what the polygon cuts off; those on paper say how much that costs, the
others what their outside costs beyond it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import common
from data import LineFile, find_lines
from train import train
from writer_search.config import TrialConfig

SETS = ("whole", "paper 0.8", "black 0.8", "white 0.8", "transparent 0.8", "black 0.6")


def polygon(
    shape: tuple[int, int], kept: float, seed: int, slope: float = 0.0
) -> NDArray[np.bool_]:
    """Draw a band with a wavy edge that keeps about this share of a picture: True inside."""
    height, width = shape
    rng = np.random.default_rng(seed)
    x = np.linspace(0, width * 2 / height, width)

    def edge() -> NDArray[np.float64]:
        heights = rng.normal(0, 0.04 * height, int(x[-1]) + 2)
        return np.interp(x, np.arange(len(heights)), heights)

    middle = height / 2 + slope * np.linspace(-0.5, 0.5, width) * height
    rows = np.arange(height)[:, None]
    half = kept * height / 2
    return (rows >= middle - half + edge()) & (rows < middle + half + edge())


def painted(grey: NDArray[np.uint8], inside: NDArray[np.bool_], outside: str) -> Image.Image:
    """Paint what is outside of a polygon: paper, black, white or transparent."""
    if outside == "transparent":
        image = Image.fromarray(np.where(inside, grey, 0).astype(np.uint8)).convert("RGBA")
        image.putalpha(Image.fromarray((inside * 255).astype(np.uint8)))
        return image
    colour = {"paper": np.median(grey[inside]), "black": 0, "white": 255}[outside]
    return Image.fromarray(np.where(inside, grey, colour).astype(np.uint8))


def write_set(name: str, data_root: Path, lines: list[LineFile], into: Path) -> None:
    """Write a set's lines as PNG."""
    outside, _, kept = name.partition(" ")
    for number, line in enumerate(lines):
        with Image.open(data_root / line.path) as file:
            image = file.convert("L")
        if kept:
            grey = np.asarray(image)
            image = painted(grey, polygon(grey.shape, float(kept), number), outside)
        path = (into / line.path).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser_for(__doc__)
    common.add_data_flags(parser)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="so many, from 0")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found: dict[str, list[float]] = {name: [] for name in SETS}
    with common.line_images(args) as (data_root, _), tempfile.TemporaryDirectory() as directory:
        lines = [line for line in find_lines(data_root, args.writers) if line.split != "test"]
        data = {}
        for name in SETS:
            root = Path(directory) / name
            write_set(name, data_root, lines, root)
            data[name] = common.decoded(root, Path(directory) / "cache", 64)
        for seed in range(args.seeds):
            for name in SETS:
                config = TrialConfig(
                    seed=seed, epochs=args.epochs, patience=args.epochs, backbone="resnet_thin"
                )
                metrics = train(config, data[name], Path(directory) / f"{name} {seed}")
                assert metrics is not None
                found[name].append(round(100 * metrics.macro_top1, 2))
                print(f"seed {seed}, {name}: {found[name][-1]:.2f} %", flush=True)
    for name, values in found.items():
        beyond = mean(values) - mean(found["whole"])
        print(f"{name:16s} {mean(values):6.2f} %  against whole lines {beyond:+.2f}")
    print(json.dumps({"macro_top1": found, "epochs": args.epochs, "threads": args.threads}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
