"""Finished searches without a training: what plots and the report read, made up."""

from __future__ import annotations

import json
import math
import random
import shutil
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from writer_search.common.files import write_json
from writer_search.lines.predictions import write_predictions
from writer_search.results.rows import trial_dir
from writer_search.study.store import open_study

DISTRIBUTIONS = {
    "backbone": CategoricalDistribution(("resnet_thin", "resnet18", "resnet34")),
    "learning_rate": FloatDistribution(5e-4, 5e-3, log=True),
    "weight_decay": FloatDistribution(1e-3, 0.3, log=True),
    "label_smoothing": FloatDistribution(0.0, 0.2),
    "dropout": FloatDistribution(0.0, 0.5),
    "augment_geometry": FloatDistribution(0.5, 1.5),
    "augment_photometry": FloatDistribution(0.5, 1.5),
    "mixup": CategoricalDistribution((False, True)),
    "mixup_alpha": FloatDistribution(0.05, 0.4, log=True),
}
START = datetime(2026, 1, 2, 3, 4, 5)
EPOCHS = 20


def leave_journal(database: Path) -> None:
    """Leave a journal beside a database, as a kill within a transaction does.

    Whoever opens the database with it there undoes what the journal says.
    """
    copy = database.with_name("copy.db")
    shutil.copy(database, copy)
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")  # the journal is written at once
        connection.execute("BEGIN")
        connection.execute("UPDATE trials SET state = 'RUNNING'")
        shutil.copy(f"{copy}-journal", f"{database}-journal")
    copy.unlink()


def make_search(
    directory: Path,
    trials: int,
    writers: int | list[str] = 5,
    *,
    states: bool = True,
    confusion: bool = True,
    predictions: bool = False,
) -> optuna.Study:
    """Write a search of so many trials: database, trial directories, data report.

    predictions: let complete trials leave predictions.csv, of two pages a writer.
    states: let the 4th of every 7 trials fail and the 6th be pruned; otherwise all are complete.
    """
    directory.mkdir(parents=True, exist_ok=True)
    study = open_study(directory)
    names = [f"writer_{i + 1:03d}" for i in range(writers)] if isinstance(writers, int) else writers
    generator = random.Random(trials)
    space = {name: _rule(distribution) for name, distribution in DISTRIBUTIONS.items()}
    settings = {"epochs": EPOCHS, "weights": "none", "data": {"writers": len(names)}}
    study.set_user_attr("settings", {**settings, "space": {**space, "line_height": 64}})
    study.set_user_attr("run", {"n_trials": trials, "n_jobs": 1})
    for number in range(trials):
        state = TrialState.COMPLETE
        if states and number % 7 in (3, 5):
            state = TrialState.FAIL if number % 7 == 3 else TrialState.PRUNED
        _add_trial(study, directory, number, state, names, generator, confusion, predictions)
    report = {
        "lines": {"train": 60 * len(names), "val": 20 * len(names), "test": 20 * len(names)},
        "pages": 10 * len(names),
        "writers": {name: {"train": 60, "val": 20, "test": 20} for name in names},
        "writers_without_validation": [],
        "broken": {f"/lines/train/{names[0]}/p1/line_001.png": "truncated"},
        "pages_in_two_splits": 0,
        "books_in_two_splits": 2,
        "images_in_two_splits": 0,
        "identical_images": 0,
    }
    (directory / "summary").mkdir(exist_ok=True)
    write_json(directory / "summary" / "data_report.json", report)
    return study


def _rule(distribution: Any) -> dict[str, Any]:
    if isinstance(distribution, CategoricalDistribution):
        return {"choices": list(distribution.choices)}
    return {"low": distribution.low, "high": distribution.high, "log": distribution.log}


def _write_predictions(directory: Path, writers: list[str], counts: list[list[int]]) -> None:
    lines = [
        (true, guessed)
        for true, row in enumerate(counts)
        for guessed, number in enumerate(row)
        for _ in range(number)
    ]
    paths = [
        f"val/{writers[true]}/page_{i % 2}/line_{i:03d}.png" for i, (true, _) in enumerate(lines)
    ]
    found = [
        (float(guessed), 0.4 + 0.5 * (i % 7) / 7, 0.2, float(true))
        for i, (true, guessed) in enumerate(lines)
    ]
    write_predictions(directory, paths, [true for true, _ in lines], writers, found)


def _add_trial(
    study: optuna.Study,
    directory: Path,
    number: int,
    state: TrialState,
    writers: list[str],
    generator: random.Random,
    confusion: bool,
    predictions: bool,
) -> None:
    params = _draw(generator)
    limit = 0.985 - 0.15 * abs(math.log(params["learning_rate"] / 2e-3)) / 1.4
    limit -= 0.03 * params["dropout"] + generator.random() * 0.02
    if generator.random() < 0.05:
        limit = 0.2
    epochs = EPOCHS if state == TrialState.COMPLETE else 6
    values = {
        epoch: limit * (1 - 0.9 * math.exp(-epoch / 3)) + generator.gauss(0, 0.004)
        for epoch in range(1, epochs + 1)
    }
    attributes: dict[str, Any] = {"epochs": epochs, "draw": number, "seed": number}
    if state == TrialState.FAIL:
        attributes["failure"] = f"loss is nan in epoch {epochs}"
    duration = timedelta(seconds=epochs * generator.uniform(20, 35))
    start = START + timedelta(minutes=11 * number)
    values = {epoch: min(max(value, 0.0), 1.0) for epoch, value in values.items()}
    value = max(values.values()) if state == TrialState.COMPLETE else None
    trial = create_trial(
        state=state,
        value=value,
        params=params,
        distributions={name: DISTRIBUTIONS[name] for name in params},
        intermediate_values=values,
        user_attrs=attributes,
    )
    trial.datetime_start, trial.datetime_complete = start, start + duration
    study.add_trial(trial)
    own = trial_dir(directory, number)
    own.mkdir(exist_ok=True)
    write_json(own / "config.json", _config(number, params))
    history = [_epoch(epoch, value) for epoch, value in values.items()]
    (own / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    if state == TrialState.FAIL:
        (own / "error.log").write_text(
            f"when:   2026-01-02\nepochs: {epochs} done\ncause:  {attributes['failure']}\n"
            "try:    a lower learning rate\n\nTraceback:\n  File <train>\n"
        )
    if value is not None:
        best = history[-1] | _per_writer(writers, value, generator, confusion)
        write_json(own / "metrics.json", {"value": value, "best": best, "epochs": epochs})
        if predictions:
            _write_predictions(own, writers, best["confusion"]["counts"])


def _draw(generator: random.Random) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, distribution in DISTRIBUTIONS.items():
        if name == "mixup_alpha" and not params["mixup"]:
            continue
        if isinstance(distribution, CategoricalDistribution):
            params[name] = generator.choice(distribution.choices)
        elif distribution.log:
            ends = math.log(distribution.low), math.log(distribution.high)
            params[name] = math.exp(generator.uniform(*ends))
        else:
            params[name] = generator.uniform(distribution.low, distribution.high)
    return params


def _config(number: int, params: dict[str, Any]) -> dict[str, Any]:
    return {
        "number": number,
        "hyperparameters": params,
        "config": {"seed": number, "epochs": EPOCHS, **params},
        "device": "cpu",
        "data_root": "lines",
        "command": ["hyperparameter_search.py", "--data_root", "my lines", "--n_trials", "12"],
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "data_fingerprint": "fedcba9876543210",
        "host": "workstation",
        "device_names": [],
        "versions": {"python": "3.12.1", "optuna": "5.0.0", "cuda": None},
    }


def _epoch(epoch: int, value: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "train_loss": 3 * math.exp(-epoch / 6) + 0.3,
        "loss": 3.2 * math.exp(-epoch / 6) + 0.4,
        "macro_top1": value,
        "macro_top5": min(1.0, value + 0.02),
        "micro_top1": value,
        "page_macro_top1": min(1.0, value + 0.01),
        "learning_rate": 1e-3 * (1 + math.cos(math.pi * epoch / EPOCHS)),
        "seconds": 25.0,
    }


def _per_writer(
    writers: list[str], value: float, generator: random.Random, confusion: bool
) -> dict[str, Any]:
    counts = [[0] * len(writers) for _ in writers]
    for true, row in enumerate(counts):
        share = min(1.0, max(0.0, generator.gauss(value, 0.05)))
        row[true] = round(20 * share)
        for _ in range(20 - row[true]):
            row[generator.randrange(len(writers))] += 1
    found: dict[str, Any] = {"per_writer": {w: counts[i][i] / 20 for i, w in enumerate(writers)}}
    if confusion:
        found["confusion"] = {"writers": writers, "counts": counts}
    return found
