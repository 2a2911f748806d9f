"""Records how trials end (study, trial.json, error.log, tables) and says so in a line."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from writer_search.common.text import duration, one_line, percent
from writer_search.processes.causes import Cause
from writer_search.processes.plan import Plan
from writer_search.processes.runner import Runner
from writer_search.processes.running import RunningTrial
from writer_search.results.estimate import BEFORE
from writer_search.results.events import Events, trial_event
from writer_search.results.progress import Progress
from writer_search.results.report import ReportPage
from writer_search.results.rows import SECONDS, Row, count_complete, trial_dir
from writer_search.results.tables import SummaryFiles
from writer_search.study.records import write_error_log, write_record
from writer_search.study.supplies import Supply
from writer_search.study.weights import remove_weights

Result = TypeVar("Result")


class Recorder:
    """Tells the study of each end, brings the files up to date, and counts failures in a row.

    Each method that records an end raises UpdateFinishedTrialError where another search has taken
    the trial for dead and recorded it.
    """

    def __init__(
        self,
        plan: Plan,
        supply: Supply,
        rows: list[Row],
        runner: Runner,
        progress: Progress,
        events: Events,
        page: ReportPage,
    ) -> None:
        self.rows = rows  # as of the last change
        self.gave_up = ""  # why; for good, whatever the trials do that still run
        self.unsaved: list[int] = []  # trials that ended without saving what they had just done
        self._plan, self._supply, self._study = plan, supply, supply.study
        self._runner = runner  # which trials run, meanwhile
        self._progress, self._events, self._page = progress, events, page
        self.summary = SummaryFiles(plan.checkpoint_dir, plan.space.fixed)
        self._failures: list[Cause] = []  # in a row
        self._without_weights: set[int] = set()  # trials whose weights were deleted

    @property
    def complete(self) -> int:
        return count_complete(self.rows)

    def read(self) -> None:
        """Read all trials anew."""
        self.rows = self._supply.rows()

    def end_complete(self, running: RunningTrial, value: float) -> None:
        """Record a complete trial."""
        self._failures.clear()
        self._note_break(running)
        ended = running.trial, TrialState.COMPLETE, running.epoch, running.seconds
        self._tell(*ended, value)
        self._say(running, f"complete | val macro top-1 {percent(value)}")

    def tell_pruned(self, running: RunningTrial) -> None:
        """Record that a trial is not worth finishing.

        At once: a search killed from here on leaves a pruned trial, not a lost one.
        """
        self._note_break(running)
        self._tell(running.trial, TrialState.PRUNED, running.epoch, running.seconds)

    def end_pruned(self, running: RunningTrial) -> None:
        """Note that a pruned trial's process has ended."""
        self._failures.clear()
        self._say(running, f"pruned at epoch {running.epoch}")

    def _note_break(self, running: RunningTrial) -> None:
        """Note what was trained before a break: its seconds are not among the trial's."""
        before = running.epoch if running.begun == math.inf else running.begun
        if before > 0:
            running.trial.set_user_attr(BEFORE, before)

    def end_failed(self, trial: Trial, cause: Cause, epochs: int, seconds: float) -> None:
        """Record a trial that failed by itself, or that was interrupted, after so many epochs."""
        if cause.unsaved:
            self.unsaved.append(trial.number)
        trial.set_user_attr("failure", str(cause))
        if cause.is_resumable:
            trial.set_user_attr("interrupted" if cause.is_interruption else "resumable", True)
        directory = trial_dir(self._plan.checkpoint_dir, trial.number)
        self.attempt(
            lambda: write_error_log(
                directory,
                str(cause),
                epoch=epochs or None,
                traceback=cause.traceback,
                advice=cause.advice,
            )
        )
        self._tell(trial, TrialState.FAIL, epochs, seconds)
        self._remove_weights()
        if not cause.is_interruption:
            self._count(cause)
        kind = "" if cause.is_interruption else "failed: "  # its words begin with "interrupted"
        facts = f"{kind}{one_line(cause)} | {duration(seconds)}"
        self._progress.end(trial.number, facts, self.complete)

    def _count(self, cause: Cause) -> None:
        self._failures.append(cause)
        number = len(self._failures)
        if number >= self._plan.max_consecutive_failed_trials:
            ((commonest, _),) = Counter(failure.same for failure in self._failures).most_common(1)
            self.gave_up = (
                f"{number} failed trials in a row; common cause: {one_line(commonest[1])}"
            )

    def let_go(self, number: int) -> None:
        """Say that another search has recorded a trial of this one."""
        self._progress.end(
            number,
            "this search was silent for too long, and another one has recorded the trial",
            self.complete,
        )

    def _say(self, running: RunningTrial, facts: str) -> None:
        self._remove_weights()
        took = duration(running.seconds)
        self._progress.end(running.number, f"{facts} | {took}", self.complete)

    def _tell(
        self,
        trial: Trial,
        state: TrialState,
        epochs: int,
        seconds: float,
        value: float | None = None,
    ) -> None:
        """Tell the study, and bring the summary up to date."""
        directory = self._plan.checkpoint_dir
        try:
            trial.set_user_attr("epochs", epochs)
            trial.set_user_attr(SECONDS, round(seconds, 3))
            told = self._study.tell(trial.number, value, state=state)
        except ValueError:
            if not self._study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                raise
            raise UpdateFinishedTrialError from None
        self.rows = self._supply.rows(self.rows, [trial.number, *self._runner.numbers])
        # The database has it. What a full disk keeps from being written now is written later.
        self.attempt(lambda: write_record(directory, told))
        self.attempt(lambda: self.summary.write(self.rows))
        self._page.trial_has_ended()
        self._events.send(trial_event(directory, trial.number, self.rows, self._plan.n_trials))

    def _remove_weights(self) -> None:
        """Delete weights that nobody needs; of a trial whose process still writes them, later."""
        directory, kept = self._plan.checkpoint_dir, self._plan.kept_models
        if kept is not None:
            running, removed = set(self._runner.numbers), self._without_weights
            self.attempt(lambda: remove_weights(directory, self.rows, kept, running, removed))

    def attempt(self, write: Callable[[], Result]) -> Result | None:
        """Write or delete a file that is not worth the search: say so where it cannot be done."""
        try:
            return write()
        except OSError as error:
            print(f"warning: {one_line(error)}", file=sys.stderr, flush=True)
            return None
