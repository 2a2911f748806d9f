"""Opening, and rebuilding, a study that several machines share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from writer_search.common.environment import count_in_utc
from writer_search.common.errors import UserError
from writer_search.common.files import read_dict
from writer_search.common.text import counted
from writer_search.results.rows import trial_dir
from writer_search.study.damage import trial_directories
from writer_search.study.rebuilding import rebuild
from writer_search.study.records import write_record
from writer_search.study.shared.storage import find_study, shown_url
from writer_search.study.store import record_settings


def open_shared(
    storage: BaseStorage,
    name: str,
    checkpoint_dir: Path,
    settings: dict[str, Any],
    pruner: BasePruner,
) -> optuna.Study:
    """Open the study, and check that this search belongs to it. Raises UserError."""
    count_in_utc()
    study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
    record_settings(study, settings, checkpoint_dir)  # its creator may have died before
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
            f"{checkpoint_dir} holds {counted(len(strangers), 'trial')}, first trial "
            f"{strangers[0]}, that study {name} at {shown_url(url)} does not have: give a fresh "
            "--checkpoint_dir, or rebuild a study that is lost from them with --recover"
        )


def _differs(checkpoint_dir: Path, trial: FrozenTrial) -> bool:
    config = read_dict(trial_dir(checkpoint_dir, trial.number) / "config.json")
    return bool(config.get("hyperparameters", trial.params) != trial.params)


def recover_shared(storage: BaseStorage, name: str, url: str, checkpoint_dir: Path) -> list[str]:
    """Rebuild the study in the storage from the trial directories.

    Trials that the study still has must be the directories' own; the missing ones follow. Returns
    lines for people. Raises UserError.
    """
    rebuilt = rebuild(checkpoint_dir)
    trials = rebuilt.trials
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
    if rebuilt.settings is not None and "settings" not in study.user_attrs:
        study.set_user_attr("settings", rebuilt.settings)
    study.add_trials(missing)
    added = study.get_trials(deepcopy=False)[len(stored) :]
    if [trial.params for trial in added] != [trial.params for trial in missing]:
        raise UserError(
            f"--recover: another search has added trials to study {name} at {shown_url(url)} "
            "meanwhile; end all searches, and give another --study_name"
        )
    return [f"rebuilt {len(missing)} of {len(trials)} trials from their directories"]
