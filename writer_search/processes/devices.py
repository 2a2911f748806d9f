"""Where trials run: which devices there are, divided between the trials that run at once.

A device is an entry of CUDA_VISIBLE_DEVICES: an index, a GPU's UUID or a MIG instance's name. This
file imports no torch.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from writer_search.common.errors import UserError
from writer_search.common.text import counted, one_line
from writer_search.processes.causes import Cause, Kind

STARTS_IN_A_ROW = 2  # that fail on a device before it is set aside
FAULTS = 2  # trials that a device fails under before it is set aside

Slot = tuple[str, ...]  # the GPUs of one trial, one per rank; none: the CPU


def visible_entries(visible: str | None, count: int) -> list[str]:
    """Name the devices that processes of their own can use, by their own entry.

    visible: CUDA_VISIBLE_DEVICES, or None;  count: the devices that CUDA finds with it. CUDA shows
    one MIG instance to a process, however many are listed: each listed one can have its own.
    """
    if count == 0:
        return []
    given = [entry.strip() for entry in (visible or "").split(",")]
    given = list(dict.fromkeys(entry for entry in given if entry))
    if not given:
        return [str(number) for number in range(count)]
    if all(entry.startswith("MIG-") for entry in given):
        return given
    return given[:count]  # CUDA stops at the first entry that names no device


def divide(
    gpus: Sequence[str], n_jobs: int | None, gpus_per_trial: int, names: Sequence[str] = ()
) -> tuple[Slot, ...]:
    """Give the devices of each trial that runs at once; several may share them.

    n_jobs: trials at once, or None for one on each `gpus_per_trial` GPUs, one on the CPU.
    names: what the GPUs are called. Raises UserError when there are too few GPUs.
    """
    if gpus_per_trial > 1 and any("MIG" in name for name in (*gpus, *names)):
        raise UserError(
            f"--gpus_per_trial {gpus_per_trial}: instances of a GPU that is divided (MIG) cannot "
            "train one trial together; leave it out, or give --n_jobs"
        )
    if not gpus:
        return ((),) * (n_jobs or 1)
    groups = [
        tuple(gpus[first : first + gpus_per_trial])
        for first in range(0, len(gpus) - gpus_per_trial + 1, gpus_per_trial)
    ]
    if not groups:
        raise UserError(
            f"--gpus_per_trial {gpus_per_trial}: only {counted(len(gpus), 'GPU')} here: "
            f"{', '.join(gpus)}"
        )
    return tuple(groups[job % len(groups)] for job in range(n_jobs or len(groups)))


class Devices:
    """The slots of a search, and what is known against their GPUs.

    A GPU is set aside when trials fail to start on it twice in a row while none runs there, and
    when it fails under two trials and none has come to its end there in between.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._failed_starts: Counter[str] = Counter()
        self._faults: defaultdict[str, set[int]] = defaultdict(set)  # GPU → trials it failed under
        self._full: set[str] = set()  # no other trial can start until one there has ended
        self.set_aside: dict[str, str] = {}  # GPU → cause

    @property
    def usable(self) -> list[int]:
        """The numbers of the slots whose GPUs all work."""
        return [n for n, slot in enumerate(self._slots) if not self.set_aside.keys() & set(slot)]

    def single(self) -> Slot:
        """Give the device for one process after the trials: a GPU that works, or none: the CPU."""
        usable = self.usable
        return self._slots[usable[0]][:1] if usable else ()

    def sharing(self, number: int) -> int:
        """Count the slots that have a GPU of this one, itself included."""
        gpus = set(self._slots[number])
        return max(1, sum(bool(gpus & set(slot)) for slot in self._slots))

    def free(self, taken: Collection[int], avoided: Collection[str] = ()) -> int | None:
        """Choose a usable slot that is not taken, one without failures first.

        avoided: GPUs to be left to others, unless there are no others.
        """
        usable = self.usable
        elsewhere = [n for n in usable if not set(avoided) & set(self._slots[n])]
        free = [
            number
            for number in elsewhere or usable
            if number not in taken and not self._full & set(self._slots[number])
        ]
        return min(free, key=self._failures, default=None)

    def _failures(self, number: int) -> int:
        gpus = self._slots[number]
        return max((self._failed_starts[g] + len(self._faults[g]) for g in gpus), default=0)

    def started(self, gpu: str | None) -> None:
        """Note that a trial's process has started on a GPU."""
        if gpu is not None:
            del self._failed_starts[gpu]

    def worked(self, gpus: Collection[str]) -> None:
        """Note that a trial has come to its end on these."""
        for gpu in gpus:
            self._faults.pop(gpu, None)

    def ended(self, gpus: Collection[str]) -> None:
        """Note that a trial is gone from these."""
        self._full.difference_update(gpus)

    def full(self, gpu: str) -> None:
        """Note that a GPU has no room for another trial beside those that run there."""
        self._full.add(gpu)

    def failed(self, gpu: str, cause: str) -> bool:
        """Note that a trial could not start on a GPU; tell whether it is set aside for that."""
        self._failed_starts[gpu] += 1
        return self._failed_starts[gpu] >= STARTS_IN_A_ROW and self._set_aside(gpu, cause)

    def faulted(self, gpu: str, trial: int, cause: str) -> bool:
        """Note that a GPU failed under a trial; tell whether it is set aside for that."""
        self._faults[gpu].add(trial)
        return len(self._faults[gpu]) >= FAULTS and self._set_aside(gpu, cause)

    def forgive(self, trial: int) -> None:
        """Take back what was noted for a trial whose own fault it was."""
        for trials in self._faults.values():
            trials.discard(trial)

    def why_none(self) -> Cause | None:
        """Say why no device is left; None where one is."""
        if self.usable:
            return None
        causes = [f"GPU {gpu}: {one_line(why)}" for gpu, why in self.set_aside.items()]
        return Cause(Kind.NO_DEVICE, "no device is left: " + "; ".join(causes))

    def _set_aside(self, gpu: str, cause: str) -> bool:
        is_new = gpu not in self.set_aside
        self.set_aside.setdefault(gpu, cause)
        return is_new


def refuse_other_kind(
    recorded: Mapping[str, Any] | None, machine: Mapping[str, Any], device: str
) -> None:
    """Raise UserError where a GPU's search would silently go on without one; warn of the reverse.

    recorded: the study's settings.   device: what --device asks for.
    """
    is_of_gpu = recorded is not None and recorded["tier"] == "gpu"
    if is_of_gpu and device == "auto" and machine["tier"] != "gpu":
        raise UserError(
            "this search was started on a GPU, and none is visible here: look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES; or give --device cpu to go on without one, many times slower"
        )
    if recorded is not None and recorded["tier"] != "gpu" and machine["tier"] == "gpu":
        print(
            "warning: this search was started without a GPU, and keeps its lines' height and its "
            "networks; a fresh --checkpoint_dir takes those for a GPU",
            file=sys.stderr,
        )
