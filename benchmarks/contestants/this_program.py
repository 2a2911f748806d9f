"""Reads what this program's search holds for its results."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from benchmarks.contestants.job import Job, run_script

# Of a choice the database has the number, which is the configuration's.
QUERY = """
    SELECT param_value, value FROM trials JOIN trial_params USING (trial_id)
    WHERE state = 'COMPLETE' AND param_name = 'learning_rate'
"""


def search(job: Job, directory: Path) -> None:
    raise NotImplementedError("hyperparameter_search.py is the command")


def results(job: Job, directory: Path) -> list[tuple[int, float]]:
    with closing(sqlite3.connect(directory / "optuna_study.db")) as database:
        return [(int(number), value) for number, value in database.execute(QUERY)]


if __name__ == "__main__":
    run_script(search, results)
