"""A damaged or lost study: noticing it, and rebuilding it from the trial directories."""

from __future__ import annotations

import math
import os
import re
import sqlite3
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from writer_search.common.errors import UserError
from writer_search.common.files import read_dict, sync_directory
from writer_search.common.text import one_line
from writer_search.results.rows import DATABASE, read_database, read_history, trial_dir
from writer_search.study.records import finished_value
from writer_search.study.store import open_study
from writer_search.study.unfinished import has_saved

MOST_LOST = 1000  # directories, besides half of them: beyond that, a name is none of ours
WAY_OUT = "--recover rebuilds it from the trial directories, the damaged file is kept beside it"


def trial_directories(checkpoint_dir: Path) -> list[int]:
    """Give the numbers of the trials that have a directory, in order."""
    names = {path.name for path in checkpoint_dir.glob("trial_*") if path.is_dir()}
    numbers = sorted(int(n[6:]) for n in names if re.fullmatch(r"trial_[0-9]{3,9}", n))
    return [number for number in numbers if trial_dir(checkpoint_dir, number).name in names]


def refuse_damage(checkpoint_dir: Path) -> None:
    """Raise UserError, naming the way out, when the database is damaged, or lost.

    Reads only; takes milliseconds.
    """
    damage = find_damage(checkpoint_dir)
    if damage:
        raise UserError(f"{checkpoint_dir / DATABASE} {damage}; {WAY_OUT}")


def find_damage(checkpoint_dir: Path) -> str | None:
    """Say what is wrong with the database; None when it is whole, or there is nothing yet."""
    database = checkpoint_dir / DATABASE
    numbers = trial_directories(checkpoint_dir)
    if not database.exists():
        return "is missing beside trial directories" if numbers else None
    if database.stat().st_size == 0:
        # What Optuna was killed over before its first write is an empty file too.
        return "is empty beside trial directories" if numbers else None
    try:
        problem = _check(database)
        known = {row.number for row in read_database(database).rows}
    except (sqlite3.DatabaseError, ValueError) as error:  # SQLite's own words may be broken text
        return f"is damaged ({one_line(error)})"
    if problem:
        return f"is damaged ({one_line(problem)})"
    lacking = [number for number in numbers if number not in known]
    if lacking:
        return f"lacks {len(lacking)} trial(s) that have directories, first trial {lacking[0]}"
    return None


def _check(database: Path) -> str | None:
    """Run SQLite's own check. Opened for writing, so that a killed writer's journal is undone."""
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    return None if answer == "ok" else str(answer)


def recover(checkpoint_dir: Path) -> list[str]:
    """Move the database aside and rebuild it; under the directory's lock.

    Every trial that has a record comes back as it was: number, state, parameters, value,
    intermediate values, attributes, times. One that has a directory but no record had not been
    told: it comes back complete when its metrics.json is there, otherwise as cut off. Gaps are
    filled with failed trials, so that numbers stay equal to directories.

    The new study is built under another name and put in place whole: a recovery that is cut off is
    begun again. Returns lines for people. Raises UserError when there is nothing to rebuild from.
    """
    trials = rebuilt_trials(checkpoint_dir)
    settings = recorded_settings_of(checkpoint_dir)
    if find_damage(checkpoint_dir) is None and _agrees(checkpoint_dir, trials, settings):
        return ["the database is whole and agrees with the trial directories: left as it is"]
    workplace = checkpoint_dir / ".recovery"
    workplace.mkdir(exist_ok=True)
    for leftover in workplace.iterdir():
        leftover.unlink()
    study = open_study(workplace)
    if settings is not None:
        study.set_user_attr("settings", settings)
    study.add_trials(trials)
    aside = _move_aside(checkpoint_dir)
    os.replace(workplace / DATABASE, checkpoint_dir / DATABASE)
    sync_directory(checkpoint_dir)
    for leftover in workplace.iterdir():
        leftover.unlink()
    workplace.rmdir()
    states = [trial.state.name for trial in trials]
    counts = ", ".join(f"{states.count(name)} {name}" for name in sorted(set(states)))
    kept = [f"the damaged database is kept as {aside}"] if aside else []
    unknown = "no config.json tells the settings of this search: the next start's are taken"
    return [
        f"rebuilt {len(trials)} trials from their directories: {counts}",
        *kept,
        *([] if settings else [unknown]),
    ]


def rebuilt_trials(checkpoint_dir: Path) -> list[FrozenTrial]:
    """Rebuild all trials from their directories. Raises UserError where there are none."""
    numbers = trial_directories(checkpoint_dir)
    if not numbers:
        raise UserError(f"{checkpoint_dir} has no trial directories to rebuild a study from")
    if numbers[-1] > MOST_LOST + 2 * len(numbers):
        raise UserError(
            f"{trial_dir(checkpoint_dir, numbers[-1])}: only {len(numbers) - 1} trials before it "
            "have a directory; move it away if it is not of this search"
        )
    return [_rebuild(checkpoint_dir, number) for number in range(numbers[-1] + 1)]


def _agrees(
    checkpoint_dir: Path, trials: list[FrozenTrial], settings: dict[str, Any] | None
) -> bool:
    """Tell whether the database has the settings and all recorded trials as they are in files.

    SQLite's check sees no flipped bit inside of a value.
    """
    try:
        study = open_study(checkpoint_dir)
    except UserError:
        return False
    stored = study.get_trials(deepcopy=False)
    recorded = [
        trial
        for trial in trials
        if (trial_dir(checkpoint_dir, trial.number) / "trial.json").exists()
    ]
    return all(
        trial.number < len(stored) and _facts(stored[trial.number]) == _facts(trial)
        for trial in recorded
    ) and settings in (None, study.user_attrs.get("settings"))


def _facts(trial: FrozenTrial) -> tuple[Any, ...]:
    return (
        *(trial.state, trial.value, trial.params, trial.distributions, trial.user_attrs),
        *(trial.intermediate_values, trial.datetime_start, trial.datetime_complete),
    )


def _move_aside(checkpoint_dir: Path) -> Path | None:
    database = checkpoint_dir / DATABASE
    if not database.exists():
        return None
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    aside = checkpoint_dir / f"{DATABASE}.damaged-{stamp}"
    # The journal first: beside a new database it would be taken for that one's.
    journal = checkpoint_dir / f"{DATABASE}-journal"
    if journal.exists():
        os.replace(journal, aside.with_name(f"{aside.name}-journal"))
    os.replace(database, aside)
    return aside


def recorded_settings_of(checkpoint_dir: Path) -> dict[str, Any] | None:
    """Find the study's settings in the newest trial's config.json that has them."""
    for number in reversed(trial_directories(checkpoint_dir)):
        config = read_dict(trial_dir(checkpoint_dir, number) / "config.json")
        if isinstance(settings := config.get("settings"), dict):
            return settings
    return None


def _rebuild(checkpoint_dir: Path, number: int) -> FrozenTrial:
    directory = trial_dir(checkpoint_dir, number)
    record = read_dict(directory / "trial.json")
    try:
        return _from_record(record, number)
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # no record, or one that is not ours
    try:
        return _from_config(directory, number)
    except (KeyError, TypeError, ValueError, AttributeError):
        return _placeholder(number, "lost: the trial left neither record nor configuration")


def _from_record(record: dict[str, Any], number: int) -> FrozenTrial:
    state = TrialState[record["state"]]
    if record["number"] != number or not state.is_finished():
        raise ValueError("not the record of this finished trial")
    trial = FrozenTrial(
        number=number,
        state=state,
        value=record["value"],
        datetime_start=_local(record["datetime_start"]),
        datetime_complete=_local(record["datetime_complete"]),
        params=record["params"],
        distributions=_distributions(record["distributions"]),
        user_attrs=record["user_attrs"],
        system_attrs={},
        intermediate_values={int(k): v for k, v in record["intermediate_values"].items()},
        trial_id=number,
    )
    _validate(trial)
    return trial


def _from_config(directory: Path, number: int) -> FrozenTrial:
    """Rebuild a trial that had not been told: finished, or cut off."""
    config = read_dict(directory / "config.json")
    value = finished_value(directory)
    history = read_history(directory)
    attributes = {**config["user_attrs"], "epochs": len(history)}
    if value is None:
        epoch = min(len(history) + 1, config["config"]["epochs"])
        attributes |= {
            "failure": f"cut off without a word at epoch {epoch}",
            "interrupted": True,
            "advanced": has_saved(directory),
        }
    started = datetime.fromisoformat(config["started"]).astimezone().replace(tzinfo=None)
    trial = FrozenTrial(
        number=number,
        state=TrialState.FAIL if value is None else TrialState.COMPLETE,
        value=value,
        datetime_start=started,
        datetime_complete=datetime.now(),
        params=config["hyperparameters"],
        distributions=_distributions(config["distributions"]),
        user_attrs=attributes,
        system_attrs={},
        intermediate_values={row["epoch"]: row["macro_top1"] for row in history},
        trial_id=number,
    )
    _validate(trial)
    return trial


def _validate(trial: FrozenTrial) -> None:
    """Raise ValueError for what Optuna, or a later draw, would stumble over."""
    trial._validate()
    values = [*trial.intermediate_values.values(), *([] if trial.value is None else [trial.value])]
    if not all(isinstance(value, float) and math.isfinite(value) for value in values):
        raise ValueError("a value is not a finite number")
    attributes = trial.user_attrs
    names = ("draw", "seed", "continues", "continued", "epochs", "micro_batch")
    numbers = [attributes[name] for name in names if name in attributes]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("an attribute is not a whole number")
    if attributes.get("continues", -1) >= trial.number:
        raise ValueError("it continues a later trial")


def _placeholder(number: int, cause: str) -> FrozenTrial:
    return optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"failure": cause})


def _distributions(described: dict[str, str]) -> dict[str, Any]:
    return {name: json_to_distribution(text) for name, text in described.items()}


def _local(aware: str | None) -> datetime | None:
    """Optuna's trials carry naive local times."""
    if aware is None:
        return None
    return datetime.fromisoformat(aware).astimezone().replace(tzinfo=None)
