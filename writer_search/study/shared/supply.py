"""The trials of a study that searches on several machines share: --storage."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection, Iterable, Sequence

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial

from writer_search.common.locks import remove_dead_locks
from writer_search.results.rows import Row, rows_of
from writer_search.study.draws import SpaceExhaustedError
from writer_search.study.shared.fleet import SIGN_SECONDS, Fleet, count_complete
from writer_search.study.shared.storage import StorageUnreachableError

# Between two looks at what the others do, for a search that has a place free: soon at first.
FIRST_LOOK_SECONDS, LOOK_SECONDS = 1.0, 10.0


class SharedSupply:
    """Starts trials beside other searches, shows that they live, and records those of dead ones."""

    def __init__(self, fleet: Fleet) -> None:
        self.study, self.fleet = fleet.study, fleet
        self.room = 0
        self._last_look = -math.inf
        self._pause = FIRST_LOOK_SECONDS
        self._next_sign = -math.inf
        self._others_have_the_rest = False  # of a finite space

    def next(self) -> Trial | None:
        try:
            trial = self.fleet.claim()
            self._pause, self._others_have_the_rest = FIRST_LOOK_SECONDS, False
        except SpaceExhaustedError as error:
            # What others still train may be interrupted: then somebody has to go on with it.
            if not error.others_train:
                raise
            trial, self._others_have_the_rest = None, True
        self.room = self.room - 1 if trial is not None else 0
        return trial

    def is_done(self) -> bool:
        """Stay while others run trials that are wanted, and that somebody may have to take over."""
        trials = self.fleet.trials()
        self.room = self.fleet.room(trials)
        if self.room and not self._others_have_the_rest:
            self._last_look = -math.inf  # another search was quicker, and has left room since
        has_all = count_complete(trials) >= self.fleet.n_trials
        return has_all or not (self.room or self.fleet.others_running(trials))

    def rows(self, known: Sequence[Row] = (), changed: Collection[int] | None = None) -> list[Row]:
        trials = self.fleet.trials()
        self.room = self.fleet.room(trials)
        return rows_of(trials)

    def can_record_after(self, error: Exception) -> bool:
        return not isinstance(error, StorageUnreachableError)

    def next_deadline(self, has_room: bool) -> float:
        return min(self._next_look(has_room), self._next_sign)

    def tend(self, running: Iterable[Trial], has_room: bool) -> tuple[list[str], list[int], bool]:
        """Show that this search's trials live, and see what the others do."""
        now, gone = time.monotonic(), []
        if now >= self._next_sign:
            self._next_sign = now + SIGN_SECONDS
            for trial in running:
                try:
                    self.fleet.sign(trial)
                except UpdateFinishedTrialError:
                    gone.append(trial.number)
        if now < self._next_look(has_room):
            return [], gone, False
        return self.look(), gone, True

    def _next_look(self, has_room: bool) -> float:
        return self._last_look + (self._pause if has_room else SIGN_SECONDS)

    def look(self) -> list[str]:
        """Record the trials of searches that are dead; a line for each."""
        lines = bury_dead(self.fleet, self.fleet.trials())
        self._pause = min(LOOK_SECONDS, 2 * self._pause)
        self._last_look = time.monotonic() - random.uniform(0, self._pause / 5)  # not all at once
        return lines


def bury_dead(fleet: Fleet, trials: Sequence[FrozenTrial]) -> list[str]:
    """Record the trials of searches that have died; returns a line for each."""
    lines = [fleet.bury(trial) for trial in fleet.dead(trials)]
    remove_dead_locks(fleet.checkpoint_dir)
    return [line for line in lines if line is not None]
