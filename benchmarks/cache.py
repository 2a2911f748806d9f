"""Claim: lines are decoded once, quickly, and a search on 20,000 cached lines is open at once.

    python -m benchmarks.cache [--lines 20000]

Measures decoding on one core (decode_line) against Pillow's decoding and resizing alone;
decoding a set of linked line images with all cores into a cache; and, in a fresh process that has
imported everything, opening that cache to the first batch, with the memory that it takes; then the
whole command from its start to the first batch, imports included.

JSON: open_seconds_20000: finding, opening, first batch, of --lines lines. lines_per_second: decoded
by one core. anonymous_mib: memory that opening added to the process and that is not the mapped
strip. command_seconds: of the whole command, imports included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from PIL import Image

from benchmarks import common
from benchmarks.trial_start import noted_messages, silent
from data import find_lines, load_lines
from hyperparameter_search import main as search_main
from writer_search.demo import make_lines
from writer_search.lines.decoding import decode_line
from writer_search.lines.walk import LeftOut

LINE_HEIGHT = 64
LINES_PER_PAGE = 40
# Of a writer's pages, in order: a set of few has lines to train and validate on, too.
SPLIT_OF_PAGE = ("train", "val", *("train",) * 3, "test", *("train",) * 2, "val", "train")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_for(__doc__)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--writers", type=int, default=24)
    parser.add_argument("--images", type=int, default=96, help="different ones among the lines")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data_root", type=Path, help="take the different images from here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    print(common.describe_machine())
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        sources = source_images(args, work)
        rate = decode_rates(args, sources)
        link_lines(args, sources, work / "lines")
        built = build_cache(work)
        opened = [open_in_fresh_process(work) for _ in range(args.rounds)]
        steps = {name: median(run[name] for run in opened) for name in opened[0]}
        command = seconds_to_first_batch(work)
    rows = [[name, value] for name, value in steps.items()]
    size = built["strip MiB"]
    common.print_table(
        f"opening {args.lines} cached lines (strip of {size:.0f} MiB): s, MiB", ["", ""], rows
    )
    common.print_table(
        "decoding them, and the whole command: s",
        ["", ""],
        [
            ["decoding into the cache, all cores", built["seconds"]],
            ["lines/s, all cores", args.lines / built["seconds"]],
            ["command to first batch, imports included", command],
        ],
    )
    common.print_result(
        open_seconds_20000=steps["all, s"],
        lines_per_second=rate,
        anonymous_mib=steps["anonymous memory added, MiB"],
        command_seconds=command,
    )
    return 0


def source_images(args: argparse.Namespace, work: Path) -> list[Path]:
    """Give the different line images."""
    root = args.data_root
    if root is None:
        root = work / "sources"
        pages = {"train": max(2, args.images // 16)}
        make_lines(root, num_writers=2, pages_per_split=pages, lines_per_page=8)
    return [root / line.path for line in find_any(root)][: args.images]


def find_any(root: Path) -> list[Path]:
    """Find images whatever the splits."""
    from data import _scan

    return _scan(root, LeftOut())


def decode_rates(args: argparse.Namespace, sources: Sequence[Path]) -> float:
    """Print lines/s of one core; give the program's."""
    contents = [path.read_bytes() for path in sources]

    def with_pillow_alone() -> None:
        for content in contents:
            with Image.open(io.BytesIO(content)) as image:
                width = max(1, round(image.width * LINE_HEIGHT / image.height))
                image.convert("L").resize((width, LINE_HEIGHT), Image.Resampling.BILINEAR)

    def into_the_strip() -> None:
        for content in contents:
            decode_line(content, LINE_HEIGHT)

    sides = {"into the strip": into_the_strip, "Pillow alone": with_pillow_alone}
    _, seconds = common.alternate(sides, args.rounds)
    rates = {name: len(contents) / median(values) for name, values in seconds.items()}
    common.print_table("decoding: lines in a second of CPU", ["", ""], list(rates.items()))
    return rates["into the strip"]


def link_lines(args: argparse.Namespace, sources: Sequence[Path], root: Path) -> None:
    """Link the images into a data root of many lines."""
    images = cycle(sources)
    pages = max(2 * args.writers, args.lines // LINES_PER_PAGE)
    per_page = -(-args.lines // pages)
    left = args.lines
    for number in range(pages):
        split = SPLIT_OF_PAGE[(number // args.writers) % len(SPLIT_OF_PAGE)]
        folder = root / split / f"writer_{number % args.writers:02d}" / f"page_{number:04d}"
        folder.mkdir(parents=True)
        for line in range(min(per_page, left)):
            source = next(images)
            link_or_copy(source, folder / f"line_{line:03d}{source.suffix}")
        left -= min(per_page, left)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        target.write_bytes(source.read_bytes())


def build_cache(work: Path) -> dict[str, float]:
    """Decode all lines with all cores."""
    lines = find_lines(work / "lines")
    started = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        data = load_lines(work / "lines", lines, LINE_HEIGHT, work / "cache")
    return {
        "seconds": time.perf_counter() - started,
        "strip MiB": data.strip_file.stat().st_size / 2**20,
    }


def open_in_fresh_process(work: Path) -> dict[str, float]:
    """Open the cache where nothing was opened before."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=opened_in_child, args=(theirs, work))
    process.start()
    theirs.close()
    steps: dict[str, float] = ours.recv()
    process.join()
    return steps


def opened_in_child(connection: Connection, work: Path) -> None:
    """Send the seconds and the memory from finding the lines to the first batch."""
    import numpy as np
    import torch

    from writer_search.training.batches import EpochImages, Lines, epoch_order, strip_on

    before = {kind: common.memory_mib(kind) for kind in ("RssAnon", "RssFile")}
    times = [time.perf_counter()]
    lines = find_lines(work / "lines")
    times.append(time.perf_counter())
    data = load_lines(work / "lines", lines, LINE_HEIGHT, work / "cache")
    times.append(time.perf_counter())
    training = Lines.of(data, "train", strip_on(data, torch.device("cpu")))
    order = epoch_order(training.labels.numpy(), 0.5, np.random.default_rng(0))
    size = min(32, len(order))
    batches = torch.from_numpy(order[: len(order) // size * size]).view(-1, size)
    EpochImages.draw(training, batches, 256, 1.0, 1.0, seed=0).batch(0)
    times.append(time.perf_counter())
    connection.send(
        {
            "finding the files, s": times[1] - times[0],
            "opening the cache, s": times[2] - times[1],
            "order and first batch, s": times[3] - times[2],
            "all, s": times[3] - times[0],
            "anonymous memory added, MiB": common.memory_mib("RssAnon") - before["RssAnon"],
            "file memory added, MiB": common.memory_mib("RssFile") - before["RssFile"],
        }
    )


def seconds_to_first_batch(work: Path) -> float:
    """Run the command for one short trial; give the seconds from its start to the first batch."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=command_in_child, args=(theirs, work))
    started = time.perf_counter()
    process.start()
    theirs.close()
    first_batch: float = ours.recv()
    process.join()
    return first_batch - started


def command_in_child(connection: Connection, work: Path) -> None:
    events: list[tuple[str, float]] = []
    command = [
        *("--data_root", str(work / "lines"), "--cache_dir", str(work / "cache")),
        *("--checkpoint_dir", str(work / "search"), "--n_trials", "1", "--epochs", "1"),
        *("--fix", "backbone=tiny", "--weights", "none", "--device", "cpu", "--use_all_writers"),
    ]
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        noted_messages(events),
        silent(),
    ):
        search_main(command)
    connection.send(events[0][1])  # one clock for all processes of a machine


if __name__ == "__main__":
    raise SystemExit(main())
