"""The processor's cores: how many this process may use, how many other programs leave to it.

This file imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path

SHORTEST_LOOK = 1.0  # seconds: the kernel counts in hundredths
LOOK_SECONDS = 10.0
LATELY = 3  # looks
# What other programs may use before a thread is left out for them: cores, and a share of all, since
# a little runs on each of many. On 2 cores, 2 threads lose to 1 from about there.
TOLERATED, TOLERATED_SHARE = 0.15, 0.01
# Cores that a training's threads may be kept from. Alone 2 threads are from a hundredth, beside
# another busy program from one. To what takes less than half a core only the next trial gives way.
TOLERATED_WAITING, TOLERATED_WAITING_SHARE = 0.5, 0.02
WAITING_SECONDS = 2.0  # a look; two in a row have to agree


def usable_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process can keep busy: those it may run on, within its quota.

    A container's quota (docker's `--cpus`, a limit in Kubernetes) hides no core: more threads than
    it allows spend it on waiting for each other.
    """
    allowed = min([len(os.sched_getaffinity(0)), *map(_quota, _control_groups(root))])
    return max(1, int(allowed))


def _control_groups(root: Path) -> Iterator[Path]:
    """Give the directories of this process's control groups, of both versions, and above them."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux, or hidden
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mounted / controllers  # version 2 has no name there
        # A container may see its own group as the top, though its path says otherwise.
        group = top / path.lstrip("/")
        yield from (above for above in (group, *group.parents) if above.is_relative_to(top))


def _quota(group: Path) -> float:
    """Give the cores that a control group's quota amounts to; infinity where there is none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota.isdecimal() else math.inf  # max, or -1
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def asked_threads(environment: Mapping[str, str]) -> int | None:
    """Give the threads that the user asks for by OMP_NUM_THREADS, as for any program with torch."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


class SharedCores:
    """How many of the cores that this process may run on are busy with other programs.

    A training whose threads have no core each is many times as slow as one with fewer threads:
    they wait for one another some thousand times a second, and each time for the one that waits for
    its turn. What other programs use is what all cores were busy with since the look before, but
    for what this process and all that it started used.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._cores = os.sched_getaffinity(0)
        self._before = self._look()
        self._taken: deque[float] = deque([0.0], maxlen=LATELY)  # cores, look by look

    @property
    def taken(self) -> float:
        """The cores that other programs kept busy at the last look."""
        return self._taken[-1]

    def left(self) -> int:
        """Count the cores that other programs leave, now; at least one."""
        self._look_again(SHORTEST_LOOK)
        return self._left(self.taken)

    def left_lately(self) -> int:
        """Count those that they left in each of the last looks. To be called every few seconds."""
        self._look_again(LOOK_SECONDS)
        return self._left(max(self._taken))

    def _left(self, taken: float) -> int:
        tolerated = max(TOLERATED, TOLERATED_SHARE * len(self._cores))
        return max(1, len(self._cores) - max(0, math.ceil(taken - tolerated)))

    def _look_again(self, after: float) -> None:
        if time.monotonic() - self._before[0] < after:
            return
        now = self._look()
        seconds, busy, own = (new - old for new, old in zip(now, self._before, strict=True))
        # Less than none where a child took its count with it: nothing is known.
        if busy >= 0 and own >= 0:
            self._taken.append(max(0.0, busy - own) / seconds)
        self._before = now

    def _look(self) -> tuple[float, float, float]:
        """Give the time, and the seconds for which these cores and this process were busy so far.

        Not numbers where the system does not tell.
        """
        try:
            return time.monotonic(), self._busy_seconds(), self._own_seconds()
        except (OSError, LookupError, ValueError):
            return time.monotonic(), math.nan, math.nan

    def _busy_seconds(self) -> float:
        ticks = {}
        for line in (self._proc / "stat").read_text().splitlines():
            name, *fields = line.split()
            if name.removeprefix("cpu").isdecimal() and int(name[3:]) in self._cores:
                user, nice, system, _, _, irq, softirq = map(int, fields[:7])
                ticks[name] = user + nice + system + irq + softirq
        if len(ticks) < len(self._cores):  # a container's cores may have other numbers there
            raise ValueError("not all of this process's cores are listed")
        return sum(ticks.values()) / os.sysconf("SC_CLK_TCK")

    def _own_seconds(self) -> float:
        """Add up this process and all below it, those that have ended included."""
        children, ticks = defaultdict(list), {}
        for entry in self._proc.iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                # Bytes: a name is cut off anywhere, also within a letter.
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:  # it has just ended
                continue
            children[int(fields[1])].append(int(entry.name))
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))  # with its ended children's
        own, found = 0, [int(os.readlink(self._proc / "self"))]  # its number in that /proc
        while found:
            pid = found.pop()
            own += ticks[pid]
            found += children[pid]
        return own / os.sysconf("SC_CLK_TCK")


class WaitingThreads:
    """Notices that other programs keep the threads of this process from running.

    Two threads on one core, whose waiting keeps it busy, are twenty times as slow as one.
    """

    def __init__(self, threads: int, tasks: Path = Path("/proc/self/task")) -> None:
        self.threads = threads
        self._tasks = tasks
        self._have_waited = False
        self._before = self._look()

    def fewer(self) -> int | None:
        """Give the number of threads to go on with from now on; None where it stays as it is.

        To be called often: it looks every few seconds.
        """
        if self.threads == 1 or time.monotonic() - self._before[0] < WAITING_SECONDS:
            return None
        before, self._before = self._before, self._look()
        seconds, waited = (new - old for new, old in zip(self._before, before, strict=True))
        kept_from = waited / seconds  # cores
        tolerated = max(TOLERATED_WAITING, TOLERATED_WAITING_SHARE * self.threads)
        had_waited, self._have_waited = self._have_waited, kept_from > tolerated
        if not (had_waited and self._have_waited):
            return None
        self._have_waited = False
        self.threads = max(1, self.threads - max(1, round(kept_from)))
        return self.threads

    def _look(self) -> tuple[float, float]:
        """Give the time, and the seconds for which threads could have run and had no core."""
        waited = 0
        with contextlib.suppress(OSError):  # a system without /proc
            for task in self._tasks.iterdir():
                # It may have just ended, and the kernel may keep no count.
                with contextlib.suppress(OSError, ValueError, IndexError):
                    waited += int((task / "schedstat").read_text().split()[1])
        return time.monotonic(), waited / 1e9
