"""A search with Optuna alone.

After Optuna's example "pytorch/pytorch_checkpoint.py" (heartbeat each second, the state of each
epoch as an artifact) and its pages "Saving/Resuming Study with RDB Backend" (the same database, the
trials that are left) and `Study.enqueue_trial` (given configurations, none twice). The example
looks for the state of the first of several interrupted trials; here it is that of the last, which
the callback hands on.
"""

from __future__ import annotations

from pathlib import Path

import optuna
import torch
from optuna.artifacts import FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from benchmarks.contestants.job import Job, Training, run_script


def search(job: Job, directory: Path) -> None:
    numbers = list(range(len(job.learning_rates)))
    (directory / "artifacts").mkdir(parents=True, exist_ok=True)
    store = FileSystemArtifactStore(directory / "artifacts")

    def objective(trial: optuna.Trial) -> float:
        training = Training(job, trial.suggest_categorical("configuration", numbers))
        state_file = directory / f"state_{trial.number}.pt"
        if (artifact := trial.user_attrs.get("artifact_id")) is not None:
            download_artifact(artifact_store=store, artifact_id=artifact, file_path=str(state_file))
            training.state.load(torch.load(state_file))
        while not training.is_finished:
            trial.report(training.epoch(), training.state.epoch)
            torch.save(training.state.contents(), state_file)
            artifact = upload_artifact(
                artifact_store=store, file_path=str(state_file), study_or_trial=trial
            )
            trial.set_user_attr("artifact_id", artifact)
            state_file.unlink()
        return training.value

    storage = RDBStorage(
        f"sqlite:///{directory / 'study.db'}",
        heartbeat_interval=1,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
    )
    study = optuna.create_study(
        storage=storage, study_name="search", direction="maximize", load_if_exists=True
    )
    for number in numbers:
        study.enqueue_trial({"configuration": number}, skip_if_exists=True)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    study.optimize(objective, n_trials=len(numbers) - len(complete))


def results(job: Job, directory: Path) -> list[tuple[int, float]]:
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{directory / 'study.db'}")
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [(trial.params["configuration"], trial.value or 0.0) for trial in complete]


if __name__ == "__main__":
    run_script(search, results)
