"""The loop that owns the study: ask, start a process, receive reports, tell.

One process, no threads: nothing else writes the database. Trials run in processes of their own
and talk through pipes.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import datetime
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.trial import Trial, TrialState

from data import LineSet
from writer_search.common.cores import SharedCores
from writer_search.common.errors import UserError
from writer_search.common.files import write_json
from writer_search.common.signals import StopSignals
from writer_search.common.text import duration, one_line, percent
from writer_search.processes.deadlines import END_TIME, longest_epoch
from writer_search.processes.devices import STARTS_IN_A_ROW, Devices, Slot
from writer_search.processes.messages import CONTINUE, PRUNE, STOP, THREADS, Job
from writer_search.processes.parent import ChildProcess, TrialProcesses
from writer_search.processes.pictures import Drawing
from writer_search.results.estimate import Range, Timed, finished_epochs, range_text, seconds_left
from writer_search.results.events import Events, trial_event
from writer_search.results.progress import Progress
from writer_search.results.rows import DATABASE, Row, best_row, read_rows, trial_dir
from writer_search.results.tables import SummaryFiles
from writer_search.space import Space
from writer_search.study.draws import Drawer, SpaceExhaustedError, config_of, warm_up_epochs
from writer_search.study.records import (
    distributions_of,
    finished_value,
    write_error_log,
    write_record,
)
from writer_search.study.unfinished import checkpoint_to_continue
from writer_search.study.weights import remove_weights

Result = TypeVar("Result")

SMALLEST_BATCH = 4  # images at once, below which a trial that is out of memory fails
LONGEST_WAIT = 3600.0  # seconds; poll takes no more than 24 days
JOB_ENDS = f"interrupted before the end of the batch system's job ({END_TIME})"
TERMINATED = "interrupted by SIGTERM to the trial's own process"
CALM_SECONDS = 30.0  # after threads had to wait; twice as long each time
STOP_SECONDS = 20.0  # a trial that was told to stop and has not ended by then is killed


@dataclass(frozen=True)
class Plan:
    """What a run of the search is to do; nothing in here but `cores` changes while it runs."""

    checkpoint_dir: Path
    data: LineSet
    space: Space
    settings: dict[str, Any]
    n_trials: int
    slots: tuple[Slot, ...]  # the GPUs of each trial that runs at once
    ranks: int  # processes that train one trial together
    threads: int  # of each process, at most
    sampler: str
    seed: int
    timeout: float | None
    stop_at: float  # before the end of a batch system's job, by time.monotonic(); or infinity
    trial_timeout: float | None
    max_consecutive_failed_trials: int
    kept_models: int | None  # so many trials keep their weights, the best; None: all
    provenance: dict[str, Any]  # for config.json
    on_event: tuple[str, ...] | None = None  # the command that is told of each trial's end
    cores: SharedCores | None = None  # shared with other programs; None: `threads` stand

    @property
    def epochs(self) -> int:
        return int(self.settings["epochs"])

    @property
    def patience(self) -> int:
        return int(self.settings["patience"])


@dataclass
class RunningTrial:
    """A trial under way."""

    trial: Trial
    job: Job
    child: TrialProcesses
    slot: int
    started: float
    epoch: int = 0  # epochs done
    progress: float = 0.0  # epochs done, with a fraction
    best: float | None = None
    best_epoch: int = 0
    pruned: bool = False
    threads: int = 1  # of each of its processes, now
    calm: float = CALM_SECONDS  # before it has more of them again
    may_rise: float = -math.inf  # by time.monotonic()
    stop_cause: str | None = None
    kill_at: float = math.inf
    killed: bool = False

    @property
    def number(self) -> int:
        return int(self.trial.number)


@dataclass
class Search:
    """Runs trials until the budget of this run is spent, a signal comes, or too many fail."""

    study: optuna.Study
    plan: Plan
    stop: StopSignals
    running: dict[int, RunningTrial] = field(default_factory=dict)  # by slot
    displaced: list[RunningTrial] = field(default_factory=list)  # their GPU failed: to be restarted
    failures: list[str] = field(default_factory=list)  # causes of the failures in a row
    gave_up: str = ""  # why; for good, whatever the trials do that still run
    exhausted: bool = False
    rows: list[Row] = field(default_factory=list)  # of the database, as of the last change
    without_weights: set[int] = field(default_factory=set)  # trials whose weights were deleted
    to_start: int = 0  # trials that this run may still start
    deadline: float = math.inf  # after which no trial starts

    def __post_init__(self) -> None:
        plan = self.plan
        self.drawer = Drawer(plan.space, plan.sampler, plan.seed)
        self.devices = Devices(plan.slots)
        self.events = Events(plan.on_event)
        self.judged: tuple[list[Row], tuple[Row | None, list[Timed]]] | None = None
        self.summary = SummaryFiles(plan.checkpoint_dir)
        self.rows = self.read()
        self.to_start = max(0, plan.n_trials - self.complete())
        self.last_threads = plan.threads
        self.deadline = time.monotonic() + (plan.timeout or math.inf)
        self.progress = Progress(self.complete(), plan.n_trials, plan.epochs)
        self.drawing = Drawing(plan.checkpoint_dir)

    def run(self) -> None:
        """Run the search. Whatever it raises, no process of it stays behind."""
        try:
            self.loop()
            self.give_up_displaced()
            self.drawing.finish(self.stop.wakeup, self.stop.name is not None)
        finally:
            for trial in self.running.values():
                trial.child.kill()
            self.drawing.kill()
            self.progress.close()

    def loop(self) -> None:
        while True:
            while self.may_start():
                self.start_next()
            if not self.running and self.is_done():
                return
            self.wait_for_news()

    def is_done(self) -> bool:
        """Tell, when no trial runs here and none may start, whether that is the end."""
        return True

    def read(self, changed: Collection[int] | None = None) -> list[Row]:
        """Read the study's trials: all, or those that have changed since the last time."""
        read = read_rows(self.plan.checkpoint_dir / DATABASE, changed)
        if changed is None:
            return read
        known = {row.number: row for row in [*self.rows, *read]}
        return [known[number] for number in sorted(known)]

    def may_start(self) -> bool:
        if self.devices.free(self.running) is None or self.stop.name is not None:
            return False
        if self.displaced:
            return True
        return (
            self.to_start > 0
            and not self.gave_up
            and not self.exhausted
            and time.monotonic() < self.deadline
            and not self.is_too_late()
        )

    def is_too_late(self) -> bool:
        """Tell whether the batch system's job ends before one more epoch could."""
        if self.plan.stop_at == math.inf:
            return False
        now = time.monotonic()
        running = [(float(r.epoch), now - r.started) for r in self.running.values()]
        seconds = longest_epoch([*self.finished()[1], *running])
        return now + seconds >= self.plan.stop_at

    # -------------------------------------------------------------------------------------- start

    def start_next(self) -> None:
        """Start a trial whose GPU had failed on another one, or ask for the next trial."""
        if self.displaced:
            self.restart(self.displaced.pop(0))
            return
        try:
            trial = self.draw()
        except SpaceExhaustedError as error:
            self.exhausted = True
            self.progress.line(f"the space is exhausted: {error}, all of them different")
            return
        if trial is None:
            self.to_start = 0
            return
        self.to_start -= 1
        self.progress.start(trial.number)
        try:
            running = self.launch(trial)
        except (OSError, UserError) as error:
            self.record_failure(trial, one_line(error), epoch=0, seconds=0.0)
            return
        self.running[running.slot] = running

    def draw(self) -> Trial | None:
        """Start the next trial in the study; None when there is no room for one."""
        return self.drawer.ask(self.study)

    def launch(self, trial: Trial) -> RunningTrial:
        """Make the trial's directory and start its process."""
        plan = self.plan
        slot = self.free_slot()
        config = config_of(trial, plan.space, plan.settings, plan.seed)
        directory = trial_dir(plan.checkpoint_dir, trial.number)
        directory.mkdir()
        data = replace(plan.data, paths=(), report={})  # large, and no trial reads them
        continue_from = checkpoint_to_continue(self.study, plan.checkpoint_dir, trial)
        job = Job(
            config,
            data,
            directory,
            self.threads(),
            plan.slots[slot],
            continue_from,
            ranks=plan.ranks,
            # Ranks wait for one another: fewer threads in one would not help.
            gives_way=plan.cores is not None and plan.ranks == 1,
        )
        self.write_config(trial, job)
        child = TrialProcesses(job, ChildProcess)
        return RunningTrial(trial, job, child, slot, time.monotonic(), threads=job.threads)

    def threads(self) -> int:
        """Choose the threads of the next trial's processes: no more than have a core each."""
        plan = self.plan
        if plan.cores is None:
            return plan.threads
        left = (plan.cores.left() - self.held()) // plan.ranks
        threads = max(1, min(plan.threads, left))
        if threads != self.last_threads:
            self.progress.line(
                f"other programs keep {plan.cores.taken:.1f} cores busy: "
                f"{threads} thread(s) for each new trial"
            )
        self.last_threads = threads
        return threads

    def held(self) -> int:
        """Count the cores that running trials use."""
        return sum(running.threads * running.job.ranks for running in self.running.values())

    def give_threads_back(self) -> None:
        """Let trials with fewer threads have more of them where other programs are gone."""
        if self.plan.cores is None:
            return
        free = self.plan.cores.left_lately() - self.held()
        for running in self.running.values():
            more = min(self.plan.threads - running.threads, free)
            if more > 0 and running.job.gives_way and time.monotonic() >= running.may_rise:
                running.threads += more
                free -= more
                running.child.order(f"{THREADS}{running.threads}")
                self.progress.line(
                    f"trial {running.number:3d} | cores are free again: "
                    f"{running.threads} thread(s) from now on"
                )

    def free_slot(self) -> int:
        slot = self.devices.free(self.running)
        assert slot is not None, "may_start has looked"
        return slot

    def restart(self, running: RunningTrial) -> None:
        """Start a trial again on a free slot: its GPU had failed before it began."""
        running.slot, running.started = self.free_slot(), time.monotonic()
        running.job = replace(running.job, gpus=self.plan.slots[running.slot])
        self.running[running.slot] = running
        self.start_again(running)

    def start_again(self, running: RunningTrial) -> None:
        """Start a trial's process anew, as its job now says."""
        running.threads = running.job.threads
        self.write_config(running.trial, running.job)
        running.child = TrialProcesses(running.job, ChildProcess)

    def write_config(self, trial: Trial, job: Job) -> None:
        """Write config.json: all that it takes to repeat the trial, and to rebuild the study."""
        write_json(
            job.trial_dir / "config.json",
            {
                "number": trial.number,
                "hyperparameters": trial.params,
                "distributions": distributions_of(trial),
                "config": job.config.to_dict(),
                "config_hash": job.config.hash(),
                "data_fingerprint": self.plan.data.fingerprint,
                "user_attrs": trial.user_attrs,
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
                "device": ",".join(job.gpus) or "cpu",
                "ranks": job.ranks,
                "threads": job.threads,
                "micro_batch": job.micro_batch,
                "settings": self.plan.settings,
                **self.plan.provenance,
            },
        )

    # --------------------------------------------------------------------------------------- news

    def wait_for_news(self) -> None:
        """Wait for a message, a signal or a deadline, and act on it."""
        by_connection: dict[Any, RunningTrial] = {
            pipe: running for running in self.running.values() for pipe in running.child.connections
        }
        ready = connection.wait(
            [*by_connection, *self.drawing.connections, self.stop.wakeup],
            timeout=self.seconds_to_next_deadline(),
        )
        if self.stop.wakeup in ready:
            self.stop.wakeup.recv(4096)
        if self.stop.name is not None:
            self.stop_all(f"interrupted by {self.stop.name}")
        for pipe in by_connection.keys() & set(ready):
            # A trial whose end another rank has told has no connections any more.
            if pipe in by_connection[pipe].child.connections:
                self.receive(by_connection[pipe], pipe)
        if any(pipe in ready for pipe in self.drawing.connections):
            self.drawing.receive()
        self.watch_the_clock()

    def seconds_to_next_deadline(self) -> float:
        deadlines = [
            self.plan.stop_at if r.stop_cause is None else r.kill_at for r in self.running.values()
        ]
        if self.plan.trial_timeout is not None:
            deadlines += [
                r.started + self.plan.trial_timeout
                for r in self.running.values()
                if r.stop_cause is None
            ]
        soonest = min(deadlines, default=math.inf) - time.monotonic()
        return min(LONGEST_WAIT, max(0.0, soonest), self.events.seconds_to_next_deadline())

    def watch_the_clock(self) -> None:
        self.events.look()
        self.give_threads_back()
        now = time.monotonic()
        if now >= self.plan.stop_at:
            self.stop_all(JOB_ENDS)
        limit = self.plan.trial_timeout
        for running in self.running.values():
            if limit is not None and now >= running.started + limit:
                self.stop_one(running, f"ran longer than --trial_timeout {limit:g} s")
            if now >= running.kill_at and not running.killed:
                running.killed = True
                running.child.kill()

    def stop_all(self, cause: str) -> None:
        for running in self.running.values():
            self.stop_one(running, cause)

    def stop_one(self, running: RunningTrial, cause: str) -> None:
        """Tell a trial to save and end; it is killed when it does not."""
        if running.stop_cause is None:
            running.stop_cause = cause
            running.kill_at = time.monotonic() + STOP_SECONDS
            running.child.order(STOP)

    def receive(self, running: RunningTrial, pipe: connection.Connection) -> None:
        """Act on one message of a trial."""
        message = running.child.receive(pipe)
        if message is None:
            return
        kind, content = message
        if kind == "started":
            self.devices.started(content["gpu"])
        elif kind == "progress":
            running.progress = content["progress"]
            self.progress.advance(running.number, running.progress)
        elif kind == "report":
            self.receive_report(running, content["epoch"], content["metrics"], content["again"])
        elif kind == "threads":
            running.threads = content["threads"]
            running.may_rise = time.monotonic() + running.calm
            running.calm *= 2
            self.progress.line(
                f"trial {running.number:3d} | its threads wait for cores: "
                f"{running.threads} thread(s) from now on"
            )
        else:
            running.child.end()
            self.receive_end(running, kind, content)

    def receive_end(self, running: RunningTrial, kind: str, content: dict[str, Any]) -> None:
        """Act on a trial's last message, or on its death without one."""
        may_restart = running.stop_cause is None
        if kind == "out_of_memory" and may_restart and smaller_batch(running.job):
            self.start_smaller(running)
        elif kind == "device_failed" and may_restart:
            self.leave_device(running, content["gpu"], content["cause"])
        elif kind == "done":
            self.end_complete(running, content["metrics"])
        elif kind == "stopped" and running.stop_cause is None:
            running.stop_cause = TERMINATED
            self.end_failed(running, kind)
        elif kind == "died":
            how = "killed when it did not stop in time" if running.killed else content["cause"]
            self.end_failed(running, how, _end_of(content["log"]))
        else:  # pruned, stopped, failed
            self.end_failed(running, content.get("cause", kind), content.get("traceback", ""))

    def start_smaller(self, running: RunningTrial) -> None:
        """Start a trial that ran out of memory again, in a fresh process, with half the batch.

        Gradients are accumulated to the same batch; the sampler never learns of it.
        """
        directory = running.job.trial_dir
        has_saved = (directory / "latest_checkpoint.pth").exists()
        running.job = replace(
            running.job,
            micro_batch=smaller_batch(running.job),
            continue_from=directory if has_saved else running.job.continue_from,
        )
        running.trial.set_user_attr("micro_batch", running.job.micro_batch)
        self.start_again(running)
        self.progress.line(
            f"trial {running.number:3d} | out of memory: started again with "
            f"{running.job.micro_batch} images at once"
        )

    def leave_device(self, running: RunningTrial, gpu: str, cause: str) -> None:
        """Take a trial off a GPU that failed before the trial began: that is not its fault."""
        del self.running[running.slot]
        self.displaced.append(running)
        self.progress.line(
            f"trial {running.number:3d} | GPU {gpu} failed at the start: {one_line(cause)}"
        )
        if self.devices.failed(gpu, cause):
            print(
                f"warning: GPU {gpu} failed {STARTS_IN_A_ROW} times in a row and is set aside: "
                f"{one_line(cause)}",
                file=sys.stderr,
                flush=True,
            )

    def give_up_displaced(self) -> None:
        """Record the trials that no GPU is left for, or that a signal came before."""
        for running in self.displaced:
            cause = f"interrupted by {self.stop.name}" if self.stop.name else self.no_device()
            self.record_failure(running.trial, str(cause), 0, 0.0, interrupted=True)
        self.displaced.clear()

    def no_device(self) -> str | None:
        """Say why no device is left; None where one is."""
        if self.devices.usable:
            return None
        causes = [f"GPU {gpu}: {one_line(why)}" for gpu, why in self.devices.set_aside.items()]
        return "no device is left: " + "; ".join(causes)

    def receive_report(
        self, running: RunningTrial, epoch: int, metrics: dict[str, Any], again: bool
    ) -> None:
        """Store an epoch's value and answer whether the trial goes on.

        again: the epoch was trained before a break; it may be new to this trial all the same.
        """
        value = float(metrics["macro_top1"])
        config = running.job.config
        # A pruner compares epochs of training; what was fitted at once stands beside none of them.
        if epoch > running.epoch and not config.is_fitted:
            running.trial.report(value, epoch)
        running.epoch, running.progress = max(epoch, running.epoch), float(epoch)
        if running.best is None or value > running.best:
            running.best, running.best_epoch = value, epoch
        # What is done is not pruned. A pruner goes through all trials, also to say: too early.
        is_last = epoch >= config.epochs or epoch - running.best_epoch >= config.patience
        is_judged = not is_last and epoch >= warm_up_epochs(self.plan.epochs)
        if running.stop_cause is None and is_judged and running.trial.should_prune():
            # Told at once: a search killed from here on leaves a pruned trial, not a lost one.
            running.pruned = True
            self.finish(running.trial, TrialState.PRUNED, epoch)
        running.child.order(PRUNE if running.pruned else STOP if running.stop_cause else CONTINUE)
        if not again:
            facts = self.epoch_facts(value, metrics)
            self.progress.epoch(running.number, epoch, config.epochs, facts)

    def epoch_facts(self, value: float, metrics: dict[str, Any]) -> str:
        left = self.time_left()
        return " | ".join(
            [
                f"loss {metrics['train_loss']:.3f}",
                f"val macro top-1 {percent(value)}",
                f"best {self.best_text()}",
                f"{duration(metrics['seconds'])}",
                f"left {range_text(left)}",
            ]
        )

    def finished(self) -> tuple[Row | None, list[Timed]]:
        """Give the best complete trial, and how long trials took; sought once for given rows."""
        if self.judged is None or self.judged[0] is not self.rows:
            self.judged = self.rows, (best_row(self.rows), finished_epochs(self.rows))
        return self.judged[1]

    def best_text(self) -> str:
        best = self.finished()[0]
        values = [(r.best, -r.number) for r in self.running.values() if r.best is not None]
        if best is not None and best.value is not None:
            values.append((best.value, -best.number))
        if not values:
            return "none yet"
        value, negative = max(values)
        return f"{percent(value)} (trial {-negative})"

    def time_left(self) -> Range | None:
        now = time.monotonic()
        running = [(r.progress, now - r.started) for r in self.running.values()]
        return seconds_left(
            self.finished()[1],
            running,
            self.to_start,
            self.plan.epochs,
            len(self.plan.slots),
        )

    # ---------------------------------------------------------------------------------------- end

    def end_complete(self, running: RunningTrial, metrics: dict[str, Any]) -> None:
        value = float(metrics["macro_top1"])
        if not math.isfinite(value):
            self.end_failed(running, f"the trial's value is {value}")
            return
        self.failures.clear()
        self.finish(running.trial, TrialState.COMPLETE, running.epoch, value)
        self.leave(running, f"complete | val macro top-1 {percent(value)}")

    def end_failed(self, running: RunningTrial, cause: str, traceback: str = "") -> None:
        """Record the end of a trial that was pruned, stopped, failed, or died without a word."""
        if running.pruned:
            self.failures.clear()
            self.leave(running, f"pruned at epoch {running.epoch}")
            return
        value = finished_value(running.job.trial_dir)
        if value is not None:  # it was done: only its word was lost
            self.end_complete(running, {"macro_top1": value})
            return
        epoch = int(running.progress) + 1  # the one under way
        if running.stop_cause is not None:
            # Once a stop was asked for, whatever ends the trial is part of the stop.
            killed = "" if cause == "stopped" else f" (it did not save: {cause})"
            cause = f"{running.stop_cause} at epoch {epoch}{killed}"
        del self.running[running.slot]
        self.record_failure(
            running.trial,
            cause,
            running.epoch,
            time.monotonic() - running.started,
            traceback,
            interrupted=running.stop_cause in (JOB_ENDS, TERMINATED),
        )

    def record_failure(
        self,
        trial: Trial,
        cause: str,
        epoch: int,
        seconds: float,
        traceback: str = "",
        interrupted: bool = False,
    ) -> None:
        """Record a trial that failed by itself, or that was interrupted."""
        directory = trial_dir(self.plan.checkpoint_dir, trial.number)
        interrupted = interrupted or self.stop.name is not None
        trial.set_user_attr("failure", cause)
        if interrupted:
            trial.set_user_attr("interrupted", True)
        advice = (
            "nothing to do: the same command goes on with new trials"
            if interrupted
            else _advice(cause)
        )
        self.attempt(
            lambda: write_error_log(
                directory, cause, epoch=epoch or None, traceback=traceback, advice=advice
            )
        )
        self.finish(trial, TrialState.FAIL, epoch)
        self.remove_weights()
        if not interrupted:
            self.failures.append(re.sub(r" (at|in) epoch \d+", "", cause))  # to be counted
            if len(self.failures) >= self.plan.max_consecutive_failed_trials:
                ((commonest, _),) = Counter(self.failures).most_common(1)
                number = len(self.failures)
                self.gave_up = (
                    f"{number} failed trials in a row; common cause: {one_line(commonest)}"
                )
        self.progress.end(
            trial.number, f"failed: {one_line(cause)} | {duration(seconds)}", self.complete()
        )

    def leave(self, running: RunningTrial, facts: str) -> None:
        del self.running[running.slot]
        self.remove_weights()
        seconds = time.monotonic() - running.started
        self.progress.end(running.number, f"{facts} | {duration(seconds)}", self.complete())

    def finish(
        self, trial: Trial, state: TrialState, epochs: int, value: float | None = None
    ) -> None:
        """Tell the study, and bring the summary up to date."""
        directory = self.plan.checkpoint_dir
        trial.set_user_attr("epochs", epochs)
        told = self.study.tell(trial.number, value, state=state)
        self.rows = self.read([trial.number, *(r.number for r in self.running.values())])
        # The database has it. What a full disk keeps from being written now is written later.
        self.attempt(lambda: write_record(directory, told))
        self.attempt(lambda: self.summary.write(self.rows))
        self.redraw()
        self.events.send(trial_event(directory, trial.number, self.rows, self.plan.n_trials))

    def remove_weights(self) -> None:
        """Delete weights that nobody needs; of a trial whose process still writes them, later."""
        directory, kept = self.plan.checkpoint_dir, self.plan.kept_models
        if kept is None:
            return
        running = {other.number for other in self.running.values()}
        self.attempt(
            lambda: remove_weights(directory, self.rows, kept, running, self.without_weights)
        )

    def redraw(self) -> None:
        """Let the drawing process draw the present state."""
        self.drawing.request()

    def attempt(self, write: Callable[[], Result]) -> Result | None:
        """Write or delete a file that is not worth the search: say so where it cannot be done."""
        try:
            return write()
        except OSError as error:
            print(f"warning: {one_line(error)}", file=sys.stderr, flush=True)
            return None

    def complete(self) -> int:
        return sum(row.state == "COMPLETE" for row in self.rows)


def smaller_batch(job: Job) -> int | None:
    """Give half of what a trial had on a device at once; None when that is too little."""
    half = (job.micro_batch or -(-job.config.batch_size // job.ranks)) // 2
    return half if half >= SMALLEST_BATCH else None


def _advice(cause: str) -> str:
    if "out of memory" in cause or "SIGKILL" in cause:
        return "a smaller batch (--fix batch_size=16), a smaller backbone, fewer trials at once"
    if "not finite" in cause:
        return "lower learning rates: --space with a lower end, or --fix learning_rate=0.001"
    if "trial_timeout" in cause:
        return "a longer --trial_timeout or fewer --epochs"
    if "No space left" in cause:
        return "make room on the disk; the same command goes on"
    return "the traceback below and train.log; the same command goes on with other trials"


def _end_of(log: Path, lines: int = 30) -> str:
    """Quote the end of the log of a trial's process."""
    try:
        text = log.read_text(errors="backslashreplace")
    except OSError:
        return ""
    return f"end of {log.name}:\n" + "\n".join(text.splitlines()[-lines:]) if text else ""
