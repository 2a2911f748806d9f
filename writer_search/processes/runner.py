"""Starts, restarts, stops and kills the processes of trials, and hears what they say."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError

from writer_search.common.text import counted, one_line
from writer_search.config import TrialConfig, half_batch
from writer_search.processes.causes import JOB_ENDS, Cause, Kind, of_error
from writer_search.processes.devices import FAULTS, STARTS_IN_A_ROW, Devices
from writer_search.processes.messages import Job
from writer_search.processes.parent import ChildProcess, TrialProcesses
from writer_search.processes.plan import Plan
from writer_search.processes.running import Complete, Failed, News, Pruned, Report, RunningTrial
from writer_search.processes.threads import ThreadDivision
from writer_search.results.progress import Progress
from writer_search.results.rows import has_saved

if TYPE_CHECKING:
    from optuna.trial import Trial


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
        self.threads = ThreadDivision(plan, progress)

    @property
    def has_room(self) -> bool:
        return self.devices.free(self.running) is not None

    def next_displaced(self) -> RunningTrial | None:
        """Give the first trial off its GPU for which there is room on another one."""
        rooms = (
            r for r in self.displaced if self.devices.free(self.running, r.faulted) is not None
        )
        return next(rooms, None)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the trials that run."""
        return [running.number for running in self.running.values()]

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
            self.threads.of_next(self.running.values()),
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
        running.slowest = max(running.slowest, time.monotonic() - running.heard)
        if kind == "started":
            self.devices.started(content["gpu"])
            running.opened.update({content["gpu"]} - {None})
        elif kind == "progress":
            running.note_progress(content["progress"])
            self._progress.advance(running.number, running.progress)
        elif kind == "report":
            running.heard = time.monotonic()
            return None if running.pruned else Report(**content)  # it has trained on since
        elif kind == "threads":
            running.note_fewer_threads(content["threads"])
            threads = counted(running.threads, "thread")
            self._say(running, f"its threads wait for cores: {threads} from now on")
        else:
            running.child.end()
            return self._end(running, kind, content)
        return None

    def _end(self, running: RunningTrial, kind: str, content: dict[str, Any]) -> News | None:
        """Act on a trial's last message, or on its death without one."""
        if running.may_restart:
            try:
                if self._goes_on(running, kind, content):
                    return None
            except OSError as error:
                return Failed(of_error(error, one_line(error)))
        self._remove(running)
        if kind in ("done", "pruned"):
            self.devices.worked(running.job.gpus)
        if running.pruned:
            return Pruned()
        if kind == "done":
            return Complete(content["metrics"])
        return Failed(running.cause_of_end(kind, content))

    def _goes_on(self, running: RunningTrial, kind: str, content: dict[str, Any]) -> bool:
        """Start a trial again, or put it by for another GPU; False: this was its end.

        Raises OSError.
        """
        if kind == "failed" and content["cause"].kind is Kind.OUT_OF_MEMORY:
            smaller = smaller_batch(running.job)
            if smaller is not None:
                self._start_smaller(running, smaller)
            return smaller is not None
        if kind == "device_failed":
            self._leave_device(running, content["gpu"], content["cause"])
            return True
        if kind == "device_fault" and not running.faulted:
            self._leave_sick_device(running, content["gpu"], content["cause"])
            return True
        if kind == "device_fault" and running.faulted != {content["gpu"]}:
            # A kernel that reads beyond its data ends as a sick GPU does: on two, it is the trial.
            self.devices.forgive(running.number)
        return False

    def _start_smaller(self, running: RunningTrial, micro_batch: int) -> None:
        """Start a trial that ran out of memory again, in a fresh process, with half the batch.

        Gradients are accumulated to the same batch; the sampler never learns of it.
        """
        running.job = replace(_going_on(running.job), micro_batch=micro_batch)
        with suppress(UpdateFinishedTrialError):  # the loop finds out
            running.trial.set_user_attr("micro_batch", micro_batch)
        self._start_again(running)
        self._say(running, f"out of memory: started again with {micro_batch} images at once")

    def _leave_device(self, running: RunningTrial, gpu: str, cause: str) -> None:
        """Take a trial off a GPU that failed before the trial began: that is not its fault."""
        self._displace(running)
        if any(gpu in other.opened for other in self.running.values()):
            self.devices.full(gpu)
            how = "has no room for another trial until one of those there has ended"
            self._say(running, f"GPU {gpu} {how}: {one_line(cause)}")
            return
        self._say(running, f"GPU {gpu} failed at the start: {one_line(cause)}")
        if self.devices.failed(gpu, cause):
            _warn(f"GPU {gpu} failed {STARTS_IN_A_ROW} times in a row and is set aside: {cause}")

    def _displace(self, running: RunningTrial) -> None:
        self._remove(running)
        running.job = _going_on(running.job)
        self.displaced.append(running)

    def _leave_sick_device(self, running: RunningTrial, gpu: str, cause: str) -> None:
        """Let a trial under which a GPU failed go on from its checkpoint, on another one."""
        self._displace(running)
        running.faulted.add(gpu)
        self._say(running, f"GPU {gpu} failed, the trial starts again: {one_line(cause)}")
        if self.devices.faulted(gpu, running.number, cause):
            _warn(f"GPU {gpu} failed under {FAULTS} trials and is set aside: {cause}")

    def _say(self, running: RunningTrial, text: str) -> None:
        self._progress.line(f"trial {running.number:3d} | {text}")

    # --------------------------------------------------------------------------------------- ends

    def stop_all(self, cause: Cause) -> None:
        for running in self.running.values():
            running.stop(cause)

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
        limit, soonest = self._plan.trial_timeout or math.inf, math.inf
        for running in self.running.values():
            if running.stop_cause is not None:
                soonest = min(soonest, running.kill_at)
            else:
                soonest = min(soonest, self._plan.stop_at, running.started + limit)
        return soonest

    def watch_the_clock(self) -> list[tuple[RunningTrial, News]]:
        """Stop what runs too long, kill what does not stop, give threads back.

        Returns the ends of those that even SIGKILL has not ended.
        """
        self.threads.give_back(self.running.values())
        now, limit = time.monotonic(), self._plan.trial_timeout
        if now >= self._plan.stop_at:
            self.stop_all(JOB_ENDS)
        undying: list[tuple[RunningTrial, News]] = []
        for running in list(self.running.values()):
            if limit is not None and now >= running.started + limit:
                text = f"ran longer than --trial_timeout {limit:g} s"
                running.stop(Cause(Kind.TIMEOUT, text))
            if running.kill_if_overdue():
                self._remove(running)
                undying.append((running, running.abandon()))
        return undying


def smaller_batch(job: Job) -> int | None:
    """Give half of what a trial had on a device at once; None where that would not help."""
    share = -(-job.config.batch_size // job.ranks)
    return half_batch(job.config, min(share, job.micro_batch or share))


def _going_on(job: Job) -> Job:
    """Let a trial that has saved a state go on from it."""
    return replace(job, continue_from=job.trial_dir) if has_saved(job.trial_dir) else job


def _warn(text: str) -> None:
    print(f"warning: {one_line(text)}", file=sys.stderr, flush=True)
