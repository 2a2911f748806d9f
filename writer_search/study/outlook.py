"""What a running search says of itself: the best value so far, how long it still takes."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import Any, NamedTuple

from writer_search.processes.deadlines import SAVED_SECONDS, longest_epoch
from writer_search.processes.plan import Plan
from writer_search.processes.runner import Runner
from writer_search.processes.running import RunningTrial
from writer_search.results.estimate import (
    Timed,
    finished_epochs,
    fitted_seconds,
    seconds_left,
    trains_nothing,
    unbroken,
)
from writer_search.results.page.snapshot import RUNNING, Standing, TrialProgress
from writer_search.results.progress import EpochFacts
from writer_search.results.rows import Row, best_row
from writer_search.study.recorder import Recorder
from writer_search.study.supplies import Supply


class Judged(NamedTuple):
    """What the recorded rows say: the best complete trial, how long trials took, which ones run.

    fitted: seconds of descriptors, where networks are searched too.
    """

    best: Row | None
    timed: list[Timed]
    fitted: list[float]
    running: set[int]


class Outlook:
    """Reads the recorded rows and the running trials; changes nothing."""

    def __init__(self, plan: Plan, supply: Supply, recorder: Recorder, runner: Runner) -> None:
        self._plan, self._supply = plan, supply
        self._recorder, self._runner = recorder, runner
        # Descriptors alone: their one epoch is all that tells how long others take.
        self._fits = trains_nothing(plan.settings["space"])
        self._judged: tuple[list[Row], Judged] | None = None

    def finished(self) -> Judged:
        """Give what the recorded rows say; they are gone through once for given ones."""
        rows = self._recorder.rows
        if self._judged is None or self._judged[0] is not rows:
            running = {row.number for row in rows if row.state == "RUNNING"}
            timed = finished_epochs(rows, self._fits)
            fitted = fitted_seconds(rows, self._fits)
            self._judged = rows, Judged(best_row(rows), timed, fitted, running)
        return self._judged[1]

    def is_too_late(self) -> bool:
        """Tell whether the batch system's job ends before one more epoch could.

        Where trials are continued, a part of an epoch is worth as much as another.
        """
        if self._plan.stop_at == math.inf:
            return False
        running = [(int(r.epochs_here), r.seconds) for r in self._running()]
        seconds = longest_epoch([*self.finished().timed, *running])
        if self._plan.continues:
            seconds = min(seconds, SAVED_SECONDS)
        return time.monotonic() + seconds >= self._plan.stop_at

    def epoch_facts(self, value: float, metrics: dict[str, Any]) -> EpochFacts:
        """Say what an epoch has brought."""
        loss, seconds = metrics["train_loss"], metrics["seconds"]
        network = metrics.get("network_macro_top1")
        return EpochFacts(loss, value, self._best(), seconds, self._time_left(), network)

    def _best(self) -> tuple[float, int] | None:
        best = self.finished().best
        values = [(r.best, -r.number) for r in self._running() if r.best is not None]
        if best is not None and best.value is not None:
            values.append((best.value, -best.number))
        if not values:
            return None
        value, negative = max(values)
        return value, -negative

    def _time_left(self) -> tuple[float, float] | None:
        running = [
            unbroken(r.progress, min(r.begun, r.progress), r.seconds)
            for r in self._running()
            if r.job.config.is_fitted == self._fits
        ]
        finished = self.finished()
        return seconds_left(
            finished.timed,
            running,
            self._supply.room,
            1 if self._fits else self._plan.epochs,
            len(self._plan.slots) + self._elsewhere(),
            self._plan.patience,
            finished.fitted,
        )

    def standing(self) -> Standing:
        """Say how the search stands, for its page."""
        running = [
            TrialProgress(r.number, r.epoch, r.job.config.most_epochs, r.best)
            for r in self._running()
        ]
        return Standing(RUNNING, self._time_left(), running)

    def _elsewhere(self) -> int:
        """Count the trials that other searches run, where several share the study."""
        here = {*self._runner.numbers, *(trial.number for trial in self._runner.displaced)}
        return len(self.finished().running - here)

    def _running(self) -> Collection[RunningTrial]:
        return self._runner.running.values()
