"""The study's trials as their directories have them: for a database that is damaged or lost."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from writer_search.common.environment import count_in_utc
from writer_search.common.errors import UserError
from writer_search.common.files import read_signed
from writer_search.results.rows import (
    SECONDS,
    has_saved,
    is_fitted,
    read_history,
    trained_seconds,
    trial_dir,
)
from writer_search.study.damage import recorded_settings_of, settings_in, trial_directories
from writer_search.study.records import finished_value

MOST_LOST = 1000  # directories, besides half of them: beyond that, a name is none of ours


@dataclass(frozen=True)
class Rebuilt:
    """What the trial directories tell of a study.

    trials: all, by number; in the place of a lost one stands a failed one.   recorded: those whose
    end is in their trial.json.   settings: None where no directory tells them.
    """

    trials: list[FrozenTrial]
    lost: list[int]
    recorded: set[int]
    settings: dict[str, Any] | None

    def describe(self) -> str:
        """Say in a line what came back, and what did not."""
        numbers = set(range(len(self.trials))) - set(self.lost)
        states = Counter(self.trials[number].state.name for number in numbers)
        counts = ", ".join(f"{states[name]} {name}" for name in sorted(states))
        lost = ", ".join(map(str, self.lost[:9])) + (", ..." if len(self.lost) > 9 else "")
        gone = f"; without any record, counted as failed: trial {lost}" if lost else ""
        return f"{len(numbers)} trials from their directories: {counts}{gone}"


def rebuild(checkpoint_dir: Path) -> Rebuilt:
    """Rebuild all trials from their directories.

    Every trial that has a record comes back as it was: number, state, parameters, value,
    intermediate values, attributes, times. One that has a directory but no record had not been
    told: it comes back complete when its metrics.json is there, otherwise as cut off. Gaps are
    filled with failed trials, so that numbers stay equal to directories.

    Raises UserError where there is nothing to rebuild from, or trials of several searches.
    """
    count_in_utc()
    numbers = trial_directories(checkpoint_dir)
    if not numbers:
        raise UserError(f"{checkpoint_dir} has no trial directories to rebuild a study from")
    if numbers[-1] > MOST_LOST + 2 * len(numbers):
        raise UserError(
            f"{trial_dir(checkpoint_dir, numbers[-1])}: only {len(numbers) - 1} trials before it "
            "have a directory; move it away if it is not of this search"
        )
    recorded: set[int] = set()
    found = [_rebuild(checkpoint_dir, number, recorded) for number in range(numbers[-1] + 1)]
    lost = [number for number, trial in enumerate(found) if trial is None]
    if len(lost) == len(found):
        raise UserError(f"{checkpoint_dir}: its trial directories hold nothing to rebuild from")
    trials = [trial or _placeholder() for trial in found]
    return Rebuilt(trials, lost, recorded, _common_settings(checkpoint_dir, numbers))


def _common_settings(checkpoint_dir: Path, numbers: list[int]) -> dict[str, Any] | None:
    """Give the settings that all trials have. Raises UserError where they differ."""
    newest = recorded_settings_of(checkpoint_dir)
    for number in numbers:
        if settings_in(trial_dir(checkpoint_dir, number)) not in (None, newest):
            raise UserError(
                f"{trial_dir(checkpoint_dir, number)} is a trial of other settings than the last "
                "one: move away what is not of this search, or give a fresh --checkpoint_dir"
            )
    return newest


def _rebuild(checkpoint_dir: Path, number: int, recorded: set[int]) -> FrozenTrial | None:
    """Rebuild a trial; None where its directory tells nothing of it."""
    directory = trial_dir(checkpoint_dir, number)
    record = read_signed(directory / "trial.json")
    try:
        trial = _from_record(record, number)
        recorded.add(number)
        return trial
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # no record, or one that is not ours
    try:
        return _from_config(directory, number)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


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
    config = read_signed(directory / "config.json")
    if config.get("number", number) != number:
        raise ValueError("a copy of another trial's directory")
    value = finished_value(directory)
    history = read_history(directory)
    measured = {"epochs": len(history), SECONDS: trained_seconds(history)}
    attributes = {**config["user_attrs"], **measured}
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
        intermediate_values={}
        if is_fitted(config["hyperparameters"], attributes)
        else {row["epoch"]: row["macro_top1"] for row in history},
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
    seconds = attributes.get(SECONDS, 0.0)
    if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
        raise ValueError("it took no number of seconds")
    if attributes.get("continues", -1) >= trial.number:
        raise ValueError("it continues a later trial")


def _placeholder() -> FrozenTrial:
    cause = "lost: the trial left neither record nor configuration"
    return optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"failure": cause})


def _distributions(described: dict[str, str]) -> dict[str, Any]:
    return {name: json_to_distribution(text) for name, text in described.items()}


def _local(aware: str | None) -> datetime | None:
    """Optuna's trials carry naive local times."""
    if aware is None:
        return None
    return datetime.fromisoformat(aware).astimezone().replace(tzinfo=None)
