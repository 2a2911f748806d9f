"""How good a model there is after each minute: the default search beside one of networks alone.

    python -m benchmarks.first_minutes --data_root latin_hands [--lines 8] [--seconds 300]

Each side runs the command as a user does, decoding included, is stopped after the time, and is
watched from outside: the best validation macro top-1 so far against seconds since its start.
--lines N keeps the first N training lines of each writer, taken page by page in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import (
    add_data_flags,
    describe_machine,
    line_images,
    parser_for,
    print_result,
    print_table,
)
from data import find_lines
from writer_search.results.rows import read_history
from writer_search.space import BACKBONES_BY_TIER

COMMAND = Path(__file__).parents[1] / "hyperparameter_search.py"
POLL_SECONDS = 0.25


def link_first_lines(data_root: Path, target: Path, number: int) -> None:
    """Link all lines but those for training after each writer's first `number`."""
    seen: dict[tuple[str, str, str], int] = {}  # lines of each page
    training: dict[str, list[tuple[int, Path, Path]]] = {}
    for line in find_lines(data_root):
        source = (data_root / line.path).resolve()
        link = target / line.split / line.writer / line.page / source.name
        page = (line.split, line.writer, line.page)
        if line.split == "train":
            training.setdefault(line.writer, []).append((seen.get(page, 0), link, source))
            seen[page] = seen.get(page, 0) + 1
        else:
            make_link(link, source)
    for own in training.values():
        for _, link, source in sorted(own)[:number]:
            make_link(link, source)


def make_link(link: Path, source: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():  # from an earlier command, which was stopped
        link.symlink_to(source)


def watch(data_root: Path, place: Path, seconds: float, flags: Sequence[str]) -> list[list[float]]:
    """Run a search for so long: [seconds since its start, best value so far], at each change."""
    directory = place / "search"
    command = [
        *(sys.executable, str(COMMAND), "--data_root", str(data_root), "--use_all_writers"),
        *("--checkpoint_dir", str(directory), "--cache_dir", str(place / "cache")),
        *("--weights", "none", *flags),
    ]
    started = time.monotonic()
    best: list[list[float]] = []
    with (place / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while (now := time.monotonic() - started) < seconds:
            ended = process.poll() is not None
            values = [r["macro_top1"] for d in directory.glob("trial_*") for r in read_history(d)]
            if values and (not best or max(values) > best[-1][1]):
                best.append([round(now, 1), max(values)])
            if ended:
                break
            time.sleep(POLL_SECONDS)
        else:
            process.send_signal(signal.SIGTERM)
        process.wait()
    return best


def value_at(best: Sequence[Sequence[float]], second: float) -> float | None:
    return max((value for when, value in best if when <= second), default=None)


def percents(best: Sequence[Sequence[float]], second: float) -> str:
    value = value_at(best, second)
    return "-" if value is None else f"{100 * value:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for(__doc__)
    add_data_flags(parser)
    parser.add_argument("--lines", type=int, help="training lines of each writer (default: all)")
    parser.add_argument("--seconds", type=float, default=300.0, help="of each side")
    parser.add_argument("--n_trials", type=int, default=1000, help="of each side, at most")
    parser.add_argument("--epochs", type=int, default=100, help="of a trial, at most")
    parser.add_argument("--fix", action="append", default=[], help="for both sides; repeatable")
    args: argparse.Namespace = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    flags = ["--n_trials", str(args.n_trials), "--epochs", str(args.epochs)]
    flags += [*(word for fix in args.fix for word in ("--fix", fix))]
    sides: dict[str, list[list[float]]] = {}
    with line_images(args) as (root, _), tempfile.TemporaryDirectory() as place:
        if args.lines is not None:
            link_first_lines(root, Path(place) / "lines", args.lines)
            root = Path(place) / "lines"
        networks = Path(place) / "networks.json"
        choices = list(BACKBONES_BY_TIER["cpu", False])
        networks.write_text(json.dumps({"backbone": {"choices": choices}}))
        for side, more in (("default", []), ("networks", ["--space", str(networks)])):
            (own := Path(place) / side).mkdir()
            sides[side] = watch(root, own, args.seconds, [*flags, *more])
    times = [args.seconds * share for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)]
    rows = [[f"{at:.0f} s", *(percents(best, at) for best in sides.values())] for at in times]
    print(describe_machine())
    print_table("best validation macro top-1 so far, %", ["after", *sides], rows)
    print_result(
        **{f"{side}_best": value_at(best, args.seconds) for side, best in sides.items()},
        **{f"{side}_first_seconds": best[0][0] if best else None for side, best in sides.items()},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
