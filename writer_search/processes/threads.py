"""The threads of the trials that run at once, on cores that other programs use as well."""

from __future__ import annotations

import time
from collections.abc import Collection

from writer_search.common.text import counted
from writer_search.processes.messages import THREADS
from writer_search.processes.plan import Plan
from writer_search.processes.running import RunningTrial
from writer_search.results.progress import Progress


class ThreadDivision:
    """Gives trials no more threads than have a core each, and gives them back later."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        self._last = plan.threads

    def of_next(self, running: Collection[RunningTrial]) -> int:
        """Choose the threads of each process of the next trial."""
        plan = self._plan
        if plan.cores is None:
            return plan.threads
        left = (plan.cores.left() - _held(running)) // plan.ranks
        threads = max(1, min(plan.threads, left))
        if threads != self._last:
            self._progress.line(
                f"other programs keep {plan.cores.taken:.1f} cores busy: "
                f"{counted(threads, 'thread')} for each new trial"
            )
        self._last = threads
        return threads

    def give_back(self, running: Collection[RunningTrial]) -> None:
        """Let trials with fewer threads have more of them where other programs are gone."""
        if self._plan.cores is None:
            return
        free = self._plan.cores.left_lately() - _held(running)
        for one in running:
            more = min(self._plan.threads - one.threads, free)
            if more > 0 and one.job.gives_way and time.monotonic() >= one.may_rise:
                one.threads += more
                free -= more
                one.child.order(f"{THREADS}{one.threads}")
                self._progress.line(
                    f"trial {one.number:3d} | cores are free again: "
                    f"{counted(one.threads, 'thread')} from now on"
                )


def _held(running: Collection[RunningTrial]) -> int:
    """Count the cores that running trials use."""
    return sum(one.threads * one.job.ranks for one in running)
