"""Looks at a study's database without Optuna: whether it is whole, and what it holds in brief.

It takes milliseconds, and is done before anything slow is imported. What only Optuna sees, as a
flipped bit inside of a value, is found under the lock: `recovery.find_contradiction`.
"""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from writer_search.common.errors import UserError
from writer_search.common.files import read_signed
from writer_search.common.text import counted, one_line
from writer_search.results.rows import DATABASE, connect, opened, trial_dir

MAGIC = b"SQLite format 3\0"
# SQLite's codes for what the system keeps from being written; the database itself is whole.
UNWRITABLE = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM),
}


@dataclass(frozen=True)
class Brief:
    """What a database holds, in brief."""

    numbers: set[int] = field(default_factory=set)  # of its trials
    complete: int = 0
    settings: dict[str, Any] | None = None


def trial_directories(checkpoint_dir: Path) -> list[int]:
    """Give the numbers of the trials that have a directory, in order."""
    names = {path.name for path in checkpoint_dir.glob("trial_*") if path.is_dir()}
    numbers = sorted(int(n[6:]) for n in names if re.fullmatch(r"trial_[0-9]{3,9}", n))
    return [number for number in numbers if trial_dir(checkpoint_dir, number).name in names]


def _is_own(directory: Path, number: int) -> bool:
    """Tell whether a directory may be that trial's: it has a record, and none is another's."""
    records = [read_signed(directory / name) for name in ("config.json", "trial.json")]
    return any(records) and all(r.get("number", number) == number for r in records)


def settings_in(directory: Path) -> dict[str, Any] | None:
    """Read the study's settings in a trial's config.json."""
    settings = read_signed(directory / "config.json").get("settings")
    return settings if isinstance(settings, dict) else None


def recorded_settings_of(checkpoint_dir: Path) -> dict[str, Any] | None:
    """Find the study's settings in the newest trial's config.json that has them."""
    directories = (trial_dir(checkpoint_dir, n) for n in trial_directories(checkpoint_dir)[::-1])
    return next((found for d in directories if (found := settings_in(d)) is not None), None)


def is_unwritable(error: BaseException | None) -> bool:
    """Tell a database that the system keeps from being used from a damaged one."""
    while error is not None and not isinstance(error, sqlite3.Error):
        error = error.__cause__
    return error is not None and getattr(error, "sqlite_errorcode", 0) & 0xFF in UNWRITABLE


def find_damage(checkpoint_dir: Path) -> str | None:
    """Say what is wrong with the database; None when all is whole, or there is nothing yet.

    Reads only. Raises UserError where the file cannot be used as it is, but not for its contents:
    no permission, a disk that gives errors.
    """
    database = checkpoint_dir / DATABASE
    numbers = trial_directories(checkpoint_dir)
    if not database.exists():
        return "is missing beside trial directories" if numbers else None
    try:
        content = _head(database)
        if not content:
            # What Optuna was killed over before its first write is an empty file too.
            return "is empty beside trial directories" if numbers else None
        # A flipped version of the format is told as a file that nobody may write, or open.
        if content[:16] != MAGIC or not {content[18], content[19]} <= {1, 2}:
            return "is damaged (it is not a SQLite database)"
        problem = _check(database)
        known = read_brief(database).numbers
    except (sqlite3.DatabaseError, ValueError, OSError) as error:  # its words may be broken text
        if isinstance(error, OSError) or is_unwritable(error):
            raise UserError(f"{database} cannot be read: {one_line(error)}") from None
        return f"is damaged ({one_line(error)})"
    if problem:
        return f"is damaged ({one_line(problem)})"
    lacking = [n for n in numbers if n not in known and _is_own(trial_dir(checkpoint_dir, n), n)]
    if lacking:
        return f"lacks {counted(len(lacking), 'trial')} with a directory, first trial {lacking[0]}"
    return None


def read_brief(database: Path) -> Brief:
    """Read what a database holds, in brief. Raises sqlite3.DatabaseError, ValueError, OSError."""
    with opened(database) as connection:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = {name for (name,) in found}
        if not {"trials", "study_user_attributes", "alembic_version"} <= tables:
            return Brief()  # killed before Optuna had made its tables
        for (version,) in connection.execute("SELECT version_num FROM alembic_version"):
            if not re.fullmatch(r"v\d+\.\d+\.\d+\.[a-z]", str(version), re.ASCII):
                raise ValueError("its schema version is invalid")
        states = dict(connection.execute("SELECT number, state FROM trials").fetchall())
        settings = connection.execute(
            "SELECT value_json FROM study_user_attributes WHERE key = 'settings'"
        ).fetchone()
        return Brief(
            set(states),
            list(states.values()).count("COMPLETE"),
            json.loads(settings[0]) if settings else None,
        )


def is_half_made(database: Path) -> bool:
    """Tell a database whose making was cut off: Optuna would go on with it without its indexes.

    Its version stands in there last; before that no trial can. Raises sqlite3.DatabaseError.
    """
    with opened(database) as connection:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = [name for (name,) in found if name != "version_info"]
        return not any(
            connection.execute(f'SELECT 1 FROM "{table}" LIMIT 1').fetchone() for table in tables
        )


def _head(database: Path) -> bytes:
    with open(database, "rb") as file:
        return file.read(100).ljust(20, b"\0") if database.stat().st_size else b""


def _check(database: Path) -> str | None:
    """Run SQLite's own check. Opened for writing, so that a killed writer's journal is undone."""
    with closing(connect(database)) as connection:
        (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    return None if answer == "ok" else str(answer)
