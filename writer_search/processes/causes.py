"""Why a trial ended before it was complete: values that code compares, and texts for people."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum

from writer_search.processes.deadlines import END_TIME

DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT}


class Kind(Enum):
    """The kinds of causes. Their advice stands in error.log."""

    # Interruptions: no fault of the trial, which may be continued.
    SIGNAL = "the search got a signal"
    TERMINATED = "the trial's own process got SIGTERM"
    JOB_ENDS = "the batch system is about to end the job"
    SEARCH_FAILED = "the search itself failed"
    NO_DEVICE = "no device is left"
    # Failures: they count towards giving up.
    TIMEOUT = "longer than --trial_timeout"
    OUT_OF_MEMORY = "out of memory"
    KILLED = "killed by SIGKILL"
    NOT_FINITE = "the loss or the output is not finite"
    DISK_FULL = "no space left"
    OTHER = "raised, died or did not start"


INTERRUPTIONS = {
    *(Kind.SIGNAL, Kind.TERMINATED, Kind.JOB_ENDS, Kind.SEARCH_FAILED, Kind.NO_DEVICE),
}
# Asked for by the search: whatever then ends the trial is part of the stop.
STOPS = INTERRUPTIONS | {Kind.TIMEOUT}
THE_SAME_COMMAND = (
    "the same command; with --continue_interrupted it continues this trial from its last state"
)
LESS_MEMORY = (
    "fewer trials at once (--n_jobs); in a fresh --checkpoint_dir: a smaller batch "
    "(--fix batch_size=16) or a smaller backbone"
)
ADVICE = {
    Kind.SEARCH_FAILED: "fix what the search has reported, then run the same command",
    Kind.NO_DEVICE: "look at the GPUs (nvidia-smi), then run the same command",
    Kind.TIMEOUT: "a longer --trial_timeout; or fewer --epochs, in a fresh --checkpoint_dir",
    Kind.OUT_OF_MEMORY: LESS_MEMORY,
    Kind.KILLED: f"{LESS_MEMORY}; --continue_interrupted continues this trial",
    Kind.NOT_FINITE: "lower learning rates, in a fresh --checkpoint_dir: --space with a lower end, "
    "or --fix learning_rate=0.001",
    Kind.DISK_FULL: "make room on the disk; the same command goes on, with --continue_interrupted "
    "from this trial's last saved state",
    Kind.OTHER: "see the traceback or the log below, and train.log; the search goes on with other "
    "trials",
}


@dataclass(frozen=True)
class Cause:
    """Why a trial ended. Two causes are the same to a search that counts them if `same` is equal.

    text: one line, without the epoch.   epoch: the one under way, where it is part of the cause.
    unsaved: why the trial could not save its state before it ended, where it should have.
    """

    kind: Kind
    text: str
    epoch: int | None = None
    unsaved: str = ""
    traceback: str = ""

    @property
    def same(self) -> tuple[Kind, str]:
        return self.kind, self.text

    @property
    def is_interruption(self) -> bool:
        return self.kind in INTERRUPTIONS

    @property
    def is_resumable(self) -> bool:
        """Tell whether its last saved state is worth going on from: the trial may well be sound."""
        return self.is_interruption or self.kind in (Kind.DISK_FULL, Kind.KILLED)

    @property
    def advice(self) -> str:
        return ADVICE.get(self.kind, THE_SAME_COMMAND)

    def __str__(self) -> str:
        where = "in" if self.kind is Kind.NOT_FINITE else "at"
        epoch = "" if self.epoch is None else f" {where} epoch {self.epoch}"
        unsaved = f" (it did not save: {self.unsaved})" if self.unsaved else ""
        return f"{self.text}{epoch}{unsaved}"


def by_signal(name: str) -> Cause:
    """A signal to the search, by its name."""
    return Cause(Kind.SIGNAL, f"interrupted by {name}")


JOB_ENDS = Cause(
    Kind.JOB_ENDS, f"interrupted before the end of the batch system's job ({END_TIME})"
)
TERMINATED = Cause(Kind.TERMINATED, "interrupted by SIGTERM to the trial's own process")


def of_error(error: BaseException, text: str, traceback: str = "") -> Cause:
    """Turn what was raised around a trial, other than by its training, into a cause."""
    is_full = isinstance(error, OSError) and error.errno in DISK_IS_FULL
    return Cause(Kind.DISK_FULL if is_full else Kind.OTHER, text, traceback=traceback)
