"""A search with Keras Tuner, on Keras's torch backend.

After its pages "The base Tuner class" (`run_trial` tunes anything), "The base Oracle class"
(`populate_space` gives the configurations) and "Getting started with KerasTuner" (`overwrite=False`
goes on in the same directory: an interrupted trial runs again). No page tells how such a trial goes
on where it was: `BackupAndRestore`, Keras's answer, belongs to `Model.fit`. Here it does, from
what `save_model` writes after each epoch and `load_model` reads, the hooks that its documentation
has for models by step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras_tuner
import torch
from keras_tuner.engine.trial import TrialStatus

from benchmarks.contestants.job import Job, Training, run_script

OBJECTIVE = "macro_top1"


class GivenOracle(keras_tuner.Oracle):
    """Gives the configurations in their order."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        if (number := len(self.start_order)) < self.max_trials:
            return {"status": TrialStatus.RUNNING, "values": {"configuration": number}}
        return {"status": TrialStatus.STOPPED, "values": None}


class GivenTuner(keras_tuner.Tuner):
    """Trains with the pieces of `train.py`."""

    def run_trial(self, trial: Any, job: Job) -> dict[str, float]:
        numbers = list(range(len(job.learning_rates)))
        training = Training(job, trial.hyperparameters.Choice("configuration", numbers))
        if (saved := self.load_model(trial)) is not None:
            training.state.load(saved)
        while not training.is_finished:
            training.epoch()
            self.save_model(trial.trial_id, training, training.state.epoch)
        return {OBJECTIVE: training.value}

    def save_model(self, trial_id: str, model: Training, step: int = 0) -> None:
        path = self._state_file(trial_id)
        torch.save(model.state.contents(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load_model(self, trial: Any) -> dict[str, Any] | None:
        path = self._state_file(trial.trial_id)
        return torch.load(path) if path.exists() else None

    def _state_file(self, trial_id: str) -> Path:
        return Path(self.get_trial_dir(trial_id)) / "state.pt"


def search(job: Job, directory: Path) -> None:
    oracle = GivenOracle(
        objective=keras_tuner.Objective(OBJECTIVE, "max"), max_trials=len(job.learning_rates)
    )
    tuner = GivenTuner(oracle, directory=str(directory), project_name="search", overwrite=False)
    tuner.search(job)


def results(job: Job, directory: Path) -> list[tuple[int, float]]:
    trials = [json.loads(p.read_text()) for p in directory.glob("search/trial_*/trial.json")]
    return [
        (trial["hyperparameters"]["values"]["configuration"], trial["score"])
        for trial in trials
        if trial["status"] == TrialStatus.COMPLETED
    ]


if __name__ == "__main__":
    run_script(search, results)
