"""What a page is made from: a search's rows, and what its trials have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from writer_search.common.files import read_dict, write_text
from writer_search.common.text import shown_value
from writer_search.lines.predictions import Prediction, read_predictions
from writer_search.results.confusion import Pairs, confusion_of
from writer_search.results.estimate import Range
from writer_search.results.page.style import CHART_STYLE
from writer_search.results.pictures.charts import alone, trial_curves
from writer_search.results.rows import Row, best_row, directory_of, read_history
from writer_search.space import fixed_of

RUNNING, CONFIRMING, FINISHED, STOPPED = "running", "confirming", "finished", "stopped"
CURVES = "curves.svg"


@dataclass(frozen=True)
class TrialProgress:
    """A trial that runs, and how far it is: epochs done, best value so far as a fraction."""

    number: int
    epoch: int
    epochs: int
    best: float | None


@dataclass(frozen=True)
class Standing:
    """Where a search stands.

    left: seconds, while it runs and they can be known.   runs_left: of a confirmation.
    """

    state: str
    left: Range | None = None
    running: Sequence[TrialProgress] = ()
    runs_left: int = 0

    @property
    def is_live(self) -> bool:
        return self.state in (RUNNING, CONFIRMING)


@dataclass
class TrialFiles:
    """What trials have written. A file is read again when it has changed."""

    checkpoint_dir: Path
    _configs: dict[int, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    _histories: dict[int, tuple[tuple[int, int], list[float]]] = field(default_factory=dict)
    _of_best: tuple[Path, dict[str, Any], list[Prediction]] | None = None

    def directory(self, row: Row) -> Path:
        """Give a trial's directory: another search's, where several share the study."""
        return directory_of(row.number, row.attributes, self.checkpoint_dir)

    def config(self, row: Row) -> dict[str, Any]:
        known = self._configs.get(row.number)
        if known is None or known[0] != row.state:
            known = row.state, read_dict(self.directory(row) / "config.json")
            self._configs[row.number] = known
        return known[1]

    def values(self, row: Row) -> list[float]:
        """Give an ended trial's validation value after each epoch, as fractions."""
        directory = self.directory(row)
        try:
            status = (directory / "history.jsonl").stat()
        except OSError:
            return []
        # A pruned trial is recorded before its process has written its last epochs.
        version = status.st_mtime_ns, status.st_size
        known = self._histories.get(row.number)
        if known is None or known[0] != version:
            history = read_history(directory)
            known = version, [float(epoch["macro_top1"]) for epoch in history]
            self._histories[row.number] = known
            if directory.parent.absolute() == self.checkpoint_dir.absolute():
                with suppress(OSError):  # a directory that cannot be written costs its curves alone
                    draw_curves(directory, row.number, history, status.st_mtime)
        return known[1]

    def of_best(self, row: Row) -> tuple[dict[str, Any], list[Prediction]]:
        """Give the metrics of a complete trial's best epoch, and its predictions."""
        directory = self.directory(row)
        if self._of_best is None or self._of_best[0] != directory:
            found = read_dict(directory / "metrics.json").get("best")
            metrics = found if isinstance(found, dict) else {}
            predictions = read_predictions(directory)
            if not metrics or not predictions:  # perhaps they are seen a moment later
                return metrics, predictions
            self._of_best = directory, metrics, predictions
        return self._of_best[1:]


@dataclass(frozen=True)
class Snapshot:
    """A search at one moment. recorded: the study's user attributes."""

    files: TrialFiles
    rows: Sequence[Row]
    recorded: Mapping[str, Any]
    standing: Standing

    @property
    def checkpoint_dir(self) -> Path:
        return self.files.checkpoint_dir

    @cached_property
    def best(self) -> Row | None:
        return best_row(self.rows)

    @cached_property
    def complete(self) -> list[Row]:
        return [row for row in self.rows if row.state == "COMPLETE" and row.value is not None]

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The best trial's, of its best epoch; empty where there are none."""
        return self.files.of_best(self.best)[0] if self.best else {}

    @cached_property
    def predictions(self) -> list[Prediction]:
        return self.files.of_best(self.best)[1] if self.best else []

    @cached_property
    def confusion(self) -> tuple[list[str], Pairs]:
        """Writers, and (true, guessed, lines); nothing where it is not recorded."""
        try:
            return confusion_of(self.metrics)
        except ValueError:
            return [], []

    @cached_property
    def configs(self) -> dict[int, dict[str, Any]]:
        return {row.number: self.files.config(row) for row in self.rows}

    @property
    def settings(self) -> Mapping[str, Any]:
        found = self.recorded.get("settings")
        return found if isinstance(found, dict) else {}

    @property
    def space(self) -> Mapping[str, Any]:
        found = self.settings.get("space")
        return found if isinstance(found, dict) else {}

    def fixed(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Give the hyperparameters that trials had and that were not drawn.

        All that are not drawn where that cannot be told: the space is another version's.
        """
        had: dict[str, Any] = {}
        for row in rows:
            had |= fixed_of(self.space, row.params)
        return had or {n: rule for n, rule in self.space.items() if not isinstance(rule, dict)}


def draw_curves(
    directory: Path, number: int, history: Sequence[Mapping[str, Any]], written: float
) -> None:
    """Draw a trial's own curves, unless there are newer ones than its history."""
    path = directory / CURVES
    if path.exists() and path.stat().st_mtime >= written:
        return
    if panels := trial_curves(number, history):
        write_text(path, alone(panels, CHART_STYLE))


def range_text(rule: object) -> str:
    """Say what a hyperparameter is drawn from, or that it is fixed."""
    if not isinstance(rule, dict):
        return f"{shown_value(rule)} (fixed)"
    if "choices" in rule:
        return ", ".join(map(shown_value, rule["choices"]))
    log = ", on a log scale" if rule.get("log") else ""
    return f"{shown_value(rule.get('low'))} to {shown_value(rule.get('high'))}{log}"
