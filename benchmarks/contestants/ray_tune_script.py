"""A search with Ray Tune.

After its pages "How to Enable Fault Tolerance in Ray Tune" (`Tuner.restore`, three failures of a
trial), "ray.tune.Tuner.can_restore" (the same script starts and goes on), "How to Save and Load
Trial Checkpoints" (the function API, a checkpoint each epoch) and "A Guide To Parallelism and
Resources for Ray Tune" (all cores for one trial).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from benchmarks.contestants.job import Job, Training, run_script
from writer_search.common.cores import usable_cores

NAME = "search"


def trainable(config: dict[str, Any]) -> None:
    training = Training(config["job"], config["configuration"])
    if (checkpoint := tune.get_checkpoint()) is not None:
        with checkpoint.as_directory() as saved:
            training.state.load(torch.load(Path(saved) / "state.pt"))
    while not training.is_finished:
        training.epoch()
        with tempfile.TemporaryDirectory() as new:
            torch.save(training.state.contents(), Path(new) / "state.pt")
            tune.report({"value": training.value}, checkpoint=tune.Checkpoint.from_directory(new))


def search(job: Job, directory: Path) -> None:
    cores = usable_cores()
    ray.init(num_cpus=cores)
    with_cores = tune.with_resources(trainable, {"cpu": cores})
    path = str(directory / NAME)
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable=with_cores, resume_errored=True)
    else:
        numbers = list(range(len(job.learning_rates)))
        tuner = tune.Tuner(
            with_cores,
            param_space={"configuration": tune.grid_search(numbers), "job": job},
            run_config=tune.RunConfig(
                name=NAME,
                storage_path=str(directory),
                failure_config=tune.FailureConfig(max_failures=3),
            ),
        )
    tuner.fit()


def results(job: Job, directory: Path) -> list[tuple[int, float]]:
    tuner = tune.Tuner.restore(str(directory / NAME), trainable=trainable)
    return [
        (result.config["configuration"], result.metrics["value"])
        for result in tuner.get_results()
        if result.error is None and result.metrics and "value" in result.metrics
    ]


if __name__ == "__main__":
    # What Ray's workers import has a name.
    from benchmarks.contestants import ray_tune_script

    run_script(ray_tune_script.search, ray_tune_script.results)
