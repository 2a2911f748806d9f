"""The loop that owns the study: ask, start a process, hear, tell, until there is no more.

One process, no threads: nothing else writes the database. Trials run in processes of their own
and talk through pipes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from writer_search.common.errors import UserError
from writer_search.common.place import spare_files
from writer_search.common.signals import StopSignals
from writer_search.common.text import one_line
from writer_search.config import BACKBONES
from writer_search.processes.causes import Cause, Kind, by_signal, of_error
from writer_search.processes.fork_server import preload_torchvision
from writer_search.processes.messages import CONTINUE, PRUNE, STOP
from writer_search.processes.plan import Plan
from writer_search.processes.runner import Runner
from writer_search.processes.running import Complete, Failed, News, Pruned, Report, RunningTrial
from writer_search.results.events import Events
from writer_search.results.page.snapshot import CONFIRMING, Standing
from writer_search.results.progress import Progress
from writer_search.results.report import ReportPage
from writer_search.results.rows import Row, count_complete, has_saved, trial_dir
from writer_search.results.tables import was_cut_short
from writer_search.space import backbones_of
from writer_search.study.draws import SpaceExhaustedError, config_of, warm_up_epochs
from writer_search.study.outlook import Outlook
from writer_search.study.recorder import Recorder
from writer_search.study.records import finished_value, write_config
from writer_search.study.shared.storage import StorageUnreachableError
from writer_search.study.supplies import Supply
from writer_search.study.unfinished import checkpoint_to_continue


class Preload:
    """Lets torchvision be imported for later trials while the first one trains.

    Or at once, where all need it. What is not the program's own has published weights. Ranks of a
    trial need torch's compiler, which torchvision brings along: each would import it by itself.
    """

    def __init__(self, backbones: Sequence[str], ranks: int) -> None:
        needs = [ranks > 1 or BACKBONES[name] for name in backbones]
        self._is_due, self._is_needed_now = any(needs), all(needs)

    def look(self, running: Iterable[RunningTrial]) -> None:
        trains = any(trial.begun < math.inf for trial in running)
        if self._is_due and (trains or self._is_needed_now):
            self._is_due = False
            preload_torchvision()


@dataclass
class Search:
    """Runs a supply's trials until there are no more, a signal comes, or too many fail.

    confirms: the finished search whose best trials are trained again here; the report is of that
    one.
    """

    plan: Plan
    stop: StopSignals
    supply: Supply
    confirms: Search | None = None
    exhausted: bool = False  # every configuration of a finite space has been drawn

    def __post_init__(self) -> None:
        plan, whole, rows = self.plan, self.confirms, self.supply.rows()
        self.page: ReportPage = whole.page if whole else ReportPage(plan.checkpoint_dir, plan.data)
        self.events: Events = whole.events if whole else Events(plan.on_event)
        latest = time.monotonic() + (plan.timeout or math.inf)
        self.deadline: float = whole.deadline if whole else latest  # no trial starts after it
        self.progress = Progress(count_complete(rows), plan.n_trials)
        self.runner = Runner(plan, self.progress, partial(write_config, plan))
        self.recorder = Recorder(
            plan, self.supply, rows, self.runner, self.progress, self.events, self.page
        )
        self.outlook = Outlook(plan, self.supply, self.recorder, self.runner)
        self.preload = Preload(backbones_of(plan.space), plan.ranks)

    @property
    def rows(self) -> list[Row]:
        return self.recorder.rows

    @property
    def complete(self) -> int:
        return self.recorder.complete

    @property
    def has_all(self) -> bool:
        """Tell whether all wanted trials are complete, or all that the space has."""
        has_drawn_all = self.exhausted and self.complete > 0 and not was_cut_short(self.rows)
        return self.complete >= self.plan.n_trials or has_drawn_all

    # ----------------------------------------------------------------------------------- the story

    def run(self) -> None:
        """Run the search. Whatever it raises, no process of it stays behind."""
        with spare_files() as free_files:
            try:
                self.loop()
                self.give_up_displaced()
            except Exception as error:
                shortage = free_files()  # Optuna and SQLite would call it something else
                self.rescue(shortage or error)
                if shortage is not None:
                    raise shortage from None
                raise
            finally:
                self.runner.kill_all()
                self.progress.close()

    def loop(self) -> None:
        while True:
            self.preload.look(self.runner.running.values())
            while self.may_start():
                self.start_next()
            if not self.runner.running and (self.is_over() or self.supply.is_done()):
                return
            self.wait_for_news()

    def may_start(self) -> bool:
        if self.stop.name is not None:
            return False
        if self.runner.next_displaced() is not None:
            return True
        return self.runner.has_room and self.supply.room > 0 and not self.is_over()

    def is_over(self) -> bool:
        """Tell whether this run starts no more trials, however many are wanted."""
        return bool(
            self.stop.name
            or self.recorder.gave_up
            or self.exhausted
            or not self.runner.devices.usable
            or time.monotonic() >= self.deadline
            or self.outlook.is_too_late()
        )

    # ---------------------------------------------------------------------------------------- start

    def start_next(self) -> None:
        """Start a trial whose GPU had failed on another one, or ask for the next trial."""
        plan, displaced = self.plan, self.runner.next_displaced()
        if displaced is not None:
            try:
                self.runner.restart(displaced)
            except OSError as error:
                cause = of_error(error, one_line(error))
                self.end_failed(displaced.trial, cause, displaced.epoch, displaced.seconds)
            return
        try:
            trial = self.supply.next()
        except SpaceExhaustedError as error:
            self.exhausted = True
            self.progress.line(f"the space is exhausted: {error}")
            return
        if trial is None:
            return
        try:
            config = config_of(trial, plan.space, plan.settings, plan.seed)
            self.progress.start(trial.number, config.most_epochs)
            directory = trial_dir(plan.checkpoint_dir, trial.number)
            earlier = checkpoint_to_continue(self.supply.study, plan.checkpoint_dir, trial)
            self.runner.start(trial, config, directory, earlier)
        except StorageUnreachableError:
            raise  # it is the search's end, not the trial's failure, which nobody would go on with
        except (OSError, UserError, ValueError) as error:
            self.end_failed(trial, of_error(error, one_line(error)), 0, 0.0)

    # ----------------------------------------------------------------------------------------- news

    def wait_for_news(self) -> None:
        """Wait for a message, a signal or a deadline, and act on it."""
        shown = self.confirms or self
        # Now, when all that can has been started.
        self.page.write_if_due(shown.rows, shown.supply.study, self.standing)
        trials = self.runner.connections()
        ready = connection.wait([*trials, self.stop.wakeup], self.seconds_to_next_deadline())
        if self.stop.wakeup in ready:
            self.stop.wakeup.recv(4096)
        if self.stop.name is not None:
            self.runner.stop_all(by_signal(self.stop.name))
        for pipe in [pipe for pipe in trials if pipe in ready]:  # rank 0's report before an end
            self.hear(trials[pipe], self.runner.receive(trials[pipe], pipe))
        self.watch_the_clock()

    def seconds_to_next_deadline(self) -> float:
        soonest = min(self.runner.next_deadline(), self.supply.next_deadline(self.runner.has_room))
        others = self.page.seconds_to_next(), self.events.seconds_to_next_deadline()
        return min(max(0.0, soonest - time.monotonic()), *others)

    def standing(self) -> Standing:
        """Say how the search stands, for the report."""
        running = self.outlook.standing()
        if self.confirms is None:
            return running
        left = self.supply.room + len(self.runner.running) + len(self.runner.displaced)
        return replace(running, state=CONFIRMING, runs_left=left)

    def watch_the_clock(self) -> None:
        self.events.look()
        for running, news in self.runner.watch_the_clock():
            self.hear(running, news)
        under_way = [*self.runner.running.values(), *self.runner.displaced]
        told = [running.trial for running in under_way if not running.pruned]
        lines, gone, has_news = self.supply.tend(told, self.runner.has_room)
        for line in lines:
            self.progress.line(line)
        if has_news:
            self.recorder.read()
        for running in [trial for trial in under_way if trial.number in gone]:
            self.let_go(running)

    def hear(self, running: RunningTrial, news: News | None) -> None:
        """Record what a trial says."""
        try:
            if isinstance(news, Report):
                self.hear_report(running, news)
            elif news is not None:
                self.hear_end(running, news)
        except UpdateFinishedTrialError:
            self.let_go(running)

    def let_go(self, running: RunningTrial) -> None:
        """End a trial that another search has taken for dead and recorded."""
        self.runner.drop(running)
        self.recorder.let_go(running.number)

    def hear_report(self, running: RunningTrial, report: Report) -> None:
        """Store an epoch's value and answer whether the trial goes on."""
        epoch, value, config = report.epoch, report.value, running.job.config
        # A pruner compares epochs of training; what was fitted at once stands beside none of them.
        if epoch > running.epoch and not config.is_fitted:
            running.trial.report(value, epoch)
        running.note_epoch(report)
        # What is known to be done is not pruned. A pruner goes through all, also to say: too early.
        is_judged = not running.is_last_epoch and epoch >= warm_up_epochs(self.plan.epochs)
        if running.stop_cause is None and is_judged and running.trial.should_prune():
            running.pruned = True
            self.recorder.tell_pruned(running)
        running.child.order(PRUNE if running.pruned else STOP if running.stop_cause else CONTINUE)
        if not report.again:
            facts = self.outlook.epoch_facts(value, report.metrics)
            self.progress.epoch(running.number, epoch, config.most_epochs, facts)

    # ----------------------------------------------------------------------------------------- ends

    def hear_end(self, running: RunningTrial, end: News) -> None:
        """Record how a trial ended."""
        if isinstance(end, Pruned):
            self.recorder.end_pruned(running)
            return
        assert isinstance(end, (Complete, Failed))
        ended = value_of(end, running)
        if isinstance(ended, float):
            self.recorder.end_complete(running, ended)
            return
        if ended.cause.is_resumable and "continues" in running.trial.user_attrs:
            advanced = running.has_advanced and has_saved(running.job.trial_dir)
            running.trial.set_user_attr("advanced", advanced)
        self.end_failed(running.trial, ended.cause, running.epoch, running.seconds)

    def end_failed(self, trial: Trial, cause: Cause, epochs: int, seconds: float) -> None:
        if self.stop.name is not None and not cause.is_interruption:
            # Once a stop was asked for, whatever ends a trial is part of the stop.
            cause = Cause(Kind.SIGNAL, str(cause), traceback=cause.traceback)
        try:
            self.recorder.end_failed(trial, cause, epochs, seconds)
        except UpdateFinishedTrialError:
            self.recorder.let_go(trial.number)

    def give_up_displaced(self) -> None:
        """Record the trials that no GPU is left for, or that a signal came before."""
        for running in self.runner.displaced:
            cause = by_signal(self.stop.name) if self.stop.name else self.runner.devices.why_none()
            assert cause is not None, "a displaced trial is started again where a device is left"
            self.end_failed(running.trial, cause, running.epoch, running.seconds)
        self.runner.displaced.clear()

    def rescue(self, error: Exception) -> None:
        """Let running trials save and end when the loop itself has failed, and record them.

        What cannot be recorded stays marked as running: the next start records it, or another one.
        """
        cause = Cause(Kind.SEARCH_FAILED, f"interrupted: the search failed ({one_line(error)})")
        can_record = self.supply.can_record_after(error)
        self.runner.stop_all(cause)
        while self.runner.running:
            trials = self.runner.connections()
            left = self.runner.next_deadline() - time.monotonic()
            ready = trials.keys() & set(connection.wait(list(trials), timeout=max(0.0, left)))
            told = [(trials[pipe], self.runner.receive(trials[pipe], pipe)) for pipe in ready]
            for running, news in [*told, *self.runner.watch_the_clock()]:
                if isinstance(news, Report):
                    running.child.order(STOP)
                elif isinstance(news, Failed) and news.cause.unsaved and not can_record:
                    self.recorder.unsaved.append(running.number)
                elif news is not None and can_record:
                    try:
                        self.hear_end(running, news)
                    except Exception:  # most likely what ended the loop
                        can_record = False


def value_of(end: Complete | Failed, running: RunningTrial) -> float | Failed:
    """Give the value of a trial that is done, even if only its word was lost; or how it failed."""
    if isinstance(end, Failed):
        value = finished_value(running.job.trial_dir)
        return end if value is None else value
    value = float(end.metrics["macro_top1"])
    if not math.isfinite(value):
        return Failed(Cause(Kind.NOT_FINITE, f"the trial's value is {value}"))
    return value
