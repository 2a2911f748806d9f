"""Claim: nobody notices the study loop, however many trials the study has.

    python -m benchmarks.study_scale [--sizes 10 100 1000 3000]

Measures, at each size of a study on SQLite, what the search itself spends on one trial
(study/loop.py with a trial that takes no time: draw, config.json, reports and prune checks, tell,
record, summary) and what bare Optuna spends on the same calls (ask, the same suggestions, reports,
prune checks, tell; same sampler and pruner), a trial of each in turn, on copies of one database.
Then the time to open such a study, of `--status` and of writing the summary; and, in processes of
their own, what each side's memory grows by over --memory_trials trials.

JSON: added_ms_at_N: the search's time a trial less bare Optuna's, median of the differences, and
added_cpu_ms_at_N, the same in CPU time. search_mib, optuna_mib: growth of memory.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState

from benchmarks import common
from benchmarks.trial_start import silent
from data import LineSet
from writer_search.common.signals import StopSignals
from writer_search.processes import runner
from writer_search.processes.plan import Plan
from writer_search.processes.running import Complete, Report
from writer_search.results.rows import DATABASE, read_database
from writer_search.results.status import read_status, status_text
from writer_search.results.tables import SummaryFiles
from writer_search.space import BACKBONES_BY_TIER, Space, default_space, narrow, suggest
from writer_search.study.draws import make_pruner, make_sampler
from writer_search.study.loop import Search
from writer_search.study.store import open_study
from writer_search.study.supplies import LocalSupply
from writer_search.study.unfinished import settle_unfinished

EPOCHS = 20
MEMORY_REPORTS = 5  # of a trial whose memory counts; 20 take four times as long
# Of the default space, without what is drawn under a condition: the sides would draw it unequally
# often, and a draw of it costs Optuna as much as all others together.
SPACE = narrow(
    default_space("cpu", pretrained=False),
    {"mixup": False, "with_cohog": False},
    {"backbone": {"choices": list(BACKBONES_BY_TIER["cpu", False])}},
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_for(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 100, 1000, 3000])
    parser.add_argument("--rounds", type=int, default=15, help="trials of each side at each size")
    parser.add_argument("--reports", type=int, default=EPOCHS, help="of a trial")
    parser.add_argument("--memory_trials", type=int, default=500, help="0: leave it out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    print(common.describe_machine())
    result: dict[str, float | None] = {}
    spent, opened = [], []
    with tempfile.TemporaryDirectory() as directory, StopSignals() as stop:
        work = Path(directory)
        for size in args.sizes:
            fill(work / "filled", size)
            opened.append([f"{size} trials", *opening(work / "filled", size).values()])
            times = trials_in_turn(args, work, size, stop)
            spent.append([f"{size} trials", *times.values()])
            result[f"added_ms_at_{size}"] = times["added"]
            result[f"added_cpu_ms_at_{size}"] = times["added CPU"]
        header = ["", "search", "Optuna", "added", "search CPU", "Optuna CPU", "added CPU"]
        common.print_table(f"ms a trial of {args.reports} reports", header, spent)
        header = ["", "open", "--status", "summary"]
        common.print_table("ms", header, opened)
        if args.memory_trials:
            for name in ("search", "optuna"):
                result[f"{name}_mib"] = memory_of(name, args.memory_trials, work)
            rows = [[name, result[f"{name}_mib"]] for name in ("search", "optuna")]
            title = f"memory that {args.memory_trials} trials take, MiB"
            common.print_table(title, ["", ""], rows)
    common.print_result(**result)
    return 0


# ------------------------------------------------------------------------------------- the studies


def fill(directory: Path, size: int) -> None:
    """Bring a search up to so many complete trials, each different.

    Written into Optuna's tables at once: by Optuna itself 3,000 trials would take minutes.
    """
    directory.mkdir(exist_ok=True)
    study = open_study(directory)
    study.set_user_attr("settings", settings_of(SPACE))
    study.set_user_attr("run", {"n_trials": size, "n_jobs": 1})
    have = len(study.get_trials(deepcopy=False))
    memory = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=have))
    with closing(sqlite3.connect(directory / DATABASE)) as connection, connection:
        for number in range(have, size):
            add_finished(connection, number, memory)
            trial_dir = directory / f"trial_{number:03d}"
            trial_dir.mkdir()
            (trial_dir / "trial.json").write_text("{}")


def add_finished(connection: sqlite3.Connection, number: int, memory: optuna.Study) -> None:
    """Add a complete trial to the first study of a database; a trial's id is number + 1."""
    trial = memory.ask()
    suggest(trial, SPACE)
    drawn = memory.tell(trial, state=TrialState.FAIL)
    now = "2026-01-01 00:00:00.000000"
    values = [value_of(number, epoch) for epoch in range(1, EPOCHS + 1)]
    attributes = {"draw": number, "seed": number, "epochs": EPOCHS}
    insert = partial(insert_rows, connection, number + 1)
    connection.execute(
        "INSERT INTO trials (trial_id, number, study_id, state, datetime_start,"
        " datetime_complete) VALUES (?, ?, 1, 'COMPLETE', ?, ?)",
        (number + 1, number, now, now),
    )
    params = [
        (name, d.to_internal_repr(drawn.params[name]), distribution_to_json(d))
        for name, d in drawn.distributions.items()
    ]
    insert("trial_params", "param_name, param_value, distribution_json", params)
    insert("trial_user_attributes", "key, value_json", list(attributes.items()))
    insert("trial_values", "objective, value, value_type", [(0, values[-1], "FINITE")])
    insert(
        "trial_intermediate_values",
        "step, intermediate_value, intermediate_value_type",
        [(epoch, value, "FINITE") for epoch, value in enumerate(values, 1)],
    )


def insert_rows(
    connection: sqlite3.Connection,
    trial_id: int,
    table: str,
    columns: str,
    rows: Sequence[tuple[Any, ...]],
) -> None:
    marks = ", ".join("?" * (1 + len(rows[0])))
    connection.executemany(
        f"INSERT INTO {table} (trial_id, {columns}) VALUES ({marks})",
        [(trial_id, *row) for row in rows],
    )


def value_of(number: int, epoch: int) -> float:
    """Give a curve that no pruner ends: every trial is a little better than those before."""
    return 0.5 + 1e-5 * number + 0.01 * epoch + 1e-7 * random.Random(number).random()


def settings_of(space: Space) -> dict[str, Any]:
    return {
        "epochs": EPOCHS,
        "patience": EPOCHS,
        "weights": "none",
        "precision": {},
        "space": space.to_dict(),
    }


# ----------------------------------------------------------------------------------- the two sides


class InstantChild:
    """Stands for a trial's process; the trial takes no time."""

    def __init__(self, work: str, argument: Any) -> None:
        pass

    def order(self, order: str) -> None:
        pass


def search_side(
    directory: Path, stop: StopSignals, reports: int = EPOCHS
) -> tuple[Search, Callable[[], None]]:
    """Give a search, and what runs one trial of it."""
    none = np.zeros(0, np.int64)
    plan = Plan(
        checkpoint_dir=directory,
        data=LineSet(Path(), 64, none, none, none, none, none, (), (), "fingerprint", {}),
        space=SPACE,
        settings=settings_of(SPACE),
        n_trials=1_000_000,
        slots=((),),
        ranks=1,
        threads=1,
        sampler="tpe",
        seed=0,
        timeout=None,
        trial_timeout=None,
        stop_at=math.inf,
        max_consecutive_failed_trials=5,
        kept_models=None,
        provenance={},
    )
    study = open_study(directory)
    study.pruner = make_pruner("median", EPOCHS)
    settle_unfinished(study, directory)
    supply = LocalSupply(study, plan)
    running_search = Search(plan, stop, supply)

    def trial() -> None:
        running_search.start_next()
        running = running_search.runner.running[0]
        for epoch in range(1, reports + 1):
            metrics = {"macro_top1": value_of(running.number, epoch)}
            report = Report(epoch, metrics | {"train_loss": 1.0, "seconds": 1.0}, again=False)
            running_search.hear_report(running, report)
        del running_search.runner.running[0]
        running_search.hear_end(running, Complete(metrics))

    return running_search, trial


def optuna_side(directory: Path, reports: int = EPOCHS) -> Callable[[], None]:
    """Give what does the same calls with nothing around them."""
    study = open_study(directory)
    study.sampler = make_sampler("tpe", 0)
    study.pruner = make_pruner("median", EPOCHS)

    def trial() -> None:
        asked = study.ask()
        suggest(asked, SPACE)
        for epoch in range(1, reports + 1):
            asked.report(value_of(asked.number, epoch), epoch)
            asked.should_prune()
        study.tell(asked, value_of(asked.number, EPOCHS))

    return trial


@contextmanager
def instant_trials() -> Iterator[None]:
    with mock.patch.object(runner, "ChildProcess", InstantChild), silent():
        yield


def trials_in_turn(
    args: argparse.Namespace, work: Path, size: int, stop: StopSignals
) -> dict[str, float]:
    """Give ms a trial of both sides; the first trial of each is not counted."""
    for name in ("search", "optuna"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir()
        shutil.copy(work / "filled" / DATABASE, work / name / DATABASE)
    for trial_dir in (work / "filled").glob("trial_*"):
        shutil.copytree(trial_dir, work / "search" / trial_dir.name)
    with instant_trials():
        sides = {
            "search": search_side(work / "search", stop, args.reports)[1],
            "optuna": optuna_side(work / "optuna", args.reports),
        }
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                wall, cpu = time.perf_counter(), time.process_time()
                sides[name]()
                spent = time.perf_counter() - wall, time.process_time() - cpu
                if number > 0:
                    measured[name].append(spent)
    times = {}
    for clock, unit in enumerate(("", " CPU")):
        ours, bare = ([1000 * m[clock] for m in measured[n]] for n in ("search", "optuna"))
        times[f"search{unit}"], times[f"optuna{unit}"] = median(ours), median(bare)
        times[f"added{unit}"] = median(a - b for a, b in zip(ours, bare, strict=True))
    return times


# ------------------------------------------------------------------------------ opening and memory


def opening(directory: Path, size: int) -> dict[str, float]:
    """Give ms of opening the study as a search does, of `--status`, of writing the summary."""

    def open_it() -> None:
        study = open_study(directory)
        settle_unfinished(study, directory)
        assert len(read_database(directory / DATABASE).rows) == size

    rows = read_database(directory / DATABASE).rows
    sides = {
        "open": open_it,
        "status": lambda: status_text(read_status(directory)),
        "summary": lambda: SummaryFiles(directory, SPACE.fixed).write(rows),
    }
    return {
        name: 1000 * min(common.seconds_of(work) for _ in range(3)) for name, work in sides.items()
    }


def memory_of(name: str, trials: int, work: Path) -> float:
    """Give by how many MiB a fresh process grows, after some trials to warm up."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    directory = work / f"{name}_memory"
    directory.mkdir()
    process = context.Process(target=grow, args=(theirs, name, trials, directory))
    process.start()
    theirs.close()
    grown: float = ours.recv()
    process.join()
    return grown


def grow(connection: Connection, name: str, trials: int, directory: Path) -> None:
    with StopSignals() as stop, instant_trials():
        trial = (
            search_side(directory, stop, MEMORY_REPORTS)[1]
            if name == "search"
            else optuna_side(directory, MEMORY_REPORTS)
        )
        for _ in range(max(1, trials // 10)):
            trial()
        before = common.memory_mib("RssAnon")
        for _ in range(trials):
            trial()
        connection.send(common.memory_mib("RssAnon") - before)


if __name__ == "__main__":
    raise SystemExit(main())
