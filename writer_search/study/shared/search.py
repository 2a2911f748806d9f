"""A search that shares its study with searches on other machines: --storage."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import connection
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from writer_search.common.errors import UserError
from writer_search.common.files import read_json
from writer_search.processes.messages import STOP, UNDER_WAY
from writer_search.results.estimate import finished_epochs, seconds_left
from writer_search.results.rows import Row, trial_dir
from writer_search.results.status import RunningStatus, Status, silence
from writer_search.study.records import write_record
from writer_search.study.recovery import rebuilt_trials, recorded_settings_of, trial_directories
from writer_search.study.search import STOP_SECONDS, RunningTrial, Search
from writer_search.study.shared.fleet import SIGN_SECONDS, Fleet
from writer_search.study.shared.storage import (
    StorageUnreachableError,
    find_study,
    is_surplus,
    rows_of,
    shown_url,
)
from writer_search.study.store import refuse_changes

# Between two looks at what the others do, for a search that has a place free: soon at first.
FIRST_LOOK_SECONDS, LOOK_SECONDS = 1.0, 10.0


@dataclass
class SharedSearch(Search):
    """Runs trials beside other searches until the study needs no more of this one."""

    fleet: Fleet = field(kw_only=True)
    last_look: float = -math.inf
    pause: float = FIRST_LOOK_SECONDS
    next_sign: float = -math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rows = self.read()

    def read(self, changed: Collection[int] | None = None) -> list[Row]:
        trials = self.fleet.trials()
        self.to_start = self.fleet.room(trials)
        return rows_of(trials)

    def draw(self) -> Trial | None:
        self.pause = FIRST_LOOK_SECONDS
        return self.fleet.claim()

    def is_done(self) -> bool:
        """Stay while others run trials that somebody may have to take over."""
        if self.stop.name or self.gave_up or self.exhausted or time.monotonic() >= self.deadline:
            return True
        if not self.devices.usable or self.is_too_late():
            return True
        trials = self.fleet.trials()
        self.to_start = self.fleet.room(trials)
        if self.to_start:  # another search was quicker, and has left room since
            self.last_look = -math.inf
        return not self.to_start and not self.fleet.others_running(trials)

    def loop(self) -> None:
        try:
            super().loop()
        except StorageUnreachableError:
            self.save_all()
            raise

    def save_all(self) -> None:
        """Let running trials save and end, without a word to the storage.

        They stay marked as running there. Whoever sees that this search is gone records them.
        """
        for running in self.running.values():
            running.child.order(STOP)
        deadline = time.monotonic() + STOP_SECONDS
        while self.running and time.monotonic() < deadline:
            pipes: dict[Any, RunningTrial] = {
                pipe: running
                for running in self.running.values()
                for pipe in running.child.connections
            }
            for pipe in connection.wait(list(pipes), timeout=deadline - time.monotonic()):
                running = pipes[pipe]
                if pipe not in running.child.connections:
                    continue  # another rank has told the trial's end
                message = running.child.receive(pipe)
                if message is None:
                    continue
                if message[0] == "report":
                    running.child.order(STOP)
                elif message[0] not in UNDER_WAY:
                    running.child.end()
                    del self.running[running.slot]

    # ------------------------------------------------------------------------- signs of life

    def seconds_to_next_deadline(self) -> float:
        soonest = min(self.next_look(), self.next_sign) - time.monotonic()
        return min(super().seconds_to_next_deadline(), max(0.0, soonest))

    def watch_the_clock(self) -> None:
        super().watch_the_clock()
        now = time.monotonic()
        if now >= self.next_sign:
            self.next_sign = now + SIGN_SECONDS
            for running in [*self.running.values(), *self.displaced]:
                try:
                    if not running.pruned:  # that one has been told
                        self.fleet.sign(running.trial)
                except UpdateFinishedTrialError:
                    self.let_go(running)
        if now >= self.next_look():
            self.look()

    def next_look(self) -> float:
        has_place = self.devices.free(self.running) is not None
        return self.last_look + (self.pause if has_place else SIGN_SECONDS)

    def look(self) -> None:
        """See what the others do, and record the trials of those that are dead."""
        trials = self.fleet.trials()
        for line in bury_dead(self.fleet, trials):
            self.progress.line(line)
        self.rows = self.read()
        self.pause = min(LOOK_SECONDS, 2 * self.pause)
        self.last_look = time.monotonic() - random.uniform(0, self.pause / 5)  # not all at once

    def receive(self, running: RunningTrial, pipe: connection.Connection) -> None:
        try:
            super().receive(running, pipe)
        except UpdateFinishedTrialError:
            self.let_go(running)
        except ValueError as error:
            if not str(error).startswith("Cannot tell a "):  # Optuna's word on a finished trial
                raise
            self.let_go(running)

    def let_go(self, running: RunningTrial) -> None:
        """End a trial that another search has taken for dead and recorded."""
        if running in self.displaced:
            self.displaced.remove(running)
        elif self.running.pop(running.slot, None) is not None:
            running.child.kill()
            running.child.end()
        self.progress.end(
            running.number,
            "given up: this search had shown no sign of life, and another one has recorded it",
            self.complete(),
        )


def bury_dead(fleet: Fleet, trials: Sequence[FrozenTrial]) -> list[str]:
    """Record the trials of searches that have died; returns a line for each."""
    lines = [fleet.bury(trial) for trial in fleet.dead(trials)]
    return [line for line in lines if line is not None]


# ---------------------------------------------------------------------------------------- opening


def open_shared(
    storage: BaseStorage,
    name: str,
    checkpoint_dir: Path,
    settings: dict[str, Any],
    pruner: BasePruner,
) -> optuna.Study:
    """Open the study, and check that this search belongs to it. Raises UserError."""
    study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
    recorded = study.user_attrs.get("settings")
    if recorded is None:  # whoever created the study has died since
        study.set_user_attr("settings", settings)
    else:
        refuse_changes(recorded, settings)
    for trial in study.get_trials(deepcopy=False):
        directory = trial_dir(checkpoint_dir, trial.number)
        has_record = (directory / "trial.json").exists()
        if trial.state.is_finished() and directory.is_dir() and not has_record:
            write_record(checkpoint_dir, trial)
    return study


def refuse_strangers(storage: BaseStorage, name: str, url: str, checkpoint_dir: Path) -> None:
    """Raise UserError when the directory holds trials that the study does not have."""
    numbers = trial_directories(checkpoint_dir)  # first: the study has a trial before its directory
    if not numbers:
        return
    study = find_study(storage, name)
    trials = study.get_trials(deepcopy=False) if study is not None else []
    strangers = [n for n in numbers if n >= len(trials) or _differs(checkpoint_dir, trials[n])]
    if strangers:
        raise UserError(
            f"{checkpoint_dir} holds {len(strangers)} trial(s), first trial {strangers[0]}, that "
            f"study {name} at {shown_url(url)} does not have: give a fresh --checkpoint_dir, or "
            "rebuild a study that is lost from them with --recover"
        )


def _differs(checkpoint_dir: Path, trial: FrozenTrial) -> bool:
    try:
        config = read_json(trial_dir(checkpoint_dir, trial.number) / "config.json")
        return bool(config["hyperparameters"] != trial.params)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def recover_shared(storage: BaseStorage, name: str, url: str, checkpoint_dir: Path) -> list[str]:
    """Rebuild the study in the storage from the trial directories.

    Trials that the study still has must be the directories' own; the missing ones follow. Returns
    lines for people. Raises UserError.
    """
    trials = rebuilt_trials(checkpoint_dir)
    study = find_study(storage, name)
    stored = study.get_trials(deepcopy=False) if study is not None else []
    for number, trial in enumerate(stored):
        has_directory = (trial_dir(checkpoint_dir, number) / "config.json").exists()
        if has_directory and trial.params != trials[number].params:
            raise UserError(
                f"--recover: study {name} at {shown_url(url)} is there and its trial {number} is "
                f"another than in {checkpoint_dir}; give another --study_name"
            )
    missing = trials[len(stored) :]
    if not missing:
        return ["the study has every trial that has a directory: left as it is"]
    if study is None:
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    settings = recorded_settings_of(checkpoint_dir)
    if settings is not None and "settings" not in study.user_attrs:
        study.set_user_attr("settings", settings)
    study.add_trials(missing)
    return [f"rebuilt {len(missing)} of {len(trials)} trials from their directories"]


# ----------------------------------------------------------------------------------------- status


def shared_status(study: optuna.Study, where: str, checkpoint_dir: Path | None) -> Status:
    """Describe a search from its storage alone."""
    trials = study.get_trials(deepcopy=False)
    recorded = study.user_attrs
    run = recorded.get("run", {"n_trials": 0, "checkpoint_dir": "."})
    epochs = int(recorded.get("settings", {}).get("epochs", 0))
    rows = rows_of(trials)
    times = {row.number: row.seconds or 0.0 for row in rows}
    running = [
        _running(trial, times[trial.number])
        for trial in trials
        if trial.state == TrialState.RUNNING and not is_surplus(trial)
    ]
    left = None
    if running:
        progress = [(float(trial.epoch), trial.epoch_seconds) for trial in running]
        complete = sum(row.state == "COMPLETE" for row in rows)
        to_start = max(0, run["n_trials"] - len(running) - complete)
        left = seconds_left(finished_epochs(rows), progress, to_start, epochs, len(running))
    return Status(
        heading=f"{where}: {len(running)} trial(s) running",
        checkpoint_dir=checkpoint_dir or Path(run["checkpoint_dir"]),
        active=bool(running),
        holder=None,
        n_trials=run["n_trials"],
        epochs=epochs,
        rows=rows,
        running=running,
        left=left,
    )


def _running(trial: FrozenTrial, seconds: float) -> RunningStatus:
    values = trial.intermediate_values
    best = max(values.values(), default=None)
    owner = trial.user_attrs.get("owner")
    silent = None if owner is None else _seconds_silent(trial)  # by its host's clock and ours
    return RunningStatus(
        number=trial.number,
        epoch=max(values, default=0),
        value=values[max(values)] if values else None,
        best=best,
        best_epoch=min((e for e, value in values.items() if value == best), default=None),
        seconds=seconds,
        epoch_seconds=seconds,
        silent_seconds=silent,
        stalled=bool(silence(silent)),
        host=None if owner is None else str(owner["host"]),
        note="of no search that lives" if owner is None else silence(silent),
    )


def _seconds_silent(trial: FrozenTrial) -> float:
    sign = datetime.fromisoformat(trial.user_attrs["alive"])
    return max(0.0, (datetime.now(UTC) - sign).total_seconds())
