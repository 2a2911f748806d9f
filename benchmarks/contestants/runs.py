"""Runs a contestant's command under a fault, again and again, until its job is done."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.contestants import ROOT, Contestant
from benchmarks.contestants.accounting import Launch, Mark, read_marks, work_done
from benchmarks.contestants.faults import (
    FULL_SECONDS,
    Fault,
    Target,
    make_room,
    mount_disk,
    unmount_disk,
)
from benchmarks.contestants.job import Job
from writer_search.common.cores import usable_cores
from writer_search.common.environment import training_environment

HOOK = Path(__file__).parent / "journal"
LEFT_SECONDS = 5.0  # after a kill, that processes may take to end
POLL_SECONDS = 0.05
STUCK_KILLS = 6  # in a row without a step that had not been done before
TRIES = 3  # of the same command, before a person looks
_numbers = itertools.count()


class Run:
    """One contestant, one fault, one job.

    `launches`, `person` (what one had to do besides giving the same command), `left` (processes
    alive `LEFT_SECONDS` after a kill, over all kills), `kills` and `gave_up` (why, if it did) tell
    how it went.   place: an empty directory for all of it.   limit: seconds that it may take
    """

    def __init__(
        self, contestant: Contestant, fault: Fault | None, job_file: Path, place: Path, limit: float
    ) -> None:
        self.contestant, self.fault = contestant, fault
        self.job = Job.read(job_file)
        self._job_file, self._limit = job_file, limit
        self._name = f"{os.getpid()}.{next(_numbers)}"
        self._directory, self._place = place / "search", place
        self.launches: list[Launch] = []
        self.person: list[str] = []
        self.left = self.kills = 0
        self.gave_up: str | None = None
        self.results: list[tuple[int, float]] = []
        self._scratch = ""  # for temporary files
        self._clock = 0.0  # seconds of all launches that have ended
        self._due = fault.seconds if fault else float("inf")
        self._full_until: float | None = None
        self._checks: list[tuple[float, str]] = []  # when to look for what a launch has left
        self._damaged: list[Path] = []
        self._stuck = self._failures = self._most = 0

    # ------------------------------------------------------------------------------ as a whole

    def go(self) -> None:
        """Run until all configurations have a result, or it is given up. Raises OSError."""
        self._directory.mkdir(parents=True)
        # Short: Ray has its sockets there, whose paths may have 107 bytes.
        self._scratch = tempfile.mkdtemp(prefix="run")
        is_disk = self.fault is not None and self.fault.needs_disk
        if is_disk:
            mount_disk(self._directory)
        try:
            while self.gave_up is None and not self._has_all():
                was_hit = self._launch()
                self._judge(was_hit)
            if self.gave_up is not None:
                self._read_results()
        finally:
            self._end_everything()
            shutil.rmtree(self._scratch, ignore_errors=True)
            if is_disk:
                unmount_disk(self._directory)

    def marks(self) -> list[Mark]:
        journal = self._place / "journal"
        return read_marks(journal.read_text()) if journal.exists() else []

    def _has_all(self) -> bool:
        return {number for number, _ in self.results} == set(range(len(self.job.learning_rates)))

    # ------------------------------------------------------------------------------ one launch

    def _launch(self) -> bool:
        """Run the command once; tell whether a fault ended it."""
        name = f"{self._name}.{len(self.launches)}"
        # Training is as fast for all of them: with the variables that this program sets for trials.
        environment = os.environ | training_environment(os.environ)
        environment |= {
            "GOODPUT_JOURNAL": str(self._place / "journal"),
            "GOODPUT_LAUNCH": name,
            "PYTHONPATH": os.pathsep.join(map(str, (HOOK, ROOT))),
            "OMP_NUM_THREADS": str(usable_cores()),  # or results differ in their last digits
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": self._scratch,
        }
        with (self._place / "output.txt").open("ab") as output:
            output.write(f"--- launch {len(self.launches)}\n".encode())
            output.flush()
            begin = time.monotonic()
            process = subprocess.Popen(
                self.contestant.command(self._job_file, self._directory),
                **{"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL},
                **{"stdout": output, "stderr": output, "start_new_session": True},
            )
            was_hit = self._watch(process, name, begin)
        self.launches.append(Launch(name, begin, time.monotonic()))
        self._clock += self.launches[-1].seconds
        return was_hit

    def _watch(self, process: subprocess.Popen[bytes], name: str, begin: float) -> bool:
        """Wait for the command's end, or bring it about. Tells whether a fault was the end."""
        while process.poll() is None:
            clock = self._clock + time.monotonic() - begin
            if clock > self._limit:
                self.gave_up = f"not done after {self._limit:.0f} s"
                process.kill()
                process.wait()
            elif self._full_until is not None and clock > self._full_until:
                self._make_room()
            elif clock >= self._due and self.fault is not None:
                self._damaged += self.fault.inflict(
                    Target(
                        process,
                        self._directory,
                        self.contestant.records,
                        lambda: self._alive(f"{self._name}."),
                    )
                )
                self._plan_next(clock)
                if process.poll() is not None and not self.fault.needs_disk:
                    self.kills += 1
                    self._checks.append((time.monotonic() + LEFT_SECONDS, name))
                    return True
            else:
                self._look_for_the_left(wait=False)
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        return False

    def _plan_next(self, clock: float) -> None:
        assert self.fault is not None
        if self.fault.needs_disk:
            self._full_until = clock + FULL_SECONDS
        if self.fault.once:
            self._due = float("inf")
        while self._due <= clock:
            self._due += self.fault.seconds

    def _make_room(self) -> None:
        make_room(self._directory)
        self._full_until = None

    # ------------------------------------------------------------------------------- afterwards

    def _judge(self, was_hit: bool) -> None:
        """See whether the job is done; if it does not go on, be the person who looks at it."""
        if self.gave_up is not None:
            return
        if was_hit:
            done = len({work.unit for work in work_done(self.marks())})
            if done > self._most:
                self._most, self._stuck, self._failures = done, 0, 0
            else:
                self._stuck += 1
            if self._stuck >= STUCK_KILLS:
                self.gave_up = f"no step further in {STUCK_KILLS} kills"
            return
        self._read_results()
        if self._has_all():
            return
        if self._full_until is not None:
            self._make_room()  # as a person would have to; then the same command again
            return
        self._failures += 1
        if self._failures >= TRIES:
            self._failures = 0
            self._mend()

    def _read_results(self) -> None:
        command = self.contestant.results(self._job_file, self._directory)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        ran = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        lines = ran.stdout.splitlines()
        if ran.returncode or not lines:
            with (self._place / "output.txt").open("a") as output:
                output.write(f"--- no results\n{ran.stderr}\n")
            self.results = []
        else:
            self.results = [(number, value) for number, value in json.loads(lines[-1])]

    def _mend(self) -> None:
        """Do what a person would: remove what is damaged, in the end everything."""
        damaged = [path for path in self._damaged if path.exists()]
        self._damaged = []
        if damaged:
            for path in damaged:
                path.unlink()
            self.person.append(f"removed {', '.join(path.name for path in damaged)}")
        elif "began anew" in self.person:
            self.gave_up = "not done though it was begun anew"
        else:
            for path in self._directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.person.append("began anew")
            self._stuck = self._most = 0

    # -------------------------------------------------------------------------------- processes

    def _look_for_the_left(self, *, wait: bool) -> None:
        """Count what lives on of launches that were killed, when it is time to."""
        while self._checks:
            when, name = self._checks[0]
            if (rest := when - time.monotonic()) > 0:
                if not wait:
                    return
                time.sleep(rest)
            del self._checks[0]
            self.left += len(list(self._alive(name)))

    def _alive(self, launch: str) -> Iterator[int]:
        """Give the living processes of a launch, or of launches whose names begin so."""
        wanted = f"GOODPUT_LAUNCH={launch}".encode()
        for directory in Path("/proc").iterdir():
            try:
                words = (directory / "environ").read_bytes().split(b"\0")
                state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            is_of_it = wanted in words or (
                launch.endswith(".") and any(word.startswith(wanted) for word in words)
            )
            if is_of_it and state != "Z":
                yield int(directory.name)

    def _end_everything(self) -> None:
        """Leave no process behind; those of the last kill have their time first."""
        self._look_for_the_left(wait=True)
        for pid in list(self._alive(f"{self._name}.")):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
