"""Reads a search: its database, and the files of its trials."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from writer_search.common.environment import count_in_utc
from writer_search.common.errors import UserError
from writer_search.common.files import is_there
from writer_search.common.locks import is_without_locks
from writer_search.common.text import one_line
from writer_search.config import COHOG
from writer_search.flags import STUDY_NAME

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

DATABASE = "optuna_study.db"
UNFINISHED = ("RUNNING", "WAITING")
SECONDS = "seconds"  # attribute: how long the trial took, by time.monotonic()
STARTED_BY_CLOCK = "started_by_clock"  # in config.json: see common/clock.py
NONSENSE_SECONDS = 366 * 86400.0  # a clock that began in 1970, and was set


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
        """How long it took, or has taken so far.

        As a clock has measured it that nobody sets; otherwise between two times of the day, unless
        a clock that was set has made nonsense of them.
        """
        measured: object = self.attributes.get(SECONDS)
        if isinstance(measured, float):
            return measured
        if self.started is None:
            return None
        seconds = ((self.ended or datetime.now(UTC)) - self.started).total_seconds()
        return seconds if 0 <= seconds < NONSENSE_SECONDS else None

    @property
    def is_fitted(self) -> bool:
        return is_fitted(self.params, self.attributes)


def is_fitted(params: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
    """Tell a trial without epochs of training; see `TrialConfig.is_fitted`."""
    return bool(params.get("backbone", attributes.get("backbone")) == COHOG)


def trial_dir(checkpoint_dir: Path, number: int) -> Path:
    """Give a trial's directory."""
    return checkpoint_dir / f"trial_{number:03d}"


def has_saved(directory: Path) -> bool:
    """Tell whether a trial has saved a state of its own, beyond the one that it went on from."""
    return is_there(directory / "latest_checkpoint.pth")


def home_of(number: int, attributes: Mapping[str, Any], checkpoint_dir: Path) -> Path:
    """Give the checkpoint directory that a trial's own search writes to.

    Where several searches share a study, each trial names it: not this search's, and not
    necessarily one that can be reached from here. It is this one where only here is the trial's
    directory: the directories were brought together, or moved.
    """
    home = Path(attributes.get("owner", {}).get("checkpoint_dir", checkpoint_dir))
    if home == checkpoint_dir or is_there(trial_dir(home, number) / "config.json"):
        return home
    return checkpoint_dir if is_there(trial_dir(checkpoint_dir, number) / "config.json") else home


def directory_of(number: int, attributes: Mapping[str, Any], checkpoint_dir: Path) -> Path:
    """Give a trial's directory, in its own search's checkpoint directory: see `home_of`."""
    return trial_dir(home_of(number, attributes, checkpoint_dir), number)


def is_interrupted(attributes: Mapping[str, Any]) -> bool:
    """Tell whether a trial did not fail by itself, by its attributes."""
    return bool(attributes.get("interrupted"))


STATES = ("complete", "pruned", "interrupted", "failed", "running", "waiting")


def state_of(row: Row) -> str:
    """Say a trial's state for people: what was interrupted has not failed by itself."""
    if row.state == "FAIL":
        return "interrupted" if is_interrupted(row.attributes) else "failed"
    return row.state.lower()


def is_resumable(attributes: Mapping[str, Any]) -> bool:
    """Tell whether a failed trial is worth going on with, by its attributes."""
    return is_interrupted(attributes) or bool(attributes.get("resumable"))


def count_states(rows: Iterable[Row]) -> Counter[str]:
    """Count trials by their state for people."""
    return Counter(state_of(row) for row in rows)


def count_complete(rows: Iterable[Row]) -> int:
    """Count the trials that are complete."""
    return sum(row.state == "COMPLETE" for row in rows)


def best_first(rows: Iterable[Row]) -> list[Row]:
    """Give the complete trials, the best first, the earliest of equals before."""
    complete = [row for row in rows if row.state == "COMPLETE" and row.value is not None]
    return sorted(complete, key=lambda row: (-(row.value or 0.0), row.number))


def best_row(rows: Iterable[Row]) -> Row | None:
    """Give the complete trial with the highest value, the earliest of equals."""
    return next(iter(best_first(rows)), None)


# ----------------------------------------------------------------------------- reading a database


class OtherVersionError(UserError):
    """The database is another Optuna version's."""


class Reading(NamedTuple):
    """What a database holds: its trials, and the study's user attributes."""

    rows: list[Row]
    recorded: dict[str, Any]


def read_database(database: Path) -> Reading:
    """Read a study from a copy of its database in memory.

    Optuna opens a database to write, and only the search process may write this one. Raises
    sqlite3.DatabaseError when it is damaged, OtherVersionError when it is another Optuna's.
    """
    import optuna
    from sqlalchemy.pool import StaticPool

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what is damaged is told by this program
    count_in_utc()
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as memory:
        with opened(database) as connection:
            connection.backup(memory)
        if not memory.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return Reading([], {})  # killed before Optuna made its tables
        try:
            storage = optuna.storages.RDBStorage(
                "sqlite://", engine_kwargs={"creator": lambda: memory, "poolclass": StaticPool}
            )
            if not storage.get_all_studies():  # killed before Optuna made the study
                return Reading([], {})
            study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
            return Reading(rows_of(study.get_trials(deepcopy=False)), study.user_attrs)
        except Exception as error:  # nearly anything, where contents make no sense
            if type(error) is RuntimeError:  # Optuna's word on another version of its tables
                raise OtherVersionError(f"{database}: {one_line(error)}") from None
            raise sqlite3.DatabaseError(f"its contents make no sense: {error!r}") from error


@contextmanager
def opened(database: Path) -> Iterator[sqlite3.Connection]:
    """Open a database for reading only, also one whose writer was killed in a transaction.

    Such a one has a journal to be rolled back, which reading only forbids: a copy is read then.
    """
    journal = database.with_name(database.name + "-journal")
    uri = _uri(database, "mode=ro")
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
            connection = stack.enter_context(closing(connect(directory / database.name)))
        yield connection


def connect(database: Path) -> sqlite3.Connection:
    """Open a database for writing. Others may read, a dashboard may even hold it for a moment."""
    return sqlite3.connect(_uri(database), uri=True, timeout=60, check_same_thread=False)


def _uri(database: Path, *options: str) -> str:
    """Name a database to SQLite, which takes a file system without locks for a broken disk."""
    path = str(database.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    if is_without_locks(database.parent):
        options = (*options, "vfs=unix-none")
    return f"file:{path}?{'&'.join(options)}"


def read_recorded(checkpoint_dir: Path) -> tuple[list[Row], dict[str, Any]]:
    """Read a search's trials, and what its study recorded about itself. Raises UserError."""
    database = checkpoint_dir / DATABASE
    if not database.exists():
        raise UserError(f"{checkpoint_dir} holds no search ({DATABASE} is not there)")
    try:
        reading = read_database(database)
    except sqlite3.DatabaseError as error:
        raise UserError(f"{database} cannot be read: {one_line(error)}") from None
    return reading.rows, reading.recorded


def is_surplus(trial: FrozenTrial) -> bool:
    """Tell a trial that was withdrawn before it began: other searches had been quicker."""
    return bool(trial.user_attrs.get("surplus"))


def rows_of(trials: Iterable[FrozenTrial]) -> list[Row]:
    """Turn a study's trials into rows for people; those withdrawn before they began are none."""
    return [
        Row(
            trial.number,
            trial.state.name,
            trial.value if trial.state.name == "COMPLETE" else None,
            trial.params,
            aware(trial.datetime_start),
            aware(trial.datetime_complete),
            trial.user_attrs,
        )
        for trial in trials
        if not is_surplus(trial)
    ]


def aware(naive_local: datetime | None) -> datetime | None:
    """Give a time of Optuna's trials, which are naive and local, in UTC."""
    return naive_local.astimezone(UTC) if naive_local else None


def read_history(directory: Path) -> list[dict[str, Any]]:
    """Read a trial's history.jsonl; empty when it has none yet, or one that is not ours."""
    try:
        lines = (directory / "history.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        return []
    return rows if all(_is_epoch(row, number) for number, row in enumerate(rows, 1)) else []


def trained_seconds(history: Iterable[Mapping[str, Any]], before: int = 0) -> float:
    """Add up what a trial's epochs took, as it has measured them itself.

    before: epochs that were trained before a break.
    """
    took = [row.get("seconds") for row in history if row["epoch"] > before]
    return float(sum(seconds for seconds in took if isinstance(seconds, float) and seconds > 0))


def _is_epoch(row: Any, number: int) -> bool:
    if not isinstance(row, dict) or row.get("epoch") != number:
        return False
    value = row.get("macro_top1")
    return isinstance(value, float) and 0 <= value <= 1
