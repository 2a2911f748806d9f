"""The user's own look into the database, while a search runs and after whatever becomes of it."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from test_search import Run, run, trials_of

from hyperparameter_search import main
from writer_search.study import recorder
from writer_search.study.store import open_study

__all__ = ["run"]  # the fixture


def look(database: Path) -> list[tuple[int, str, float | None]]:
    """Look as the users' notes have it."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT trial_id, state, value FROM trials;").fetchall()


def test_users_query_answers_while_a_search_runs_and_afterwards(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    write = recorder.write_record

    def looking(directory: Path, trial: Any) -> None:
        seen.append((look(directory / "optuna_study.db")[trial.number], trial.value))
        write(directory, trial)

    monkeypatch.setattr(recorder, "write_record", looking)
    assert run(n_trials="2") == 0
    directory = tmp_path / "c"
    database = directory / "optuna_study.db"
    assert [row for row, _ in seen] == [
        (number + 1, "COMPLETE", value) for number, (_, value) in enumerate(seen)
    ]
    known = look(database)
    assert known == [(number + 1, state, value) for number, state, value in trials_of(directory)]
    optuna.storages.RDBStorage(f"sqlite:///{database}").upgrade()
    assert look(database) == known
    shutil.copy(database, tmp_path / "copy.db")
    assert look(tmp_path / "copy.db") == known
    database.unlink()
    assert main(["--recover", "--checkpoint_dir", str(directory)]) == 0
    assert look(database) == known


def test_value_follows_optuna(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    trial = study.ask()
    study.tell(trial, 0.25)
    study.tell(study.ask(), state=TrialState.FAIL)
    database = tmp_path / "optuna_study.db"
    assert look(database) == [(1, "COMPLETE", 0.25), (2, "FAIL", None)]
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE trial_values SET value = 0.75")
    assert look(database)[0] == (1, "COMPLETE", 0.75)
    assert open_study(tmp_path).trials[0].value == 0.75
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DELETE FROM trial_values")
    assert look(database)[0] == (1, "COMPLETE", None)


@pytest.mark.parametrize("lost", ["triggers", "all", "value"])
def test_column_is_made_for_a_database_that_has_none(lost: str, tmp_path: Path) -> None:
    """Begun before it was there, or with tables that an upgrade has built anew."""
    study = open_study(tmp_path)
    database = tmp_path / "optuna_study.db"
    study.tell(study.ask(), 0.5)
    with closing(sqlite3.connect(database)) as connection, connection:
        if lost == "value":
            connection.execute("UPDATE trials SET value = 0.9")
        for name in () if lost == "value" else ("inserted", "updated", "deleted"):
            connection.execute(f"DROP TRIGGER value_of_trial_{name}")
        if lost == "all":
            connection.execute("ALTER TABLE trials DROP COLUMN value")
    study = open_study(tmp_path)
    study.tell(study.ask(), 0.25)
    assert look(database) == [(1, "COMPLETE", 0.5), (2, "COMPLETE", 0.25)]
