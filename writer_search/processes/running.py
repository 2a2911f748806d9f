"""A trial under way, as the search process sees it, and what it can say."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from writer_search.config import STEPS_BETWEEN_RANKS, Improvement
from writer_search.processes.causes import STOPS, TERMINATED, Cause, Kind
from writer_search.processes.messages import STOP, Job
from writer_search.processes.parent import UNKILLABLE_SECONDS, TrialProcesses, exit_text

if TYPE_CHECKING:
    from optuna.trial import Trial

CALM_SECONDS = 30.0  # after threads had to wait; twice as long each time
# A trial that was told to stop and has not ended by then is killed; longer where its batches are.
STOP_SECONDS = 20.0
STOP_BATCHES = 3  # a batch, a checkpoint, and one more for a machine that is busy


@dataclass(frozen=True)
class Report:
    """An epoch has ended. again: it was trained before a break."""

    epoch: int
    metrics: dict[str, Any]
    again: bool

    @property
    def value(self) -> float:
        return float(self.metrics["macro_top1"])


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


@dataclass
class RunningTrial:
    """A trial under way. Times are by time.monotonic()."""

    trial: Trial
    job: Job
    child: TrialProcesses
    slot: int
    started: float
    epoch: int = 0  # epochs done
    progress: float = 0.0  # epochs done, with a fraction
    begun: float = math.inf  # the progress that it began with; infinite until it trains
    improvement: Improvement = field(default_factory=Improvement)
    pruned: bool = False
    threads: int = 1  # of each of its processes, now
    calm: float = CALM_SECONDS  # before it has more of them again
    may_rise: float = -math.inf
    stop_cause: Cause | None = None
    kill_at: float = math.inf  # where it has not ended by then; or is given up, once it is killed
    killed: bool = False
    made: float = field(default_factory=time.monotonic)  # its first start, on whatever GPU
    heard: float = math.inf  # when it last said anything, since it has trained
    slowest: float = 0.0  # the longest time between two messages: a batch, or a validation

    opened: set[str] = field(default_factory=set)  # GPUs that its processes have opened
    faulted: set[str] = field(default_factory=set)  # GPUs that failed under it

    @property
    def number(self) -> int:
        return int(self.trial.number)

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.made

    @property
    def best(self) -> float | None:
        """The best value so far."""
        return self.improvement.best.get("macro_top1")

    @property
    def has_advanced(self) -> bool:
        return self.progress > self.begun

    @property
    def epochs_here(self) -> float:
        """Epochs trained since it was started, not before a break."""
        return self.progress - min(self.begun, self.progress)

    @property
    def may_restart(self) -> bool:
        """Tell whether it is to go on, whatever ends its process."""
        return self.stop_cause is None and not self.pruned

    @property
    def is_last_epoch(self) -> bool:
        """Tell whether it ends by itself after the epochs that it has done."""
        config = self.job.config
        unimproved = self.epoch - self.improvement.epoch
        return self.epoch >= config.most_epochs or unimproved >= config.patience

    def note_progress(self, progress: float) -> None:
        self.heard = time.monotonic()
        self.progress = progress
        self.begun = min(self.begun, progress)

    def note_epoch(self, report: Report) -> None:
        self.epoch = max(report.epoch, self.epoch)
        self.progress = float(report.epoch)
        self.improvement.note(report.epoch, report.metrics)

    def note_fewer_threads(self, threads: int) -> None:
        """Note that its threads had to wait for cores."""
        self.threads = threads
        self.may_rise = time.monotonic() + self.calm
        self.calm *= 2

    def stop(self, cause: Cause) -> None:
        """Tell it to save and end; see `kill_if_overdue`."""
        assert cause.kind in STOPS
        if self.stop_cause is None:
            now = time.monotonic()
            slowest = max(self.slowest, now - self.heard)
            self.stop_cause = cause
            batches = STOP_BATCHES + STEPS_BETWEEN_RANKS * (self.job.ranks > 1)
            self.kill_at = now + max(STOP_SECONDS, batches * slowest)
            self.child.order(STOP)

    def kill_if_overdue(self) -> bool:
        """Kill it where it has not stopped in time; tell whether even that has not ended it."""
        now = time.monotonic()
        if now < self.kill_at:
            return False
        if self.killed:
            return True
        self.killed, self.kill_at = True, now + UNKILLABLE_SECONDS
        self.child.kill()
        return False

    def abandon(self) -> Pruned | Failed:
        """Leave processes that SIGKILL does not end to the kernel."""
        self.child.end()
        if self.pruned:
            return Pruned()
        cause = Cause(Kind.OTHER, exit_text(None))
        return Failed(self.cause_of_end("died", {"cause": cause, "log": self.job.log}))

    def cause_of_end(self, kind: str, content: dict[str, Any]) -> Cause:
        """Say why it ended, from its last message or its death without one."""
        # The one under way, of which a validation is the end.
        epoch = min(int(self.progress), self.epoch) + 1
        if kind == "stopped":
            return replace(self.stop_cause or TERMINATED, epoch=epoch)
        if kind in ("device_failed", "device_fault"):
            cause = Cause(Kind.OTHER, content["cause"], traceback=content.get("traceback", ""))
        else:
            cause = content["cause"]
        if kind == "died":
            cause = replace(cause, traceback=_end_of(content["log"]))
        if self.stop_cause is None:
            return cause
        was_killed = self.killed and cause.kind is Kind.KILLED
        why = "killed when it did not stop in time" if was_killed else str(cause)
        return replace(self.stop_cause, epoch=epoch, unsaved=why, traceback=cause.traceback)


def _end_of(log: Path, lines: int = 30) -> str:
    """Quote the end of the log of a trial's process."""
    try:
        text = log.read_text(errors="backslashreplace")
    except OSError:
        return ""
    return f"end of {log.name}:\n" + "\n".join(text.splitlines()[-lines:]) if text else ""
