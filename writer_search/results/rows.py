"""Reads a search's database and files, and keeps its summary: table of trials, best trial.

Imports neither torch nor Optuna, so that `--status` answers at once.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from writer_search.common.errors import UserError
from writer_search.common.text import one_line

DATABASE = "optuna_study.db"
UNFINISHED = ("RUNNING", "WAITING")


@dataclass(frozen=True)
class Row:
    """One trial for people. Times are aware; `value` is a fraction, of a COMPLETE trial only."""

    number: int
    state: str
    value: float | None
    params: dict[str, Any]
    started: datetime | None
    ended: datetime | None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        if self.started is None:
            return None
        ended = self.ended or datetime.now(UTC)
        return max(0.0, (ended - self.started).total_seconds())


def trial_dir(checkpoint_dir: Path, number: int) -> Path:
    """Give a trial's directory."""
    return checkpoint_dir / f"trial_{number:03d}"


def home_of(attributes: Mapping[str, Any], checkpoint_dir: Path) -> Path:
    """Give the checkpoint directory that a trial's own search writes to.

    Where several searches share a study, each trial names it: not this search's, and not
    necessarily one that can be reached from here.
    """
    return Path(attributes.get("owner", {}).get("checkpoint_dir", checkpoint_dir))


def best_row(rows: Sequence[Row]) -> Row | None:
    """Give the complete trial with the highest value, the earliest of equals."""
    complete = [row for row in rows if row.state == "COMPLETE" and row.value is not None]
    return max(complete, key=lambda row: (row.value, -row.number), default=None)


# ----------------------------------------------------------------------------- reading a database


@contextmanager
def _readable(database: Path) -> Iterator[sqlite3.Connection]:
    """Open a database for reading only. Raises sqlite3.DatabaseError, also for broken contents."""
    with _opened(database) as connection:
        try:
            yield connection
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise sqlite3.DatabaseError(f"its contents make no sense: {error!r}") from error


@contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    """Open a database for reading only, also one whose writer was killed in a transaction.

    Such a one has a journal to be rolled back, which reading only forbids: a copy is read then.
    """
    journal = database.with_name(database.name + "-journal")
    uri = f"file:{_quoted(database)}?mode=ro"
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(closing(sqlite3.connect(uri, uri=True, timeout=10)))
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            if not journal.exists():
                raise
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for file in (database, journal):
                if file.exists():
                    shutil.copy(file, directory / file.name)
            connection = stack.enter_context(closing(sqlite3.connect(directory / database.name)))
        yield connection


def copy_database(database: Path, target: sqlite3.Connection) -> None:
    """Copy a database, also a live one, without writing to it."""
    with _readable(database) as connection:
        connection.backup(target)


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def read_study(database: Path) -> dict[str, Any]:
    """Read what the study recorded about itself; empty where it has recorded nothing."""
    with _readable(database) as connection:
        try:
            found = connection.execute("SELECT key, value_json FROM study_user_attributes")
            return {key: json.loads(value_json) for key, value_json in found}
        except sqlite3.OperationalError:  # killed before Optuna made its tables
            return {}


def read_rows(database: Path, numbers: Collection[int] | None = None) -> list[Row]:
    """Read trials of the study, in order: all, or those that have the numbers."""
    chosen = "" if numbers is None else f" WHERE t.number IN ({_listed(numbers)})"
    with _readable(database) as connection:
        try:
            trials = connection.execute(
                "SELECT t.trial_id, t.number, t.state, v.value, t.datetime_start,"
                " t.datetime_complete FROM trials t LEFT JOIN trial_values v USING (trial_id)"
                f"{chosen} ORDER BY t.number"
            ).fetchall()
        except sqlite3.OperationalError:
            return []
        # By id, which the tables have an index for.
        chosen = "" if numbers is None else f" WHERE trial_id IN ({_listed(t[0] for t in trials)})"
        params: dict[int, dict[str, Any]] = {}
        for trial_id, name, value, distribution in connection.execute(
            f"SELECT trial_id, param_name, param_value, distribution_json FROM trial_params{chosen}"
        ):
            params.setdefault(trial_id, {})[name] = _external(value, distribution)
        attributes: dict[int, dict[str, Any]] = {}
        for trial_id, key, value_json in connection.execute(
            f"SELECT trial_id, key, value_json FROM trial_user_attributes{chosen}"
        ):
            attributes.setdefault(trial_id, {})[key] = json.loads(value_json)
        return [
            Row(
                number,
                state,
                value if state == "COMPLETE" else None,
                params.get(trial_id, {}),
                _utc(started),
                _utc(ended),
                attributes.get(trial_id, {}),
            )
            for trial_id, number, state, value, started, ended in trials
        ]


def read_recorded(checkpoint_dir: Path) -> tuple[list[Row], dict[str, Any]]:
    """Read a search's trials, and what its study recorded about itself. Raises UserError."""
    database = checkpoint_dir / DATABASE
    if not database.exists():
        raise UserError(f"{checkpoint_dir} holds no search ({DATABASE} is not there)")
    try:
        return read_rows(database), read_study(database)
    except sqlite3.DatabaseError as error:
        raise UserError(f"{database} cannot be read: {one_line(error)}") from None


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _external(value: float, distribution: str) -> Any:
    """Turn Optuna's stored number into the parameter's value."""
    described = json.loads(distribution)
    if described["name"] == "CategoricalDistribution":
        return described["attributes"]["choices"][int(value)]
    return int(value) if described["name"] == "IntDistribution" else value


def _utc(stored: str | None) -> datetime | None:
    """Optuna stores naive UTC."""
    return datetime.fromisoformat(stored).replace(tzinfo=UTC) if stored else None


def read_history(directory: Path) -> list[dict[str, Any]]:
    """Read a trial's history.jsonl; empty when it has none yet, or one that is not ours."""
    try:
        lines = (directory / "history.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        return []
    return rows if all(_is_epoch(row, number) for number, row in enumerate(rows, 1)) else []


def _is_epoch(row: Any, number: int) -> bool:
    if not isinstance(row, dict) or row.get("epoch") != number:
        return False
    value = row.get("macro_top1")
    return isinstance(value, float) and 0 <= value <= 1
