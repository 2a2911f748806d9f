"""What a kill costs: the same job on this program and on others, each killed in the same way.

    python -m benchmarks.goodput --data_root latin_hands [--contestants default,continued,optuna]
        [--faults none,kill_group_60,kill_group_30] [--repetitions 1] [--epochs 3] [--lines 10]
        [--output runs.json]

Each contestant trains the same configurations on the same lines, is hit by a fault, and is started
again by the same command until it has a result for each. Goodput is the share of the wall time that
went into training that counts. See `benchmarks/contestants/`; the others need
`pip install -r benchmarks/contestants/requirements.txt`. With --output the same command goes on
after a stop, and more faults, contestants or repetitions extend it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import (
    add_data_flags,
    decoded,
    describe_machine,
    line_images,
    print_table,
    shown,
)
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.contestants.accounting import Figures, account, outcome, work_done
from benchmarks.contestants.faults import DEFAULT, NONE, fault_named
from benchmarks.contestants.job import LEARNING_RATES, Job
from benchmarks.contestants.runs import Run
from benchmarks.first_minutes import make_link
from data import find_lines
from writer_search.common.files import read_json, write_json

About = dict[str, Any]  # machine, versions, settings

COLUMNS = {
    "goodput": "goodput",
    "slowdown": "wall / undisturbed",
    "epochs_again": "epochs again",
    "lost": "lost",
    "twice": "twice",
    "never": "never",
    "changed": "changed",
    "left": "left",
    "first_batch": "first batch, s",
    "ending": "ending, s",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_flags(parser)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="names, by commas")
    parser.add_argument("--faults", default=",".join(DEFAULT), help="with seconds, by commas")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--configurations", type=int, default=len(LEARNING_RATES), help="at most 8")
    parser.add_argument("--epochs", type=int, default=3, help="of each configuration")
    parser.add_argument("--lines", type=int, default=10, help="of each writer; a third validates")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that a run may take")
    parser.add_argument("--output", type=Path, help="JSON; the runs in it are not repeated")
    parser.add_argument("--keep", type=Path, help="a directory of its own for what runs write")
    args = parser.parse_args(argv)
    for name in args.contestants.split(","):
        if name not in CONTESTANTS:
            parser.error(f"--contestants: {name} is none of {', '.join(CONTESTANTS)}")
    try:
        args.faults = {name: fault_named(name) for name in args.faults.split(",")}
    except ValueError as error:
        parser.error(f"--faults: {error}")
    return args


def link_some_lines(data_root: Path, target: Path, number: int) -> int:
    """Link the first lines of each writer's pages, page by page in turn; count those for training.

    number: of each writer's lines for training; a third as many for validation.
    """
    places: dict[tuple[str, str], list[tuple[int, Path, Path]]] = {}
    of_page: dict[tuple[str, str, str], int] = {}
    for line in find_lines(data_root):
        source = (data_root / line.path).resolve()
        page = (line.split, line.writer, line.page)
        link = target / line.split / line.writer / line.page / source.name
        places.setdefault(page[:2], []).append((of_page.get(page, 0), link, source))
        of_page[page] = of_page.get(page, 0) + 1
    linked = 0
    for (split, _), own in places.items():
        limit = {"train": number, "val": -(-number // 3)}.get(split, 0)
        for _, link, source in sorted(own)[:limit]:
            make_link(link, source)
            linked += split == "train"
    return linked


def installed(names: Sequence[str]) -> tuple[list[Contestant], dict[str, str]]:
    """Give the contestants that can run here, and the versions that they have; name the others."""
    able, versions = [], {}
    for name in names:
        try:
            found = {package: version(package) for package in CONTESTANTS[name].packages}
        except PackageNotFoundError as missing:
            print(f"skipped: {name}: {missing} is not installed", file=sys.stderr)
            continue
        able.append(CONTESTANTS[name])
        versions |= found
    return able, versions


def measure(run: Run, steps: int, undisturbed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Compute a run's figures, and what later runs are compared with."""
    rates = run.job.learning_rates
    recorded = [(rates[number], value) for number, value in run.results]
    marks = run.marks()
    final = outcome(work_done(marks), recorded, run.job.epochs)
    reference = None
    if undisturbed:
        was = {rate: (value, loss) for rate, value, loss in undisturbed["outcome"]}
        reference = undisturbed["wall"], was
    figures: Figures = account(
        marks, run.launches, recorded, rates, run.job.epochs, steps, reference
    )
    return {
        **asdict(figures),
        "left": run.left,
        "kills": run.kills,
        "person": "; ".join(run.person),
        "gave_up": run.gave_up,
        "outcome": [[rate, *found] for rate, found in final.items()],
    }


def earlier_runs(output: Path | None, about: About) -> list[dict[str, Any]]:
    """Give the runs of an earlier command. Raises ValueError where they compare with no others."""
    if output is None or not output.exists():
        return []
    found = read_json(output)
    here = {**about, "versions": found["versions"] | about["versions"]}
    there = {**found, "versions": about["versions"] | found["versions"]}
    for name in about:
        if here[name] != there[name]:
            raise ValueError(f"{output} has another {name}: give another file")
    about |= here
    return list(found["runs"])


def run_all(
    args: argparse.Namespace,
    able: Sequence[Contestant],
    job: Job,
    place: Path,
    about: About,
    rows: list[dict[str, Any]],
) -> None:
    """Run every contestant under every fault, in alternation; the order turns each time.

    rows: the runs so far, which are not repeated; to which the others are added.
    """
    done = {(row["repetition"], row["fault"], row["contestant"]) for row in rows}
    undisturbed = {(r["repetition"], r["contestant"]): r for r in rows if r["fault"] == NONE}
    rounds = product(range(args.repetitions), args.faults.items())
    for turn, (repetition, (fault_name, fault)) in enumerate(rounds):
        for contestant in able[:: 1 if turn % 2 == 0 else -1]:
            if (repetition, fault_name, contestant.name) in done:
                continue
            own = place / f"{repetition}_{fault_name}_{contestant.name}"
            shutil.rmtree(own, ignore_errors=True)  # of a run that this benchmark's end cut off
            own.mkdir()
            job.write(own / "job.json")
            run = Run(contestant, fault, own / "job.json", own, args.limit)
            try:
                run.go()
            except OSError as error:
                print(f"skipped: {fault_name}: {error}", file=sys.stderr)
                break
            side = (repetition, contestant.name)
            found = measure(run, about["settings"]["steps"], undisturbed.get(side))
            labels = {"fault": fault_name, "contestant": contestant.name}
            rows.append({**labels, "repetition": repetition, **found})
            if fault_name == NONE:
                undisturbed[side] = rows[-1]
            told = {name: found[name] for name in ("wall", "goodput", "kills", "gave_up")}
            print(*labels.values(), json.dumps(told), file=sys.stderr, flush=True)
            if args.output is not None:
                write_json(args.output, {**about, "runs": rows})


def cell(values: Sequence[Any]) -> str:
    """Show the mean of repetitions, and their range where they differ."""
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return "-"
    if min(numbers) == max(numbers):
        return shown(numbers[0])
    return f"{shown(fmean(numbers))} ({shown(min(numbers))} to {shown(max(numbers))})"


def tell(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each fault."""
    for fault in dict.fromkeys(row["fault"] for row in rows):
        table = []
        for name in dict.fromkeys(row["contestant"] for row in rows if row["fault"] == fault):
            own = [row for row in rows if (row["fault"], row["contestant"]) == (fault, name)]
            notes = dict.fromkeys(row[key] for row in own for key in ("person", "gave_up"))
            cells = [cell([row[key] for row in own]) for key in COLUMNS]
            table.append([name, *cells, "; ".join(filter(None, notes)) or "nothing"])
        header = ["", *COLUMNS.values(), "what a person had to do, or why it was given up"]
        print_table(fault, header, table)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    able, versions = installed(args.contestants.split(","))
    with line_images(args) as (root, _), tempfile.TemporaryDirectory() as temporary:
        place = (args.keep or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place / "lines", ignore_errors=True)  # an earlier command's may be more
        linked = link_some_lines(root, place / "lines", args.lines)
        rates = LEARNING_RATES[: args.configurations]
        job = Job(args.epochs, str(place / "lines"), str(place / "cache"), learning_rates=rates)
        settings = {
            **{"configurations": len(rates), "epochs": args.epochs, "lines": args.lines},
            **{"training_lines": linked, "steps": max(1, linked // job.config(0).batch_size)},
            "seed": job.seed,
        }
        about = {"machine": describe_machine(), "versions": versions, "settings": settings}
        try:
            rows = earlier_runs(args.output, about)
        except ValueError as error:
            print(f"error: --output: {error}", file=sys.stderr)
            return 2
        decoded(place / "lines", place / "cache", job.line_height)
        run_all(args, able, job, place, about, rows)
    print(about["machine"])
    tell(rows)
    print(json.dumps({**about, "runs": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
