"""The programs that `benchmarks.goodput` compares, each used as its documentation says.

All train with the pieces of `train.py`; what differs is who starts trials, keeps their states and
goes on after a kill. A contestant is a command that is run again and again until it has a result
for each configuration of the job.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contestants.job import Job

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Contestant:
    """A name, its command, and how to read what it holds for its results.

    command, results: (the job's file, the contestant's directory) -> words; `results` prints a JSON
    list of [number of the configuration, value].   records: patterns of the files that it keeps its
    list of trials in.   packages: whose versions decide.
    """

    name: str
    command: Callable[[Path, Path], list[str]]
    results: Callable[[Path, Path], list[str]]
    records: tuple[str, ...]
    packages: tuple[str, ...] = ("torch", "optuna")


def _this_program(*flags: str) -> Callable[[Path, Path], list[str]]:
    def command(job_file: Path, directory: Path) -> list[str]:
        job = Job.read(job_file)
        return [
            *(sys.executable, str(ROOT / "hyperparameter_search.py")),
            *job.search_flags(job_file.with_name("space.json")),
            *("--checkpoint_dir", str(directory), *flags),
        ]

    return command


def _script(module: str, *flags: str) -> Callable[[Path, Path], list[str]]:
    def command(job_file: Path, directory: Path) -> list[str]:
        name = f"benchmarks.contestants.{module}"
        return [sys.executable, "-m", name, str(job_file), str(directory), *flags]

    return command


def _of_script(name: str, records: tuple[str, ...], *packages: str) -> Contestant:
    module = f"{name}_script"
    return Contestant(
        name, _script(module), _script(module, "--results"), records, ("torch", *packages)
    )


_OF_THIS_PROGRAM = (_script("this_program", "--results"), ("optuna_study.db",))
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("default", _this_program(), *_OF_THIS_PROGRAM),
        Contestant("continued", _this_program("--continue_interrupted"), *_OF_THIS_PROGRAM),
        _of_script("optuna", ("study.db",), "optuna"),
        _of_script("keras_tuner", ("search/oracle.json",), "keras", "keras-tuner"),
        # Each start writes a file of its own.
        _of_script("ray_tune", ("search/experiment_state-*.json",), "ray"),
    )
}
