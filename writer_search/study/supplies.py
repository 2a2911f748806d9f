"""Where the loop has its trials from.

A supply starts trials in a study and knows how many more there may be. There are two: of a local
study (here), and of a study that several machines share (`shared/supply.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import optuna
from optuna.trial import Trial

from writer_search.processes.plan import Plan
from writer_search.results.rows import Row, count_complete, rows_of
from writer_search.study.draws import Drawer


class Supply(Protocol):
    """What the loop asks of a supply. Trials are Optuna's, started and running."""

    study: optuna.Study

    room: int  # trials that may be started, as far as is known without a new look

    def next(self) -> Trial | None:
        """Start the next trial in the study; None when there is none after all.

        Raises SpaceExhaustedError.
        """

    def is_done(self) -> bool:
        """Tell, when no trial runs here and none may start, whether that is the end."""

    def rows(self, known: Sequence[Row] = (), changed: Collection[int] | None = None) -> list[Row]:
        """Read the study's trials as rows. Of known ones only those in `changed` may differ."""

    def can_record_after(self, error: Exception) -> bool:
        """Tell whether the study can still be written after an error that ends the loop."""

    def tend(self, running: Iterable[Trial], has_room: bool) -> tuple[list[str], list[int], bool]:
        """Do what is due by the clock.

        Returns lines for people, the numbers of trials that others have recorded, and whether the
        rows are to be read anew.
        """

    def next_deadline(self, has_room: bool) -> float:
        """Give when `tend` has something to do, by time.monotonic()."""


class Source(Protocol):
    """What gives a local study its next trial: draws, or the repetitions of a confirmation."""

    def ask(self, study: optuna.Study) -> Trial | None:
        """Start the next trial in the study; None when there is none."""


class LocalSupply:
    """Starts the trials of a study that this process alone writes."""

    def __init__(self, study: optuna.Study, plan: Plan, source: Source | None = None) -> None:
        """source: by default, draws from the plan's space."""
        self.study = study
        if source is None:
            source = drawer = Drawer(plan.space, plan.sampler, plan.seed)
            drawer.first = len(study.get_trials(deepcopy=False))
        self.source = source
        self.room = max(0, plan.n_trials - count_complete(self.rows()))

    def next(self) -> Trial | None:
        trial = self.source.ask(self.study)
        self.room = self.room - 1 if trial is not None else 0
        return trial

    def is_done(self) -> bool:
        return True

    def rows(self, known: Sequence[Row] = (), changed: Collection[int] | None = None) -> list[Row]:
        trials = self.study.get_trials(deepcopy=False)
        if changed is not None:
            trials = [trials[number] for number in changed]
        rows = {row.number: row for row in [*known, *rows_of(trials)]}
        return [rows[number] for number in sorted(rows)]

    def can_record_after(self, error: Exception) -> bool:
        return True

    def tend(self, running: Iterable[Trial], has_room: bool) -> tuple[list[str], list[int], bool]:
        return [], [], False

    def next_deadline(self, has_room: bool) -> float:
        return math.inf
