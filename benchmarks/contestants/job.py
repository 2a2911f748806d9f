"""The job that all contestants do: given configurations, trained with the pieces of `train.py`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from writer_search.config import TrialConfig

# One hyperparameter tells the configurations apart: its value names them in all records.
LEARNING_RATES = (0.002, 0.0005, 0.0007, 0.001, 0.0014, 0.0028, 0.004, 0.005)
# Of the others those that the search would draw, at values of its range.
GIVEN = {
    "backbone": "resnet_thin",
    "precision": "float32",
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "dropout": 0.2,
    "augment_geometry": 1.0,
    "augment_photometry": 1.0,
}


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what.   line_height: in pixels"""

    epochs: int
    data_root: str
    cache_dir: str
    seed: int = 0
    learning_rates: tuple[float, ...] = LEARNING_RATES
    line_height: int = 64

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))
        space = {"learning_rate": {"choices": list(self.learning_rates)}}
        path.with_name("space.json").write_text(json.dumps(space))

    @classmethod
    def read(cls, path: Path) -> Job:
        values = json.loads(path.read_text())
        return cls(**values | {"learning_rates": tuple(values["learning_rates"])})

    def config(self, number: int) -> TrialConfig:
        """Give a configuration as those train it that are given their seeds."""
        values: dict[str, Any] = {**GIVEN, "learning_rate": self.learning_rates[number]}
        seed = 1000 * self.seed + number
        return TrialConfig(
            seed=seed,
            epochs=self.epochs,
            patience=self.epochs,
            line_height=self.line_height,
            **values,
        )

    def search_flags(self, space: Path) -> list[str]:
        """Give the flags by which this program's search has these configurations, and no others."""
        fixed = {**GIVEN, "mixup": "false", "line_height": self.line_height}
        return [
            *("--data_root", self.data_root, "--cache_dir", self.cache_dir, "--use_all_writers"),
            *("--n_trials", str(len(self.learning_rates)), "--seed", str(self.seed)),
            *("--epochs", str(self.epochs), "--patience", str(self.epochs), "--pruner", "none"),
            *("--device", "cpu", "--weights", "none", "--space", str(space)),
            *(word for name, value in fixed.items() for word in ("--fix", f"{name}={value}")),
        ]


class Training:
    """A configuration's training, epoch by epoch: `train` without its files.

    What a contestant saves after an epoch is `contents`, and what it goes on from `load`s that.
    """

    def __init__(self, job: Job, number: int) -> None:
        import torch

        import train
        from data import find_lines, load_lines
        from writer_search.training.batches import Lines, strip_on

        self.config = job.config(number)
        place, root = torch.device("cpu"), Path(job.data_root)
        data = load_lines(root, find_lines(root), job.line_height, Path(job.cache_dir))
        strip = strip_on(data, place, 1)
        self._lines = Lines.of(data, "train", strip, place)
        self._validation = Lines.of(data, "val", strip, place)
        self._writers = data.writers
        self._steps = train.steps_per_epoch(self.config, len(self._lines))
        self.state = train.TrainingState.start(self.config, len(data.writers), place)

    @property
    def value(self) -> float:
        """The best epoch's validation macro top-1."""
        assert self.state.best is not None
        return float(self.state.best["macro_top1"])

    def epoch(self) -> float:
        """Train an epoch and validate; give its macro top-1."""
        import train

        def check(progress: float) -> None:
            pass

        train.train_epoch(self.state, self.config, self._lines, self._steps, check)
        metrics = train.validate(self.state, self.config, self._validation, self._writers, check)
        files: Any = _NoFiles()
        train.end_epoch(self.state, self.config, files, metrics, self._steps, len(self._lines))
        return float(self.state.history[-1]["macro_top1"])

    @property
    def is_finished(self) -> bool:
        return self.state.epoch >= self.config.epochs


class _NoFiles:
    def end_epoch(self, history: object, best: object) -> None:
        pass


Results = list[tuple[int, float]]  # number of the configuration, value


def run_script(
    search: Callable[[Job, Path], None], results: Callable[[Job, Path], Results]
) -> None:
    """Be the command of a contestant that is a script; with --results print what it has found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--results", action="store_true")
    args = parser.parse_args()
    job = Job.read(args.job)
    if args.results:
        print(json.dumps(sorted(results(job, args.directory))))
    else:
        search(job, args.directory)
