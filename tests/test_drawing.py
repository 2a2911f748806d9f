"""The drawing process: beside the search, behind it, and never in its way."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from searches import make_search

from writer_search.processes import pictures as drawing_module
from writer_search.processes.pictures import (
    DRAW,
    HURRY,
    MOST_CRASHES,
    MOST_WAITING,
    NICENESS,
    Drawing,
)

pytestmark = pytest.mark.pictures


class FakeChild:
    """The search's end of a child that does what the test says."""

    made: list[FakeChild]

    def __init__(self, work: str, argument: Any) -> None:
        self.connection, self.theirs = Pipe()
        self.code, self.pid, self.killed = 0, 123, False
        self.made.append(self)

    def order(self, order: str) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(order)

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        self.killed = True
        self.theirs.close()

    def end(self) -> int:
        self.connection.close()
        return self.code

    def orders(self) -> list[str]:
        """Take the orders that wait."""
        taken = []
        while self.theirs.poll():
            taken.append(self.theirs.recv())
        return taken


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[FakeChild]:
    FakeChild.made = []
    monkeypatch.setattr(drawing_module, "ChildProcess", FakeChild)
    return FakeChild.made


@pytest.fixture
def wakeup() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_one_process_draws_all_and_every_order_is_answered(
    children: list[FakeChild],
    tmp_path: Path,
    wakeup: tuple[socket.socket, socket.socket],
    capfd: pytest.CaptureFixture[str],
) -> None:
    drawing = Drawing(tmp_path)
    for _ in range(2):
        drawing.request()
    (child,) = children
    assert child.orders() == [DRAW] * 2
    child.theirs.send(("drawn", {"notes": ["a"], "orders": 1}))
    drawing.receive()
    assert drawing.notes == ["a"]
    child.theirs.send(("failed", {"cause": "ValueError: why", "orders": 1}))
    drawing.finish(wakeup[0], False)  # waits for the second
    assert "ValueError: why" in capfd.readouterr().err
    assert drawing.connections == []


def test_search_drawn_to_its_end_is_not_drawn_again(
    children: list[FakeChild],
    tmp_path: Path,
    wakeup: tuple[socket.socket, socket.socket],
    capfd: pytest.CaptureFixture[str],
) -> None:
    drawing = Drawing(tmp_path)
    drawing.request()
    children[0].theirs.send(("drawn", {"notes": [], "orders": 1}))
    drawing.receive()
    assert children[0].orders() == [DRAW]
    drawing.finish(wakeup[0], False)
    assert children[0].killed
    assert capfd.readouterr().err == "", "nothing was waited for"


def test_process_that_takes_no_orders_holds_nothing_up(
    children: list[FakeChild], tmp_path: Path
) -> None:
    drawing = Drawing(tmp_path)
    for _ in range(1000):  # a pipe takes some 300
        drawing.request()
    (child,) = children
    assert child.orders() == [DRAW] * MOST_WAITING
    child.theirs.send(("drawn", {"notes": [], "orders": 1}))
    drawing.receive()
    assert child.orders() == [DRAW], "what was asked for since"
    child.theirs.send(("drawn", {"notes": [], "orders": 2}))
    drawing.receive()
    assert child.orders() == []


def test_orders_that_a_killed_process_left_are_given_to_the_next(
    children: list[FakeChild],
    tmp_path: Path,
    wakeup: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawing = Drawing(tmp_path)
    drawing.request()
    children[0].kill()  # while it rests, maybe
    drawing.receive()
    assert children[1].orders() == [DRAW]
    monkeypatch.setattr(drawing_module, "LAST_SECONDS", 0.1)
    monkeypatch.setattr(drawing, "kill", lambda: None)
    children[1].kill()
    drawing.finish(wakeup[0], False)
    assert children[2].orders() == [DRAW, HURRY]


class Done(Exception):
    """Ends `answer_orders`."""


def test_drawings_take_a_tenth_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    used, now = [0.0], [100.0]
    rests: list[float] = []
    answers: list[Any] = []
    monkeypatch.setattr(time, "process_time", lambda: used[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def draw() -> list[str]:
        used[0] += 2.0
        now[0] += 12.0  # others have the rest of it
        if len(answers) == 1:
            raise ValueError("on purpose")
        return ["a note"]

    def answer(message: Any) -> None:
        answers.append(message)
        now[0] += 1.0
        for _ in range(3):
            orders.put(DRAW)
        if len(answers) == 3:
            raise Done

    hurried = threading.Event()
    monkeypatch.setattr(hurried, "wait", rests.append)
    orders.put(DRAW)
    with pytest.raises(Done):
        drawing_module.answer_orders(orders, hurried, draw, answer)
    drawn = ("drawn", {"notes": ["a note"], "orders": 1})
    assert answers[0] == drawn
    assert answers[1] == ("failed", {"cause": "ValueError: on purpose", "orders": 3})
    assert rests == [0.0, 17.0, 17.0], "nine times two seconds, but for one that went by"


def test_crashes_are_warned_of_and_end_in_giving_up(
    children: list[FakeChild], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drawing = Drawing(tmp_path)
    for number in range(MOST_CRASHES):
        drawing.request()
        children[number].code = -signal.SIGSEGV
        children[number].kill()
        drawing.receive()
    drawing.request()
    assert len(children) == MOST_CRASHES
    warnings = capfd.readouterr().err.splitlines()
    assert warnings[0] == "warning: drawing the search: killed by SIGSEGV"
    assert warnings[-1].endswith("given up for this run")
    assert len(warnings) == MOST_CRASHES
    assert drawing.connections == []


def test_last_drawing_is_waited_for_but_not_against_a_signal(
    children: list[FakeChild], tmp_path: Path, wakeup: tuple[socket.socket, socket.socket]
) -> None:
    drawing = Drawing(tmp_path)
    drawing.request()
    drawing.request()
    children[0].theirs.send(("drawn", {"notes": ["old"], "orders": 1}))
    children[0].theirs.send(("drawn", {"notes": ["new"], "orders": 1}))
    drawing.finish(wakeup[0], False)
    assert drawing.notes == ["new"]
    assert drawing.connections == []

    drawing.request()
    wakeup[1].send(b"x")  # a signal while the last one is under way
    started = time.monotonic()
    drawing.finish(wakeup[0], False)
    drawing.request()
    drawing.finish(wakeup[0], True)  # one that came before
    assert time.monotonic() - started < 1
    assert drawing.connections == []


def test_last_drawing_that_hangs_is_ended(
    children: list[FakeChild],
    tmp_path: Path,
    wakeup: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(drawing_module, "LAST_SECONDS", 0.05)
    drawing = Drawing(tmp_path)
    drawing.request()
    drawing.finish(wakeup[0], False)
    assert "took longer than 0.05 s" in capfd.readouterr().err
    assert drawing.connections == []


def test_half_drawn_files_are_cleared_away(children: list[FakeChild], tmp_path: Path) -> None:
    (tmp_path / "trial_000").mkdir()
    (tmp_path / "summary").mkdir()
    leftovers = [
        tmp_path / "summary" / ".history.png.123.tmp",
        tmp_path / "trial_000" / ".curves.png.123.tmp",
    ]
    others = [
        tmp_path / "trial_000" / ".history.jsonl.123.tmp",
        tmp_path / "summary" / ".history.png.124.tmp",
    ]
    for path in (*leftovers, *others):
        path.touch()
    drawing = Drawing(tmp_path)
    drawing.request()
    drawing.kill()
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


def wait_for_answer(drawing: Drawing) -> None:
    (pipe,) = drawing.connections
    assert pipe.poll(150)  # of the lowest priority, on a machine that may be busy
    drawing.receive()


def test_real_process_draws_at_the_lowest_priority_and_ends(
    tmp_path: Path, wakeup: tuple[socket.socket, socket.socket], capfd: pytest.CaptureFixture[str]
) -> None:
    make_search(tmp_path, 2)
    drawing = Drawing(tmp_path)
    drawing.request()
    assert drawing._child is not None
    pid = drawing._child.pid
    drawing.finish(wakeup[0], False)
    assert not Path(f"/proc/{pid}").exists()
    assert capfd.readouterr().err == ""
    assert "importances.png: needs 10 complete trials, there are 2" in drawing.notes
    assert (tmp_path / "summary" / "history.png").exists()
    assert (tmp_path / "trial_000" / "curves.png").exists()
    page = (tmp_path / "summary" / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert page.count("data:image/png") >= 4


def test_real_process_that_is_killed_or_has_nothing_to_draw(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drawing = Drawing(tmp_path)  # no search is in there
    drawing.request()
    wait_for_answer(drawing)
    assert capfd.readouterr().err.count("warning: drawing the search: ") == 1
    assert drawing._child is not None
    pid = drawing._child.pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == NICENESS
    os.kill(pid, signal.SIGKILL)
    wait_for_answer(drawing)
    assert "killed by SIGKILL" in capfd.readouterr().err
    assert not Path(f"/proc/{pid}").exists()


def test_real_process_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "matplotlib.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setattr(sys, "path", [str(hidden), *sys.path])
    make_search(tmp_path / "c", 2)
    drawing = Drawing(tmp_path / "c")
    drawing.request()
    wait_for_answer(drawing)
    drawing.kill()
    assert drawing.notes == ["no pictures: matplotlib is not installed (pip install matplotlib)"]
    assert capfd.readouterr().err == ""
    assert not list((tmp_path / "c").rglob("*.png"))
    assert (tmp_path / "c" / "summary" / "report.html").exists()


def may_take_back_niceness() -> bool:
    """Tell whether this user may: root may not in every container."""
    script = "import os; os.nice(1); os.setpriority(os.PRIO_PROCESS, 0, 0)"
    return subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


@pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(), reason="this Linux does not group by session"
)
def test_drawing_gives_way_as_a_session_until_the_trials_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wakeup: tuple[socket.socket, socket.socket]
) -> None:
    """A process that is nice alone takes half a core from a trial: each has a session."""
    drawing = Drawing(tmp_path)
    drawing.request()
    wait_for_answer(drawing)
    assert drawing._child is not None
    autogroup = Path(f"/proc/{drawing._child.pid}/autogroup")
    assert autogroup.read_text().split()[-1] == str(NICENESS)
    assert os.sched_getscheduler(drawing._child.pid) == os.SCHED_IDLE
    monkeypatch.setattr(drawing, "kill", lambda: None)
    drawing.request()
    drawing.finish(wakeup[0], False)
    assert autogroup.read_text().split()[-1] == "0"
    if may_take_back_niceness():
        assert os.sched_getscheduler(drawing._child.pid) == os.SCHED_OTHER
        assert os.getpriority(os.PRIO_PROCESS, drawing._child.pid) == 0
    Drawing.kill(drawing)
