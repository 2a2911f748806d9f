"""Computes a run's figures from its journal. Pure: no process, no clock.

The journal has a line for each step and each validation that any process has done (see
`journal/sitecustomize.py`). A step counts once: its last execution, if its configuration has a
result in the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Mark:
    """A line of the journal.   time: seconds of the machine's monotonic clock

    kind: "begin" (of an epoch, or of the rest of one), "step", "validation" or "saved" (done).
    number: of the step over all epochs, or of the epoch, both from 0.   loss: of a validation; of
    what was saved within training or a validation, the seconds that these waited for it.
    """

    time: float
    launch: str
    pid: int
    configuration: float
    kind: str
    number: int
    loss: float


@dataclass(frozen=True)
class Work:
    """A step or a validation that was done, and the seconds that it took with all around it."""

    mark: Mark
    seconds: float

    @property
    def unit(self) -> tuple[float, str, int]:
        return self.mark.configuration, self.mark.kind, self.mark.number


@dataclass(frozen=True)
class Launch:
    """One start of the command.   begin, end: by the monotonic clock"""

    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Figures:
    """What a run came to. `changed` and `slowdown` compare with the undisturbed run.

    goodput: the share of the wall time that went into training that counts.
    epochs_again: steps done more often than once, in epochs.   lost: configurations that were
    trained to their end and have no result.   never: others without one.   twice: those with two
    results, or that were trained on after their end.   first_batch: seconds from the command to it,
    the median of all starts.   ending: seconds from the last validation, or from the start where
    nothing was left to train, to the end of a command that has all results.
    """

    wall: float
    counted: float
    goodput: float
    slowdown: float | None
    epochs_again: float
    lost: int
    twice: int
    never: int
    changed: int | None
    launches: int
    first_batch: float | None
    ending: float | None


def read_marks(text: str) -> list[Mark]:
    """Read a journal; a last line that a kill cut off is left out."""
    marks = []
    for line in text.splitlines(keepends=True):
        words = line.split()
        if line.endswith("\n") and len(words) == 7:
            time, launch, pid, configuration, kind, number, loss = words
            marks.append(
                Mark(
                    *(float(time), launch, int(pid), float(configuration), kind),
                    *(int(number), float(loss)),
                )
            )
    return sorted(marks, key=lambda mark: mark.time)


def work_done(marks: Iterable[Mark]) -> list[Work]:
    """Give what was done, each with the time since its process's mark before, savings left out."""
    before: dict[tuple[str, int], float] = {}
    done = []
    for mark in marks:
        process = (mark.launch, mark.pid)
        if mark.kind == "saved":
            if process in before:
                before[process] += mark.loss
            continue
        if mark.kind != "begin" and process in before:
            done.append(Work(mark, mark.time - before[process]))
        before[process] = mark.time
    return done


def outcome(
    work: Iterable[Work], recorded: Iterable[tuple[float, float]], epochs: int
) -> dict[float, tuple[float, float | None]]:
    """Give each configuration's recorded value and the last loss of its last validation."""
    losses = {
        done.mark.configuration: done.mark.loss
        for done in work
        if done.mark.kind == "validation" and done.mark.number == epochs - 1
    }
    return {configuration: (value, losses.get(configuration)) for configuration, value in recorded}


def account(
    marks: Sequence[Mark],
    launches: Sequence[Launch],
    recorded: Sequence[tuple[float, float]],
    configurations: Sequence[float],
    epochs: int,
    steps: int,
    undisturbed: tuple[float, Mapping[float, tuple[float, float | None]]] | None = None,
) -> Figures:
    """Compute a run's figures.

    recorded: the results at the end, (configuration, value).   steps: of an epoch.
    undisturbed: the wall time and the `outcome` of the run without a fault.
    """
    work = work_done(marks)
    with_result = {configuration for configuration, _ in recorded}
    last = {done.unit: done.seconds for done in work}
    counted = sum(seconds for unit, seconds in last.items() if unit[0] in with_result)
    wall = sum(launch.seconds for launch in launches)
    step_counts = Counter(done.unit for done in work if done.mark.kind == "step")
    ends = _ends(work, epochs)
    missing = set(configurations) - with_result
    firsts = _first_batches(marks, launches)
    final = outcome(work, recorded, epochs)
    return Figures(
        wall=wall,
        counted=counted,
        goodput=counted / wall,
        slowdown=wall / undisturbed[0] if undisturbed else None,
        epochs_again=(step_counts.total() - len(step_counts)) / steps,
        lost=len(missing & ends.keys()),
        twice=len(_run_twice(work, recorded, ends)),
        never=len(missing - ends.keys()),
        changed=_changed(final, undisturbed[1]) if undisturbed else None,
        launches=len(launches),
        first_batch=median(firsts) if firsts else None,
        ending=_ending(work, launches[-1]) if not missing else None,
    )


def _ending(work: Sequence[Work], launch: Launch) -> float:
    return launch.end - max([launch.begin, *(done.mark.time for done in work[-1:])])


def _ends(work: Iterable[Work], epochs: int) -> dict[float, float]:
    """Give when each configuration was first trained to its end."""
    ends: dict[float, float] = {}
    for done in work:
        if done.mark.kind == "validation" and done.mark.number == epochs - 1:
            ends.setdefault(done.mark.configuration, done.mark.time)
    return ends


def _run_twice(
    work: Iterable[Work], recorded: Iterable[tuple[float, float]], ends: Mapping[float, float]
) -> set[float]:
    counts = Counter(configuration for configuration, _ in recorded)
    twice = {configuration for configuration, count in counts.items() if count > 1}
    for done in work:
        end = ends.get(done.mark.configuration)
        if done.mark.kind == "step" and end is not None and done.mark.time > end:
            twice.add(done.mark.configuration)
    return twice


def _first_batches(marks: Iterable[Mark], launches: Iterable[Launch]) -> list[float]:
    """Give the seconds from each start of the command, if it came so far, to its first batch."""
    begins = {launch.name: launch.begin for launch in launches}
    firsts: dict[str, float] = {}
    for mark in marks:
        if mark.kind == "begin" and mark.launch in begins:
            firsts.setdefault(mark.launch, mark.time - begins[mark.launch])
    return list(firsts.values())


def _changed(
    final: Mapping[float, tuple[float, float | None]],
    undisturbed: Mapping[float, tuple[float, float | None]],
) -> int:
    """Count the results that are others than without a fault, of those that are there."""
    both = final.keys() & undisturbed.keys()
    return sum(final[configuration] != undisturbed[configuration] for configuration in both)
