"""Starts, restarts, stops and kills the processes of trials, and hears what they say."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from writer_search.common.text import one_line
from writer_search.config import STEPS_BETWEEN_RANKS, TrialConfig, half_batch
from writer_search.processes.causes import (
    JOB_ENDS,
    STOPS,
    TERMINATED,
    Cause,
    Kind,
    of_error,
)
from writer_search.processes.devices import FAULTS, STARTS_IN_A_ROW, Devices, Slot
from writer_search.processes.messages import STOP, THREADS, Job
from writer_search.processes.parent import ChildProcess, TrialProcesses
from writer_search.processes.plan import Plan
from writer_search.results.progress import Progress
from writer_search.results.rows import has_saved

if TYPE_CHECKING:
    from optuna.trial import Trial

CALM_SECONDS = 30.0  # after threads had to wait; twice as long each time
# A trial that was told to stop and has not ended by then is killed; longer where its batches are.
STOP_SECONDS = 20.0
STOP_BATCHES = 3  # a batch, a checkpoint, and one more for a machine that is busy


@dataclass
class RunningTrial:
    """A trial under way."""

    trial: Trial
    job: Job
    child: TrialProcesses
    slot: int
    started: float
    epoch: int = 0  # epochs done
    epochs_before: int = 0  # of these, what was trained before a break
    progress: float = 0.0  # epochs done, with a fraction
    begun: float = math.inf  # the progress that it began with
    best: float | None = None
    best_epoch: int = 0
    pruned: bool = False
    threads: int = 1  # of each of its processes, now
    calm: float = CALM_SECONDS  # before it has more of them again
    may_rise: float = -math.inf  # by time.monotonic()
    stop_cause: Cause | None = None
    kill_at: float = math.inf
    killed: bool = False
    heard: float = math.inf  # when it last said anything, since it has trained
    slowest: float = 0.0  # the longest time between two messages: a batch, or a validation

    opened: set[str] = field(default_factory=set)  # GPUs that its processes have opened
    faulted: set[str] = field(default_factory=set)  # GPUs that failed under it

    @property
    def number(self) -> int:
        return int(self.trial.number)

    @property
    def has_advanced(self) -> bool:
        return self.progress > self.begun or self.epoch > self.epochs_before


@dataclass(frozen=True)
class Report:
    """An epoch has ended. again: it was trained before a break."""

    epoch: int
    metrics: dict[str, Any]
    again: bool


@dataclass(frozen=True)
class Complete:
    """A trial is complete."""

    metrics: dict[str, Any]


@dataclass(frozen=True)
class Pruned:
    """A trial has ended that was told so."""


@dataclass(frozen=True)
class Failed:
    """A trial has failed, or was interrupted."""

    cause: Cause


News = Report | Complete | Pruned | Failed


class Runner:
    """The processes of all trials that run at once.

    `write_config` writes a trial's config.json before its process starts.
    """

    def __init__(
        self, plan: Plan, progress: Progress, write_config: Callable[[Trial, Job], None]
    ) -> None:
        self.running: dict[int, RunningTrial] = {}  # by slot
        self.displaced: list[RunningTrial] = []  # their GPU failed: to be started again
        self.devices = Devices(plan.slots)
        self._plan, self._progress, self._write_config = plan, progress, write_config
        self._last_threads = plan.threads

    @property
    def has_room(self) -> bool:
        return self.devices.free(self.running) is not None

    def next_displaced(self) -> RunningTrial | None:
        """Give the first trial off its GPU for which there is room on another one."""
        rooms = (
            r for r in self.displaced if self.devices.free(self.running, r.faulted) is not None
        )
        return next(rooms, None)

    def device(self) -> Slot:
        """Give the device for one process after the trials: a GPU that works, or none: the CPU."""
        usable = self.devices.usable
        return self._plan.slots[usable[0]][:1] if usable else ()

    def connections(self) -> dict[Connection, RunningTrial]:
        """Give what becomes readable when a trial has said something."""
        return {pipe: r for r in self.running.values() for pipe in r.child.connections}

    # -------------------------------------------------------------------------------------- start

    def start(
        self, trial: Trial, config: TrialConfig, directory: Path, continue_from: Path | None
    ) -> None:
        """Make a trial's directory and start its process. Raises OSError."""
        plan, slot = self._plan, self._free_slot()
        directory.mkdir()
        job = Job(
            config,
            plan.data.for_trial(),
            directory,
            self.threads(),
            plan.slots[slot],
            continue_from,
            ranks=plan.ranks,
            sharing=self.devices.sharing(slot),
            # Ranks wait for one another: fewer threads in one would not help.
            gives_way=plan.cores is not None and plan.ranks == 1,
        )
        self._write_config(trial, job)
        child = TrialProcesses(job, ChildProcess)
        running = RunningTrial(trial, job, child, slot, time.monotonic(), threads=job.threads)
        self.running[slot] = running

    def restart(self, running: RunningTrial) -> None:
        """Start a trial again on a free slot, as its GPU failed. Raises OSError."""
        self.displaced.remove(running)
        running.slot, running.started = self._free_slot(running.faulted), time.monotonic()
        running.job = replace(
            running.job,
            gpus=self._plan.slots[running.slot],
            sharing=self.devices.sharing(running.slot),
        )
        self.running[running.slot] = running
        self._start_again(running)

    def _start_again(self, running: RunningTrial) -> None:
        """Start a trial's process anew, as its job now says."""
        running.threads = running.job.threads
        running.heard = math.inf
        running.opened.clear()
        try:
            self._write_config(running.trial, running.job)
            running.child = TrialProcesses(running.job, ChildProcess)
        except OSError:
            self._remove(running)
            raise

    def _remove(self, running: RunningTrial) -> None:
        del self.running[running.slot]
        self.devices.ended(running.job.gpus)

    def _free_slot(self, avoided: Collection[str] = ()) -> int:
        slot = self.devices.free(self.running, avoided)
        assert slot is not None, "the loop has asked for room"
        return slot

    # ------------------------------------------------------------------------------------ threads

    def threads(self) -> int:
        """Choose the threads of the next trial's processes: no more than have a core each."""
        plan = self._plan
        if plan.cores is None:
            return plan.threads
        left = (plan.cores.left() - self._held()) // plan.ranks
        threads = max(1, min(plan.threads, left))
        if threads != self._last_threads:
            self._progress.line(
                f"other programs keep {plan.cores.taken:.1f} cores busy: "
                f"{threads} thread(s) for each new trial"
            )
        self._last_threads = threads
        return threads

    def _held(self) -> int:
        """Count the cores that running trials use."""
        return sum(running.threads * running.job.ranks for running in self.running.values())

    def _give_threads_back(self) -> None:
        """Let trials with fewer threads have more of them where other programs are gone."""
        if self._plan.cores is None:
            return
        free = self._plan.cores.left_lately() - self._held()
        for running in self.running.values():
            more = min(self._plan.threads - running.threads, free)
            if more > 0 and running.job.gives_way and time.monotonic() >= running.may_rise:
                running.threads += more
                free -= more
                running.child.order(f"{THREADS}{running.threads}")
                self._progress.line(
                    f"trial {running.number:3d} | cores are free again: "
                    f"{running.threads} thread(s) from now on"
                )

    # --------------------------------------------------------------------------------------- news

    def receive(self, running: RunningTrial, pipe: Connection) -> News | None:
        """Hear one message of a trial; None where the runner has acted on it by itself.

        After an end the trial runs no more, and its slot is free.
        """
        if pipe not in running.child.connections:
            return None  # another rank has told the trial's end
        message = running.child.receive(pipe)
        if message is None:
            return None
        kind, content = message
        now = time.monotonic()
        running.slowest = max(running.slowest, now - running.heard)
        if kind == "started":
            self.devices.started(content["gpu"])
            running.opened.update({content["gpu"]} - {None})
        elif kind == "progress":
            running.heard = now
            running.progress = content["progress"]
            running.begun = min(running.begun, running.progress)
            self._progress.advance(running.number, running.progress)
        elif kind == "report":
            running.heard = now
            return Report(content["epoch"], content["metrics"], content["again"])
        elif kind == "threads":
            running.threads = content["threads"]
            running.may_rise = now + running.calm
            running.calm *= 2
            self._progress.line(
                f"trial {running.number:3d} | its threads wait for cores: "
                f"{running.threads} thread(s) from now on"
            )
        else:
            running.child.end()
            return self._end(running, kind, content)
        return None

    def _end(self, running: RunningTrial, kind: str, content: dict[str, Any]) -> News | None:
        """Act on a trial's last message, or on its death without one."""
        may_restart = running.stop_cause is None and not running.pruned
        if kind == "failed" and may_restart and content["cause"].kind is Kind.OUT_OF_MEMORY:
            smaller = smaller_batch(running.job, content.get("at_once"))
            if smaller is not None:
                try:
                    self._start_smaller(running, smaller)
                except OSError as error:
                    return Failed(of_error(error, one_line(error)))
                return None
        if kind == "device_failed" and may_restart:
            self._leave_device(running, content["gpu"], content["cause"])
            return None
        if kind == "device_fault" and may_restart and not self._is_own_fault(running, content):
            self._leave_sick_device(running, content["gpu"], content["cause"])
            return None
        self._remove(running)
        if kind in ("done", "pruned"):
            self.devices.worked(running.job.gpus)
        if running.pruned:
            return Pruned()
        if kind == "done":
            return Complete(content["metrics"])
        return Failed(self._cause(running, kind, content))

    def _cause(self, running: RunningTrial, kind: str, content: dict[str, Any]) -> Cause:
        epoch = int(running.progress) + 1  # the one under way
        if kind == "stopped":
            return replace(running.stop_cause or TERMINATED, epoch=epoch)
        if kind in ("device_failed", "device_fault"):
            cause = Cause(Kind.OTHER, content["cause"], traceback=content.get("traceback", ""))
        else:
            cause = content["cause"]
        if kind == "died":
            cause = replace(cause, traceback=_end_of(content["log"]))
        if running.stop_cause is None:
            return cause
        why = "killed when it did not stop in time" if running.killed else str(cause)
        return replace(running.stop_cause, epoch=epoch, unsaved=why, traceback=cause.traceback)

    def _start_smaller(self, running: RunningTrial, micro_batch: int) -> None:
        """Start a trial that ran out of memory again, in a fresh process, with half the batch.

        Gradients are accumulated to the same batch; the sampler never learns of it.
        """
        running.job = replace(_going_on(running.job), micro_batch=micro_batch)
        running.trial.set_user_attr("micro_batch", micro_batch)
        self._start_again(running)
        self._progress.line(
            f"trial {running.number:3d} | out of memory: started again with "
            f"{micro_batch} images at once"
        )

    def _leave_device(self, running: RunningTrial, gpu: str, cause: str) -> None:
        """Take a trial off a GPU that failed before the trial began: that is not its fault."""
        self._displace(running)
        if any(gpu in other.opened for other in self.running.values()):
            self.devices.full(gpu)
            self._progress.line(
                f"trial {running.number:3d} | GPU {gpu} has no room beside the trials there, one "
                f"of which has to end first: {one_line(cause)}"
            )
            return
        self._progress.line(
            f"trial {running.number:3d} | GPU {gpu} failed at the start: {one_line(cause)}"
        )
        if self.devices.failed(gpu, cause):
            _warn(f"GPU {gpu} failed {STARTS_IN_A_ROW} times in a row and is set aside: {cause}")

    def _displace(self, running: RunningTrial) -> None:
        self._remove(running)
        running.job = _going_on(running.job)
        self.displaced.append(running)

    def _is_own_fault(self, running: RunningTrial, fault: dict[str, Any]) -> bool:
        """Tell whether a trial under which a GPU failed has had that before.

        A kernel that reads beyond its data ends as a sick GPU does. On two GPUs it is the trial.
        """
        if running.faulted - {fault["gpu"]}:
            self.devices.forgive(running.number)
        return bool(running.faulted)

    def _leave_sick_device(self, running: RunningTrial, gpu: str, cause: str) -> None:
        """Let a trial under which a GPU failed go on from its checkpoint, on another one."""
        self._displace(running)
        running.faulted.add(gpu)
        self._progress.line(
            f"trial {running.number:3d} | GPU {gpu} failed, the trial starts again: "
            f"{one_line(cause)}"
        )
        if self.devices.faulted(gpu, running.number, cause):
            _warn(f"GPU {gpu} failed under {FAULTS} trials and is set aside: {cause}")

    def no_device(self) -> Cause | None:
        """Say why no device is left; None where one is."""
        if self.devices.usable:
            return None
        causes = [f"GPU {gpu}: {one_line(why)}" for gpu, why in self.devices.set_aside.items()]
        return Cause(Kind.NO_DEVICE, "no device is left: " + "; ".join(causes))

    # --------------------------------------------------------------------------------------- ends

    def stop_all(self, cause: Cause) -> None:
        for running in self.running.values():
            self.stop(running, cause)

    def stop(self, running: RunningTrial, cause: Cause) -> None:
        """Tell a trial to save and end; it is killed when it does not."""
        assert cause.kind in STOPS
        if running.stop_cause is None:
            now = time.monotonic()
            slowest = max(running.slowest, now - running.heard)
            running.stop_cause = cause
            batches = STOP_BATCHES + STEPS_BETWEEN_RANKS * (running.job.ranks > 1)
            running.kill_at = now + max(STOP_SECONDS, batches * slowest)
            running.child.order(STOP)

    def drop(self, running: RunningTrial) -> None:
        """End a trial's processes at once; it is somebody else's now."""
        if running in self.displaced:
            self.displaced.remove(running)
        elif self.running.pop(running.slot, None) is not None:
            running.child.kill()
            running.child.end()
            self.devices.ended(running.job.gpus)

    def kill_all(self) -> None:
        for running in self.running.values():
            running.child.kill()

    def next_deadline(self) -> float:
        """Give when `watch_the_clock` has something to do, by time.monotonic()."""
        limit = self._plan.trial_timeout
        soonest = math.inf
        for running in self.running.values():
            if running.stop_cause is not None:
                soonest = min(soonest, running.kill_at)
                continue
            ends = running.started + limit if limit is not None else math.inf
            soonest = min(soonest, self._plan.stop_at, ends)
        return soonest

    def watch_the_clock(self) -> None:
        """Stop what runs too long, kill what does not stop, give threads back."""
        self._give_threads_back()
        now, limit = time.monotonic(), self._plan.trial_timeout
        if now >= self._plan.stop_at:
            self.stop_all(JOB_ENDS)
        for running in self.running.values():
            if limit is not None and now >= running.started + limit:
                text = f"ran longer than --trial_timeout {limit:g} s"
                self.stop(running, Cause(Kind.TIMEOUT, text))
            if now >= running.kill_at and not running.killed:
                running.killed = True
                running.child.kill()


def smaller_batch(job: Job, at_once: int | None = None) -> int | None:
    """Give half of what a trial had on a device at once; None when that is too little.

    at_once: how much that was, where it was no batch of the training.
    """
    share = -(-job.config.batch_size // job.ranks)
    return half_batch(at_once or min(share, job.micro_batch or share))


def _going_on(job: Job) -> Job:
    """Let a trial that has saved a state go on from it."""
    return replace(job, continue_from=job.trial_dir) if has_saved(job.trial_dir) else job


def _warn(text: str) -> None:
    print(f"warning: {one_line(text)}", file=sys.stderr, flush=True)


def _end_of(log: Path, lines: int = 30) -> str:
    """Quote the end of the log of a trial's process."""
    try:
        text = log.read_text(errors="backslashreplace")
    except OSError:
        return ""
    return f"end of {log.name}:\n" + "\n".join(text.splitlines()[-lines:]) if text else ""
