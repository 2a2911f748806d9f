"""Claim: the next trial trains at once when one has ended.

    python -m benchmarks.trial_start [--trials 8]

Measures the time from the end of one trial (its process sends its result) to the first batch of the
next (its process asks whether to go on, before the batch) for short trials with a tiny model, in
the real search, and for the same train function in processes that are started afresh (spawn), and
with Ray Tune where it is installed. In the search that time holds all that the loop does between
trials: the study's database, the summary, the draw, the configuration.

JSON: seconds: the search's median. spawn_seconds, ray_seconds (null where it is not installed).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from benchmarks import common
from data import LineSet
from writer_search.common.environment import as_in_a_trial
from writer_search.config import TrialConfig


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_for(__doc__)
    common.add_data_flags(parser)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--spawned", type=int, default=8, help="trials in fresh processes; 0: none")
    parser.add_argument("--backbone", default="tiny")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    print(common.describe_machine())
    with common.line_images(args) as (root, cache_dir), tempfile.TemporaryDirectory() as directory:
        config = common.trial_config("cpu", args.backbone, precision="float32")
        data = common.decoded(root, cache_dir, config.line_height)
        work = Path(directory)
        spans = {
            "this search": search_spans(args, root, cache_dir, work / "search"),
        }
        if args.spawned:
            spans["spawn"] = spawn_spans(args, config, data, work)
        if args.spawned and importlib.util.find_spec("ray") is not None:
            spans["Ray Tune"] = ray_spans(args, config, data, work)
    rows = [[name, median(found), min(found), max(found)] for name, found in spans.items()]
    if "Ray Tune" not in spans:
        rows.append(["Ray Tune", "not measured", "", ""])
    common.print_table(
        "s from a trial's end to the next one's first batch", ["", "median", "least", "most"], rows
    )
    common.print_result(
        seconds=median(spans["this search"]),
        spawn_seconds=median(spans["spawn"]) if "spawn" in spans else None,
        ray_seconds=median(spans["Ray Tune"]) if "Ray Tune" in spans else None,
    )
    return 0


def spans_of(events: Sequence[tuple[str, float]]) -> list[float]:
    """Give the seconds from each "end" to the next "start"."""
    spans, ended = [], None
    for kind, seconds in events:
        if kind == "end":
            ended = seconds
        elif ended is not None:
            spans.append(seconds - ended)
            ended = None
    return spans


# ------------------------------------------------------------------------------------ this search


def search_spans(
    args: argparse.Namespace, root: Path, cache_dir: Path, checkpoint_dir: Path
) -> list[float]:
    """Run the real command in this process, and note when its trials begin and end."""
    from hyperparameter_search import main as search_main

    events: list[tuple[str, float]] = []
    command = [
        *("--data_root", str(root), "--cache_dir", str(cache_dir), "--use_all_writers"),
        *("--checkpoint_dir", str(checkpoint_dir), "--n_trials", str(args.trials)),
        *("--epochs", "1", "--fix", f"backbone={args.backbone}"),
        *("--weights", "none", "--device", "cpu", "--pruner", "none"),
    ]
    with noted_messages(events), silent():
        code = search_main(command)
    if code != 0:
        raise RuntimeError(f"the search ended with exit code {code}")
    return spans_of(events)


@contextlib.contextmanager
def noted_messages(events: list[tuple[str, float]]) -> Iterator[None]:
    """Note the messages of all trials: the first progress, sent before the first batch; the end."""
    from writer_search.processes.messages import Message
    from writer_search.processes.parent import ChildProcess

    receive = ChildProcess.receive

    def noted(child: ChildProcess) -> Message | None:
        message = receive(child)
        if message is not None and message[0] == "progress" and message[1]["progress"] == 0:
            events.append(("start", time.perf_counter()))
        elif message is not None and message[0] == "done":
            events.append(("end", time.perf_counter()))
        return message

    with mock.patch.object(ChildProcess, "receive", noted):
        yield


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


# ------------------------------------------------------------------------------ fresh interpreters


def spawn_spans(
    args: argparse.Namespace, config: TrialConfig, data: LineSet, directory: Path
) -> list[float]:
    """Train in one fresh process after the other."""
    context = get_context("spawn")
    events: list[tuple[str, float]] = []
    for number in range(args.spawned):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=spawned_trial,
            args=(theirs, config, data, directory / f"spawned_{number}", args.threads),
        )
        process.start()
        theirs.close()
        for _ in ("start", "end"):
            events.append((ours.recv(), time.perf_counter()))
        process.join()
        ours.close()
    return spans_of(events)


def spawned_trial(
    connection: Connection, config: TrialConfig, data: LineSet, directory: Path, threads: int
) -> None:
    train_noting(connection.send, config, data, directory, threads)


def train_noting(
    note: Any, config: TrialConfig, data: LineSet, directory: Path, threads: int
) -> None:
    """Train one epoch; note "start" before the first batch, and "end"."""
    from dataclasses import replace

    import torch

    from train import train

    torch.set_num_threads(threads)
    begun = False

    def check(progress: float) -> None:
        nonlocal begun
        if not begun:
            begun = True
            note("start")

    train(replace(config, epochs=1), data, directory, check=check)
    note("end")


def ray_spans(
    args: argparse.Namespace, config: TrialConfig, data: LineSet, directory: Path
) -> list[float]:
    """Run as many trials with Ray Tune, one at a time, which note their times in a file."""
    import ray
    from ray import tune

    notes = directory / "ray_events.txt"

    def note(kind: str) -> None:
        with open(notes, "a") as file:
            file.write(f"{kind} {time.time()}\n")

    def trainable(parameters: dict[str, Any]) -> dict[str, float]:
        number = parameters["number"]
        train_noting(note, config, data, directory / f"ray_{number}", args.threads)
        return {"value": 0.0}

    here = str(Path(__file__).parents[1])
    ray.init(
        num_cpus=args.threads,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": here}},
    )
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": args.threads}),
        param_space={"number": tune.grid_search(list(range(args.spawned)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(directory / "ray"), verbose=0),
    ).fit()
    ray.shutdown()
    lines = [line.split() for line in notes.read_text().splitlines()]
    return spans_of([(kind, float(seconds)) for kind, seconds in lines])


if __name__ == "__main__":
    as_in_a_trial()
    raise SystemExit(main())
