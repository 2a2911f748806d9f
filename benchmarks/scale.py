"""How many searches does a storage carry? Simulated workers, no training, on one machine.

Each worker does to the storage what a search does: it claims a trial (with the real code: a draw,
stored whole, compared with the others'), reports epochs with a look at the pruner, writes signs of
life, tells. Between these it sleeps. A trial of --trial_seconds with --epochs epochs is compressed:
all sleeps are divided by --compress, so that the load is that of `workers * compress` real ones.

    python -m benchmarks.scale --storage sqlite --workers 4
    python -m benchmarks.scale --storage postgresql --workers 64

Prints one JSON object. Workers are threads of a few processes, each with a storage connection of
its own; draws are random, because what is measured is the storage, not the sampler.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import MedianPruner

from tests.servers import PostgreSQL
from writer_search.flags import STUDY_NAME
from writer_search.results.rows import is_surplus
from writer_search.space import default_space
from writer_search.study.draws import Drawer, params_key
from writer_search.study.shared.fleet import Fleet
from writer_search.study.shared.storage import (
    PatientStorage,
    create_shared_study,
    opened_storage,
)

PROCESSES = 4


@contextmanager
def server(kind: str) -> Iterator[str]:
    """Start what a kind of storage needs; gives its URL."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as directory:
            yield f"sqlite:///{directory}/study.db"
        return
    postgresql = PostgreSQL(max_connections=1200)
    try:
        yield postgresql.make_database("scale")
    finally:
        postgresql.remove()


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """Open a storage as a search does; SQLite too, which a search refuses to share."""
    if not url.startswith("sqlite"):
        with opened_storage(url) as storage:
            yield storage
        return
    engine = {"connect_args": {"timeout": 60}}
    database = optuna.storages.RDBStorage(url, engine_kwargs=engine)
    try:
        yield PatientStorage(optuna.storages.get_storage(database), url, None)
    finally:
        database.engine.dispose()


def work(
    url: str, args: argparse.Namespace, salt: int, ready: threading.Barrier, told: dict[str, Any]
) -> None:
    """Be one worker; appends latencies and errors to `told`."""
    epoch_seconds = args.trial_seconds / args.epochs / args.compress
    with ExitStack() as stack:
        try:
            storage = stack.enter_context(opened(url))
            study = optuna.load_study(
                study_name=STUDY_NAME, storage=storage, pruner=MedianPruner(5, args.epochs // 5)
            )
            drawer = Drawer(default_space("cpu", False), "random", 0, salt=[salt])
            fleet = Fleet(study, drawer, 10**6, Path("."))
            ready.wait()
            until = told["began"] + args.seconds
            # All start within half of the time, or of a trial: as an array of jobs does.
            time.sleep(random.uniform(0, min(args.seconds / 2, epoch_seconds * args.epochs)))
            while time.monotonic() < until:
                one_trial(fleet, args.epochs, epoch_seconds, until, told)
        except Exception as error:
            ready.abort()
            told["failures"].append(f"{type(error).__name__}: {error}"[:200])


def one_trial(
    fleet: Fleet, epochs: int, epoch_seconds: float, until: float, told: dict[str, Any]
) -> None:
    began = time.monotonic()
    trial = fleet.claim()
    told["ask"].append(time.monotonic() - began)
    assert trial is not None
    value = random.random()
    for epoch in range(1, epochs + 1):
        pause = epoch_seconds * random.uniform(0.8, 1.2)
        time.sleep(max(0.0, min(pause, until - time.monotonic())))
        if time.monotonic() >= until:
            return
        began = time.monotonic()
        trial.report(value * epoch / epochs, epoch)
        trial.should_prune()
        fleet.sign(trial)
        told["report"].append(time.monotonic() - began)
    began = time.monotonic()
    fleet.study.tell(trial.number, value)
    told["tell"].append(time.monotonic() - began)


def work_in_threads(
    url: str, args: argparse.Namespace, first: int, count: int, everybody: Any, results: Any
) -> None:
    """Be several workers; puts what they found."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    told: dict[str, Any] = {"ask": [], "report": [], "tell": [], "failures": []}

    def begin() -> None:
        everybody.wait()
        told["began"] = time.monotonic()

    ready = threading.Barrier(count, action=begin)  # the time begins when all are connected
    threads = [
        threading.Thread(target=work, args=(url, args, first + n, ready, told), daemon=True)
        for n in range(count)
    ]
    for thread in threads:
        thread.start()
    while "began" not in told and not told["failures"]:
        time.sleep(0.05)
    until = told.get("began", time.monotonic()) + args.seconds
    for thread in threads:
        thread.join(max(0.0, until + 20 - time.monotonic()))
    told["stuck"] = sum(thread.is_alive() for thread in threads)
    results.put(told)
    results.close()
    results.join_thread()
    os._exit(0)  # stuck threads and all


def milliseconds(seconds: list[float]) -> list[float] | None:
    """Give median and 95th percentile."""
    if not seconds:
        return None
    return [round(1000 * float(q), 1) for q in np.quantile(seconds, [0.5, 0.95])]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the workers, then look at what they left."""
    with server(args.storage) as url:
        with opened(url) as storage:
            create_shared_study(storage, STUDY_NAME, {})
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        share = [
            args.workers // PROCESSES + (n < args.workers % PROCESSES) for n in range(PROCESSES)
        ]
        everybody = context.Barrier(sum(count > 0 for count in share))
        processes = [
            context.Process(
                target=work_in_threads, args=(url, args, 1000 * n, count, everybody, results)
            )
            for n, count in enumerate(share)
            if count
        ]
        for process in processes:
            process.start()
        told = [results.get() for _ in processes]
        for process in processes:
            process.join()
        with opened(url) as storage:
            study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
            trials = study.get_trials(deepcopy=False)
    merged = {key: [x for one in told for x in one[key]] for key in ("ask", "report", "tell")}
    failures = [text for one in told for text in one["failures"]]
    kept = [trial for trial in trials if not is_surplus(trial)]
    numbers = {trial.number for trial in trials}
    return {
        "storage": args.storage,
        "workers": args.workers,
        "as_real_workers": round(args.workers * args.compress),
        "trial_seconds": args.trial_seconds,
        "epochs": args.epochs,
        "seconds": args.seconds,
        "asks": len(merged["ask"]),
        "asks_per_second": round(len(merged["ask"]) / args.seconds, 2),
        "reports_per_second": round(len(merged["report"]) / args.seconds, 1),
        "ask_ms": milliseconds(merged["ask"]),
        "report_ms": milliseconds(merged["report"]),
        "tell_ms": milliseconds(merged["tell"]),
        "failures": len(failures),
        "first_failure": failures[0] if failures else None,
        "stuck": sum(one["stuck"] for one in told),
        "withdrawn": len(trials) - len(kept),
        "duplicates": len(kept) - len({params_key(trial.params) for trial in kept}),
        "numbers_twice": len(trials) - len(numbers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--storage", choices=("sqlite", "postgresql"), required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring")
    parser.add_argument("--trial_seconds", type=float, default=1200.0, help="of a real trial")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--compress", type=float, default=60.0, help="divide all sleeps by this")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
