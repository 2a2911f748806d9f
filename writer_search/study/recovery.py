"""A damaged or lost database: noticing it, and putting a rebuilt one in its place."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from writer_search.common.errors import UserError
from writer_search.common.files import read_signed, sync_directory
from writer_search.common.text import one_line
from writer_search.results.rows import (
    DATABASE,
    OtherVersionError,
    read_database,
    trial_dir,
)
from writer_search.study.rebuilding import (
    Rebuilt,
    rebuild,
    recorded_settings_of,
    trial_directories,
)
from writer_search.study.store import (
    DamagedError,
    is_unwritable,
    open_study,
    refuse_changes,
)

MAGIC = b"SQLite format 3\0"
WORKPLACE = ".recovery"


# ------------------------------------------------------------------------------------------ damage


def find_damage(checkpoint_dir: Path) -> str | None:
    """Say what SQLite finds wrong; None when all is whole, or there is nothing yet.

    Reads only; takes milliseconds. Raises UserError where the file cannot be used as it is, but
    not for its contents: no permission, a disk that gives errors.
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
            return "is damaged (it is no database)"
        problem = _check(database)
        known = {row.number for row in read_database(database).rows}
    except OtherVersionError:
        if _has_a_version(database):
            raise
        return "is damaged (its version is none)"
    except (sqlite3.DatabaseError, ValueError, OSError) as error:  # its words may be broken text
        if isinstance(error, OSError) or is_unwritable(error):
            raise UserError(f"{database} cannot be read: {one_line(error)}") from None
        return f"is damaged ({one_line(error)})"
    if problem:
        return f"is damaged ({one_line(problem)})"
    lacking = [number for number in numbers if number not in known]
    if lacking:
        return f"lacks {len(lacking)} trial(s) that have directories, first trial {lacking[0]}"
    return None


def _head(database: Path) -> bytes:
    with open(database, "rb") as file:
        return file.read(100).ljust(20, b"\0") if database.stat().st_size else b""


def _check(database: Path) -> str | None:
    """Run SQLite's own check. Opened for writing, so that a killed writer's journal is undone."""
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    return None if answer == "ok" else str(answer)


def find_contradiction(checkpoint_dir: Path, rebuilt: Rebuilt) -> str | None:
    """Say where the database contradicts the files, or Optuna cannot read it; under the lock.

    After `find_damage`, which has looked at the version. SQLite's check sees no flipped bit inside
    of a value. Raises UserError for a database that cannot be written.
    """
    try:
        study = open_study(checkpoint_dir)
        stored = study.get_trials(deepcopy=False)
        settings = study.user_attrs.get("settings")
    except DamagedError as error:
        return f"is damaged ({one_line(error)})"
    for trial in rebuilt.trials:
        if not read_signed(trial_dir(checkpoint_dir, trial.number) / "trial.json"):
            continue  # it was killed before its record, which is written now
        if trial.number >= len(stored) or _facts(stored[trial.number]) != _facts(trial):
            return f"is damaged (its trial {trial.number} is not as it was recorded)"
    if rebuilt.settings not in (None, settings):
        return "is damaged (its settings are not as they were recorded)"
    return None


def _facts(trial: FrozenTrial) -> tuple[Any, ...]:
    return (
        *(trial.state, trial.value, trial.params, trial.distributions, trial.user_attrs),
        *(trial.intermediate_values, trial.datetime_start, trial.datetime_complete),
    )


def _has_a_version(database: Path) -> bool:
    """Tell whether the version of Optuna's tables looks like one, be it unknown."""
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        try:
            (version,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        except (sqlite3.DatabaseError, TypeError):
            return False
    return bool(re.fullmatch(r"v\d+\.\d+\.\d+\.[a-z]", str(version), re.ASCII))


# ----------------------------------------------------------------------------------------- healing


def standing_settings(checkpoint_dir: Path) -> dict[str, Any] | None:
    """Give the settings of the study to go on with, be its database damaged; None for a new one.

    Changes nothing. Raises UserError, naming the way out, where a damaged database cannot heal.
    """
    damage = find_damage(checkpoint_dir)
    if damage is None:
        database, told = checkpoint_dir / DATABASE, recorded_settings_of(checkpoint_dir)
        return told or (
            read_database(database).recorded.get("settings") if database.exists() else None
        )
    return _rebuilt_or_told(checkpoint_dir, damage).settings


def heal(checkpoint_dir: Path, settings: Mapping[str, Any]) -> list[str]:
    """Rebuild a database that is damaged, or lost; under the directory's lock.

    settings: this start's, which the trials must have. Gives a warning; nothing where all is whole.
    Raises UserError, with the file untouched, where that cannot be.
    """
    damage, rebuilt = find_damage(checkpoint_dir), None
    if damage is None and trial_directories(checkpoint_dir):
        try:
            rebuilt = rebuild(checkpoint_dir)
        except UserError:
            return []  # nothing to compare with, and nothing wrong with the database
        damage = find_contradiction(checkpoint_dir, rebuilt)
    if damage is None:
        return []
    rebuilt = rebuilt or _rebuilt_or_told(checkpoint_dir, damage)
    if rebuilt.settings is not None:
        refuse_changes(rebuilt.settings, settings)
    unknown = "; its settings are not known any more: this start's are taken"
    told = f"{checkpoint_dir / DATABASE} {damage}: it was rebuilt with {rebuilt.describe()}"
    kept = _put_in_place(checkpoint_dir, rebuilt, rebuilt.settings or settings)
    return [told + ("" if rebuilt.settings else unknown) + kept]


def recover(checkpoint_dir: Path) -> list[str]:
    """Rebuild the study on demand; under the directory's lock. Returns lines for people.

    Raises UserError when there is nothing to rebuild from.
    """
    rebuilt = rebuild(checkpoint_dir)
    try:
        damage = find_damage(checkpoint_dir) or find_contradiction(checkpoint_dir, rebuilt)
    except OtherVersionError:
        damage = "is of another version"
    if damage is None:
        return ["the database is whole and agrees with the trial directories: left as it is"]
    kept = _put_in_place(checkpoint_dir, rebuilt, rebuilt.settings)
    unknown = "no config.json tells the settings of this search: the next start's are taken"
    return [f"rebuilt {rebuilt.describe()}{kept}", *([] if rebuilt.settings else [unknown])]


def _rebuilt_or_told(checkpoint_dir: Path, damage: str) -> Rebuilt:
    try:
        return rebuild(checkpoint_dir)
    except UserError as error:
        raise UserError(
            f"{checkpoint_dir / DATABASE} {damage}, and cannot be rebuilt: {error}; or move the "
            "database away, or give a fresh --checkpoint_dir"
        ) from None


def _put_in_place(
    checkpoint_dir: Path, rebuilt: Rebuilt, settings: Mapping[str, Any] | None
) -> str:
    """Move the database aside and a rebuilt one in its place; tells where the old one is.

    The new one is built under another name, whole: a recovery that is cut off is begun again.
    """
    workplace = checkpoint_dir / WORKPLACE
    workplace.mkdir(exist_ok=True)
    for leftover in workplace.iterdir():
        leftover.unlink()
    study = open_study(workplace)
    if settings is not None:
        study.set_user_attr("settings", dict(settings))
    study.add_trials(rebuilt.trials)
    aside = _move_aside(checkpoint_dir)
    os.replace(workplace / DATABASE, checkpoint_dir / DATABASE)
    sync_directory(checkpoint_dir)
    remove_workplace(checkpoint_dir)
    return f"; the damaged file is kept as {aside.name}" if aside else ""


def remove_workplace(checkpoint_dir: Path) -> None:
    """Remove what a recovery leaves that was killed at its very end."""
    workplace = checkpoint_dir / WORKPLACE
    if workplace.is_dir():
        for leftover in workplace.iterdir():
            leftover.unlink()
        workplace.rmdir()


def _move_aside(checkpoint_dir: Path) -> Path | None:
    database = checkpoint_dir / DATABASE
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    aside = checkpoint_dir / f"{DATABASE}.damaged-{stamp}"
    was_there = database.exists()
    if was_there:
        os.replace(database, aside)
    # Beside the new database they would be taken for that one's, and undo it.
    for kind in ("-journal", "-wal", "-shm"):
        if (beside := database.with_name(database.name + kind)).exists():
            os.replace(beside, aside.with_name(aside.name + kind))
    return aside if was_there else None
