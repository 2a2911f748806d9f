"""Reads a search's database and files, and keeps its summary: table of trials, best trial.

Imports neither torch nor Optuna, so that `--status` answers at once.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from writer_search.common.files import UserError, one_line, read_json, write_json, write_text

DATABASE = "optuna_study.db"
STUDY_NAME = "writer_identification"
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


# -------------------------------------------------------------------------------- summary's files


class SummaryFiles:
    """Keeps summary/trials.csv and summary/best_trial.json up to date.

    A row is formatted when it is new or another one than before, and best_trial.json is written
    when the best trial is: a search of thousands of trials spends no longer on it than one of ten.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self._checkpoint_dir = checkpoint_dir
        self._names: set[str] = set()  # of hyperparameters: the columns
        self._lines: dict[int, tuple[Row, str]] = {}  # by the trial's number
        self._best: Row | None = None

    def write(self, rows: Sequence[Row]) -> None:
        """Write what the rows change. Raises OSError."""
        directory = self._checkpoint_dir / "summary"
        directory.mkdir(exist_ok=True)
        write_text(directory / "trials.csv", self._table(rows))
        best = best_row(rows)
        if best is not None and best != self._best:
            write_json(directory / "best_trial.json", _described(best, self._checkpoint_dir))
            self._best = best

    def _is_known(self, row: Row) -> bool:
        known = self._lines.get(row.number)
        return known is not None and (known[0] is row or known[0] == row)

    def _table(self, rows: Sequence[Row]) -> str:
        changed = [row for row in rows if not self._is_known(row)]
        names = self._names.union(*(row.params for row in changed))
        if names != self._names:
            self._names, changed = names, list(rows)
        columns = sorted(self._names)
        for row in changed:
            self._lines[row.number] = (row, _csv_line(_cells(row, columns)))
        header = ["number", "state", "value", "epochs", "seconds", *columns, "failure"]
        return _csv_line(header) + "".join(self._lines[row.number][1] for row in rows)


def write_summary(checkpoint_dir: Path, rows: Sequence[Row]) -> None:
    """Write summary/trials.csv and, once a trial is complete, summary/best_trial.json."""
    SummaryFiles(checkpoint_dir).write(rows)


def _described(best: Row, checkpoint_dir: Path) -> dict[str, Any]:
    directory = trial_dir(Path(), best.number).name
    return {
        "number": best.number,
        "value": best.value,
        "metric": "validation macro top-1 accuracy",
        "params": best.params,
        "config": _config(home_of(best.attributes, checkpoint_dir) / directory),
        "seconds": best.seconds,
        "directory": directory,
        "model": f"{directory}/best_model.pth",
    }


def _config(directory: Path) -> Any:
    """Give a trial's whole configuration, what was fixed included."""
    try:
        return read_json(directory / "config.json")["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cells(row: Row, columns: Sequence[str]) -> list[Any]:
    return [
        row.number,
        row.state,
        "" if row.value is None else row.value,
        row.attributes.get("epochs", ""),
        f"{row.seconds:.1f}" if row.ended and row.seconds is not None else "",
        *(row.params.get(name, "") for name in columns),
        row.attributes.get("failure", ""),
    ]


def _csv_line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def remove_weights(
    checkpoint_dir: Path,
    rows: Sequence[Row],
    kept: int,
    running: Collection[int],
    removed: set[int],
) -> None:
    """Delete the weights of finished trials that are not among the best `kept`.

    An interrupted trial keeps its own until a trial that continues it has ended by itself.
    `removed` holds the trials that have none any more, and grows: what is not needed once is never
    needed again.
    """
    complete = [row for row in rows if row.state == "COMPLETE" and row.value is not None]
    best = sorted(complete, key=lambda row: (-(row.value or 0.0), row.number))[:kept]
    needed = {row.number for row in best} | set(running)
    interrupted = {row.number for row in rows if row.attributes.get("interrupted")}
    for row in reversed(rows):  # a trial that is continued stands before the one that continues it
        if row.state not in UNFINISHED and row.number not in interrupted:
            interrupted.discard(row.attributes.get("continues"))
    needed |= interrupted
    needed |= removed
    for row in rows:
        if row.state not in UNFINISHED and row.number not in needed:
            for weights in trial_dir(checkpoint_dir, row.number).glob("*.pth"):
                weights.unlink(missing_ok=True)
            removed.add(row.number)


# -------------------------------------------------------------------------------------- for people


def percent(value: float | None) -> str:
    return "none yet" if value is None else f"{100 * value:.2f}%"


def duration(seconds: float) -> str:
    """Say a duration in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def shown_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def closing_lines(
    checkpoint_dir: Path, rows: Sequence[Row], n_trials: int, exhausted: bool = False
) -> list[str]:
    """Say how the search stands: counts, the best trial, where things are, what comes next."""
    states = Counter(row.state for row in rows)
    lines = [
        f"Completed trials: {states['COMPLETE']} | pruned: {states['PRUNED']} | "
        f"failed: {states['FAIL']}"
    ]
    best = best_row(rows)
    if best is None:
        lines.append("No trial is complete yet.")
    else:
        lines.append(f"Best trial: {best.number}, validation macro top-1 {percent(best.value)}")
        width = max((len(name) for name in best.params), default=0)
        lines += [f"  {name:<{width}}  {shown_value(v)}" for name, v in best.params.items()]
        home = home_of(best.attributes, checkpoint_dir)
        lines.append(f"Best model: {trial_dir(home, best.number) / 'best_model.pth'}")
    lines.append(f"Summary: {checkpoint_dir / 'summary'}")
    failed = [row for row in rows if row.state == "FAIL" and "failure" in row.attributes]
    lines += [
        f"  trial {row.number} failed: {one_line(row.attributes['failure'], 160)}"
        for row in failed[-3:]
    ]
    missing = max(0, n_trials - states["COMPLETE"])
    if missing and exhausted:
        lines.append(
            f"{missing} of {n_trials} trials still missing, but the space has no other "
            "configuration: widen it in a fresh --checkpoint_dir"
        )
    elif missing:
        lines.append(f"{missing} of {n_trials} trials still missing: the same command runs them.")
    else:
        lines.append("All trials are complete: the same command with a higher --n_trials extends.")
    return lines


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
