"""A damaged or lost database: noticing it, and putting a rebuilt one in its place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from writer_search.common.errors import UserError
from writer_search.common.files import sync_directory
from writer_search.results.rows import DATABASE, OtherVersionError, trial_dir
from writer_search.study.changes import refuse_changes
from writer_search.study.damage import find_damage, trial_directories
from writer_search.study.rebuilding import Rebuilt, rebuild
from writer_search.study.store import DamagedError, open_study

WORKPLACE = ".recovery"


# ------------------------------------------------------------------------------------------ damage


def find_contradiction(checkpoint_dir: Path, rebuilt: Rebuilt) -> tuple[str | None, Study | None]:
    """Say where the database contradicts the files, or Optuna cannot read it; under the lock.

    After `find_damage`: SQLite's check sees no flipped bit inside of a value. Also gives the study
    that was opened for it. Raises UserError for a database that cannot be written, or is another
    Optuna version's.
    """
    try:
        study = open_study(checkpoint_dir)
        stored = study.get_trials(deepcopy=False)
        settings = study.user_attrs.get("settings")
    except DamagedError:
        return "is damaged (its contents make no sense)", None
    for number in sorted(rebuilt.recorded):  # others were killed before it: it is written now
        if number >= len(stored) or _facts(stored[number]) != _facts(rebuilt.trials[number]):
            return f"is damaged (its trial {number} is not as it was recorded)", None
    if rebuilt.settings not in (None, settings):
        return "is damaged (its settings are not as they were recorded)", None
    return None, study


def _facts(trial: FrozenTrial) -> tuple[Any, ...]:
    return (
        *(trial.state, trial.value, trial.params, trial.distributions, trial.user_attrs),
        *(trial.intermediate_values, trial.datetime_start, trial.datetime_complete),
    )


# ----------------------------------------------------------------------------------------- healing


def heal(checkpoint_dir: Path, settings: Mapping[str, Any]) -> list[str]:
    """Rebuild a database that is damaged, or lost; under the directory's lock.

    settings: this start's, which the trials must have. Gives a warning; nothing where all is whole.
    Raises UserError, with the file untouched, where that cannot be.
    """
    return _healed(checkpoint_dir, settings)[0]


def open_healed(checkpoint_dir: Path, settings: Mapping[str, Any]) -> tuple[list[str], Study]:
    """Heal as `heal` does, and open the study or create it: all trials are read but once.

    Directories that are in the way of trials to come are moved aside, with a warning.
    """
    warnings, study = _healed(checkpoint_dir, settings)
    study = study or open_study(checkpoint_dir)
    known = len(study.get_trials(deepcopy=False))
    return warnings + _move_strays_aside(checkpoint_dir, known), study


def _healed(checkpoint_dir: Path, settings: Mapping[str, Any]) -> tuple[list[str], Study | None]:
    damage, rebuilt, study = find_damage(checkpoint_dir), None, None
    if damage is None and trial_directories(checkpoint_dir):
        try:
            rebuilt = rebuild(checkpoint_dir)
        except UserError:
            return [], None  # nothing to compare with, and nothing wrong with the database
        damage, study = find_contradiction(checkpoint_dir, rebuilt)
    if damage is None:
        return [], study
    rebuilt = rebuilt or rebuilt_or_told(checkpoint_dir, damage)
    if rebuilt.settings is not None:
        refuse_changes(rebuilt.settings, settings, checkpoint_dir)
    unknown = "; its settings are not known any more: this start's are taken"
    told = f"{checkpoint_dir / DATABASE} {damage}: it was rebuilt with {rebuilt.describe()}"
    kept = _put_in_place(checkpoint_dir, rebuilt, rebuilt.settings or settings)
    return [told + ("" if rebuilt.settings else unknown) + kept], None


def recover(checkpoint_dir: Path) -> list[str]:
    """Rebuild the study on demand; under the directory's lock. Returns lines for people.

    Raises UserError when there is nothing to rebuild from.
    """
    rebuilt = rebuild(checkpoint_dir)
    try:
        damage = find_damage(checkpoint_dir) or find_contradiction(checkpoint_dir, rebuilt)[0]
    except OtherVersionError:
        damage = "is of another version"
    if damage is None:
        return ["the database is whole and agrees with the trial directories: left as it is"]
    kept = _put_in_place(checkpoint_dir, rebuilt, rebuilt.settings)
    unknown = "no config.json tells the settings of this search: the next start's are taken"
    return [f"rebuilt {rebuilt.describe()}{kept}", *([] if rebuilt.settings else [unknown])]


def rebuilt_or_told(checkpoint_dir: Path, damage: str) -> Rebuilt:
    """Rebuild the trials. Raises UserError, naming the way out, where that cannot be."""
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
    lock = workplace / "search.lock"
    lock.touch()  # by which `connect` sees whether there are locks
    study = open_study(workplace)
    if settings is not None:
        study.set_user_attr("settings", dict(settings))
    study.add_trials(rebuilt.trials)
    lock.unlink()
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


def _move_strays_aside(checkpoint_dir: Path, known: int) -> list[str]:
    """Rename what has the name of a trial that the study does not have, and nothing of one."""
    warnings = []
    for number in trial_directories(checkpoint_dir):
        if number >= known:
            stray = trial_dir(checkpoint_dir, number)
            aside = stray.rename(f"{stray}.stray-{_stamp()}")
            warnings.append(f"{stray} is no trial of this search: it was renamed to {aside.name}")
    return warnings


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")


def _move_aside(checkpoint_dir: Path) -> Path | None:
    database = checkpoint_dir / DATABASE
    aside = checkpoint_dir / f"{DATABASE}.damaged-{_stamp()}"
    was_there = database.exists()
    if was_there:
        os.replace(database, aside)
    # Beside the new database they would be taken for that one's, and undo it.
    for kind in ("-journal", "-wal", "-shm"):
        if (beside := database.with_name(database.name + kind)).exists():
            os.replace(beside, aside.with_name(aside.name + kind))
    return aside if was_there else None
