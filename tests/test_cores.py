"""Cores that this process may use, and cores that other programs leave to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from writer_search.common import cores as cores_module
from writer_search.common.cores import SharedCores, WaitingThreads, asked_threads, usable_cores

ROOT = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "250000 100000"}, 2),  # a third thread would be stopped half the time
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("0::/pod/job", {"pod/cpu.max": "300000 100000", "pod/job/cpu.max": "max 100000"}, 3),
        ("0::/pod/job", {"pod/cpu.max": "300000 100000", "pod/job/cpu.max": "100000 50000"}, 2),
        ("0::/seen/from/outside", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"cpu.max": "gibberish"}, 8),
        ("0::/", {}, 8),
        (
            "4:cpu,cpuacct:/docker/aa\n1:cpuset:/\n0::/",
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "50000"},
            3,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (None, {}, 8),
    ],
)
def test_cores_within_a_quota(
    group: str | None,
    files: dict[str, str],
    cores: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    contents = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    if group is not None:
        contents["proc/self/cgroup"] = group
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": ""}, None),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "-1"}, None),
        ({"OMP_NUM_THREADS": "all"}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": " 4,2,1"}, 4),  # of which the first is for the outermost level
    ],
)
def test_threads_that_the_user_asks_for(given: dict[str, str], threads: int | None) -> None:
    assert asked_threads(given) == threads


class Machine:
    """A /proc of 4 cores, of which this process may run on the first three."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.now = root, 100.0
        self.busy = dict.fromkeys(range(4), 1000.0)  # seconds
        self.processes: dict[int, tuple[str, int, float, float]] = {}
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def process(self, pid: int, parent: int, own: float, ended: float = 0.0) -> None:
        self.processes[pid] = (f"a (name) {pid}", parent, own, ended)

    def write(self) -> None:
        proc = self.root / "proc"
        proc.mkdir(exist_ok=True)
        lines = [f"cpu  {int(sum(self.busy.values()) * TICKS)} 0 0 5 0 0 0 0 0 0"]
        for core, seconds in self.busy.items():
            lines.append(f"cpu{core} {int(seconds * TICKS)} 0 0 99999 77 0 0 55 0 0")
        (proc / "stat").write_text("\n".join([*lines, "intr 1 2 3", "ctxt 5"]) + "\n")
        if not (proc / "self").is_symlink():
            (proc / "self").symlink_to(str(os.getpid()))
        for pid, (name, parent, own, ended) in self.processes.items():
            (proc / str(pid)).mkdir(exist_ok=True)
            before = f"{pid} ({name}) S {parent} 1 1 0 -1 4194560 1 2 3 4"
            text = f"{before} {int(own * TICKS)} 0 {int(ended * TICKS)} 0 20 0 1\n"
            (proc / str(pid) / "stat").write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path, monkeypatch)
    machine.process(1, 0, own=50)
    machine.process(os.getpid(), 1, own=5)
    machine.process(700, os.getpid(), own=1)  # the fork server
    machine.process(701, 700, own=3)  # a trial
    machine.process(702, 1, own=800)
    machine.write()
    return machine


@pytest.mark.parametrize(
    ("others", "left"),
    [
        ((0, 0, 0), 3),
        ((0.1, 0.02, 0.02), 3),
        ((0.5, 0, 0), 2),
        ((1, 0.1, 0), 2),
        ((1, 0.2, 0), 1),
        ((1, 1, 1), 1),
    ],
)
def test_cores_that_other_programs_leave(
    others: tuple[float, ...], left: int, machine: Machine
) -> None:
    cores = SharedCores(machine.root)
    machine.now += 10
    for core, share in enumerate(others):
        machine.busy[core] += 10 * share
    machine.busy[3] += 10  # not a core of this process
    machine.write()
    assert cores.left() == left
    assert cores.taken == pytest.approx(sum(others), abs=0.01)


def test_own_processes_are_not_others(machine: Machine) -> None:
    cores = SharedCores(machine.root)
    machine.now += 10
    machine.busy[0] += 10
    machine.busy[1] += 9
    machine.process(os.getpid(), 1, own=6)
    # The first trial has ended, and its parent has its count; another has begun.
    machine.process(700, os.getpid(), own=2, ended=8)
    del machine.processes[701]
    machine.process(703, 700, own=12)
    (machine.root / "proc/701/stat").unlink()
    machine.write()
    assert cores.left() == 3
    assert cores.taken == pytest.approx(0, abs=0.01)


def test_what_was_taken_holds_until_the_next_long_look(machine: Machine) -> None:
    cores = SharedCores(machine.root)
    machine.now += 10
    machine.busy[0] += 10
    machine.write()
    assert cores.left() == 2
    machine.now += 0.5
    assert cores.left() == 2
    machine.now += 0.5
    assert cores.left() == 3


def test_a_name_may_be_cut_off_within_a_letter(machine: Machine) -> None:
    (machine.root / "proc/702/stat").write_bytes(
        b"702 (Zeilenpr\xc3\xbcfu\xc3) S 1 1 1 0 -1 4 1 2 3 4 9 9 0 0\n"
    )
    cores = SharedCores(machine.root)
    machine.now += 10
    machine.busy[0] += 10
    (machine.root / "proc/702").rename(machine.root / "proc/802")
    del machine.processes[702]
    machine.write()
    assert cores.left() == 2


def test_cores_that_were_left_for_a_while(machine: Machine) -> None:
    cores = SharedCores(machine.root)
    for busy, left, left_lately in ((10, 2, 2), (0, 3, 2), (0, 3, 2), (0, 3, 3), (10, 2, 2)):
        machine.now += 10
        machine.busy[0] += busy
        machine.write()
        assert cores.left_lately() == left_lately
        assert cores.left() == left


def test_a_little_on_each_of_many_cores_is_no_matter(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(100)))
    machine.busy = dict.fromkeys(range(100), 0.0)
    machine.write()
    cores = SharedCores(machine.root)
    machine.now += 100
    machine.busy = dict.fromkeys(range(100), 0.9)
    machine.write()
    assert cores.left() == 100
    machine.now += 100
    machine.busy = dict.fromkeys(range(100), 2.2)
    machine.write()
    assert cores.left() == 99


def test_nothing_is_taken_where_the_count_was_lost(machine: Machine) -> None:
    cores = SharedCores(machine.root)
    machine.now += 10
    machine.busy[0] += 1
    machine.process(700, os.getpid(), own=0)  # the fork server, anew
    machine.process(701, 700, own=0)
    machine.write()
    assert cores.left() == 3


@pytest.mark.parametrize("text", [None, "", "cpu0 many", "cpu0 1 2"])
def test_nothing_is_taken_where_the_system_does_not_tell(
    text: str | None, machine: Machine
) -> None:
    (machine.root / "proc/stat").unlink()
    cores = SharedCores(machine.root)
    if text is not None:
        (machine.root / "proc/stat").write_text(text)
    machine.now += 10
    assert cores.left() == 3
    machine.write()
    machine.now += 10
    assert cores.left() == 3


BUSY = "import time; print(flush=True); end = time.time() + 60\nwhile time.time() < end: pass"


def test_a_busy_program_is_seen_and_an_own_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ones, on a core of their own as far as the machine has one."""
    monkeypatch.setattr(cores_module, "SHORTEST_LOOK", 0.3)
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as own:
        try:
            assert own.stdout is not None
            own.stdout.readline()
            cores = SharedCores()
            others = SharedCores()
            monkeypatch.setattr(others, "_own_seconds", lambda: 0.0)
            others._before = others._look()
            time.sleep(1.0)
            cores.left()
            others.left()
        finally:
            own.kill()
    assert others.taken - cores.taken > 0.2


class Tasks:
    """The threads of a process, and for how many seconds each was kept from a core."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.now = directory, 50.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, seconds: float, **waited: float) -> None:
        self.now += seconds
        for name, more in waited.items():
            file = self.directory / name.removeprefix("t") / "schedstat"
            file.parent.mkdir(exist_ok=True)
            before = int(file.read_text().split()[1]) if file.exists() else 0
            file.write_text(f"123456789 {before + int(more * 1e9)} 42\n")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tasks:
    tasks = Tasks(tmp_path, monkeypatch)
    tasks.wait(0.0, t7=3.0, t8=5.0)
    return tasks


def test_threads_that_wait_become_fewer(tasks: Tasks) -> None:
    waiting = WaitingThreads(8, tasks.directory)
    tasks.wait(1.0, t7=1.0, t8=1.0)
    assert waiting.fewer() is None, "it looks every two seconds"
    tasks.wait(1.0, t7=0.5, t8=0.5)
    assert waiting.fewer() is None, "one look is not enough"
    tasks.wait(2.0, t7=2.0, t8=1.8)
    assert waiting.fewer() == 6, "1.9 cores were missing"
    tasks.wait(3.0, t8=2.4)
    assert waiting.fewer() is None
    tasks.wait(3.0, t8=2.4)
    assert waiting.fewer() == 5
    for _ in range(10):
        tasks.wait(2.0, t8=20.0)
        waiting.fewer()
    assert waiting.threads == 1
    tasks.wait(2.0, t8=20.0)
    assert waiting.fewer() is None


def test_threads_that_seldom_wait_stay(tasks: Tasks) -> None:
    waiting = WaitingThreads(2, tasks.directory)
    for number in range(10):
        tasks.wait(2.0, t7=0.3, t8=0.1 if number % 2 else 1.0)  # now and then above the threshold
        assert waiting.fewer() is None
    for _ in range(4):
        tasks.wait(2.0, t7=0.4, t8=0.4)  # as beside something small
        assert waiting.fewer() is None


def test_threads_stay_where_nothing_is_told(tmp_path: Path, tasks: Tasks) -> None:
    """A thread takes its count with it when it ends; kernels may keep none."""
    waiting = WaitingThreads(2, tasks.directory)
    (tasks.directory / "8" / "schedstat").unlink()
    (tasks.directory / "7" / "schedstat").write_text("nothing")
    nowhere = WaitingThreads(2, tmp_path / "none")
    for _ in range(4):
        tasks.now += 2.0
        assert waiting.fewer() is None
        assert nowhere.fewer() is None


def test_many_threads_may_wait_a_little_each(tasks: Tasks) -> None:
    waiting = WaitingThreads(60, tasks.directory)
    for _ in range(4):
        tasks.wait(2.0, t7=1.0, t8=1.0)
        assert waiting.fewer() is None


def test_threads_that_are_kept_from_running_are_seen() -> None:
    """Real ones: two of them on one core."""
    script = (
        "import os, threading, time; from writer_search.common import cores\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
        "; cores.WAITING_SECONDS = 0.3; watch = cores.WaitingThreads(2)\n"
        "def work():\n while True: sum(range(10000))\n"
        "for _ in range(2): threading.Thread(target=work, daemon=True).start()\n"
        "end = time.time() + 30; fewer = None\n"
        "while fewer is None and time.time() < end: fewer = watch.fewer(); time.sleep(0.01)\n"
        "print(fewer, flush=True); os._exit(0)"
    )
    assert Path("/proc/self/task").exists()
    busy = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.DEVNULL)
    try:
        os.sched_setaffinity(busy.pid, {min(os.sched_getaffinity(0))})
        found = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
    finally:
        busy.kill()
        busy.wait()
    assert found.stdout.strip() == "1", found.stderr
