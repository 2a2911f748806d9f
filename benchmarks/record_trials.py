"""Records real searches as a small table, for `benchmarks.search_efficiency`.

    python -m benchmarks.record_trials --data_root DIR [--seconds 600]

Runs the real command on a reduced budget (few writers, small lines, few epochs, one backbone, one
thread a trial) for each sampler, pruner and seed, and writes each trial's hyperparameters and
validation curve to recorded_trials.json. Stopped, or after --seconds, the same command goes on. A
search ends when it has spent as many epochs as --trials whole trials take.

JSON: trials: recorded. epochs: spent by all of them. unfinished: searches that are still to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks import common
from data import find_lines
from writer_search.common.files import write_text
from writer_search.results.rows import DATABASE, read_database, read_history, trial_dir

TABLE = Path(__file__).parent / "recorded_trials.json"
PROGRAM = Path(__file__).parents[1] / "hyperparameter_search.py"
SEARCHES = ("random-none", "tpe-none", "tpe-median")  # sampler and pruner
DIGITS = 4  # of a recorded validation value


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_for(__doc__)
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("recorded"), help="the searches' own")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--pages", type=int, help="at most so many training pages of each writer")
    parser.add_argument("--line_height", type=int, default=24)
    parser.add_argument("--crop_width", type=int, default=96)
    parser.add_argument("--backbone", default="resnet_thin")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--seconds", type=float, help="start no trial after so long")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    print(common.describe_machine())
    deadline = time.monotonic() + (args.seconds or float("inf"))
    if args.pages:
        fewer = args.work / f"data_{args.pages}"
        args.data_root = with_fewer_pages(args.data_root, args.pages, fewer)
    names = [f"{search}-{seed}" for seed in args.seeds for search in args.searches]
    for name in names:
        while not is_done(args, name) and (left := deadline - time.monotonic()) > 0:
            run_search(args, name, left if args.seconds else None)
    write_table(args, [name for name in names if trials_of(args.work / name)])
    recorded = [trials_of(args.work / name) for name in names]
    common.print_result(
        trials=sum(map(len, recorded)),
        epochs=sum(map(spent, recorded)),
        unfinished=sum(not is_done(args, name) for name in names),
    )
    return 0


def with_fewer_pages(data_root: Path, pages: int, into: Path) -> Path:
    """Link a data set's images; of each writer's training pages only the first so many."""
    lines = find_lines(data_root)
    training = sorted({(line.writer, line.page) for line in lines if line.split == "train"})
    by_writer = groupby(training, itemgetter(0))
    kept = {page for _, own_pages in by_writer for page in islice(own_pages, pages)}
    for line in lines:
        if line.split == "train" and (line.writer, line.page) not in kept:
            continue
        link = into / line.split / line.writer / line.page / Path(line.path).name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((data_root / line.path).resolve())
    return into


def run_search(args: argparse.Namespace, name: str, seconds: float | None) -> None:
    """Run one search until its trials are complete or the time is up."""
    sampler, pruner, seed = name.split("-")
    command = [
        *(sys.executable, str(PROGRAM), "--data_root", str(args.data_root)),
        *("--num_writers_subset", str(args.writers)),
        *("--checkpoint_dir", str(args.work / name), "--n_trials", str(args.trials)),
        *("--sampler", sampler, "--pruner", pruner, "--seed", seed, "--n_jobs", "1"),
        *("--epochs", str(args.epochs), "--patience", str(args.epochs), "--device", "cpu"),
        *("--weights", "none", "--keep_checkpoints", "best"),
        *("--fix", f"backbone={args.backbone}", "--fix", f"precision={args.precision}"),
        *("--fix", f"line_height={args.line_height}", "--fix", f"crop_width={args.crop_width}"),
    ]
    if seconds is not None:
        command += ["--timeout", str(seconds)]
    cores = sorted(os.sched_getaffinity(0))[-args.threads :]
    args.work.mkdir(parents=True, exist_ok=True)
    with open(args.work / f"{name}.log", "a") as log:
        pinned = ["taskset", "-c", ",".join(map(str, cores)), *command]
        code = subprocess.run(pinned, stdout=log).returncode
    if code > 1:
        raise SystemExit(f"{name} ended with exit code {code}")


def trials_of(directory: Path) -> list[dict[str, Any]]:
    """Give a search's finished trials, in order."""
    if not (directory / DATABASE).exists():
        return []
    return [
        {
            "params": {name: rounded(value) for name, value in row.params.items()},
            "pruned": row.state == "PRUNED",
            "values": [
                round(epoch["macro_top1"], DIGITS)
                for epoch in read_history(trial_dir(directory, row.number))
            ],
        }
        for row in read_database(directory / DATABASE).rows
        if row.state in ("COMPLETE", "PRUNED")
    ]


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def spent(trials: Sequence[dict[str, Any]]) -> int:
    return sum(len(trial["values"]) for trial in trials)


def is_done(args: argparse.Namespace, name: str) -> bool:
    trials = trials_of(args.work / name)
    complete = sum(not trial["pruned"] for trial in trials)
    return complete >= args.trials or spent(trials) >= args.trials * args.epochs


def write_table(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Write what was recorded: a line a trial."""
    settings = {
        name: getattr(args, name)
        for name in (
            "trials",
            "epochs",
            "writers",
            "pages",
            "line_height",
            "crop_width",
            "backbone",
            "precision",
        )
    }
    searches = {
        name: [json.dumps(trial) for trial in trials_of(args.work / name)] for name in names
    }
    blocks = [f'"{name}": [\n' + ",\n".join(trials) + "\n]" for name, trials in searches.items()]
    head = f'"machine": {json.dumps(common.describe_machine())},\n"settings": '
    text = f"{{\n{head}{json.dumps(settings)},\n" + ",\n".join(
        ['"searches": {\n' + ",\n".join(blocks) + "\n}"]
    )
    write_text(args.out, text + "\n}\n")


if __name__ == "__main__":
    raise SystemExit(main())
