"""The drawing process: beside the search, behind it, and never in its way."""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from searches import make_search

import drawing as drawing_module
from drawing import DRAW, MOST_CRASHES, NICENESS, Drawing

pytestmark = pytest.mark.pictures


class FakeChild:
    """The search's end of a child that does what the test says."""

    made: list[FakeChild]

    def __init__(self, work: str, argument: Any) -> None:
        self.connection, self.theirs = Pipe()
        self.code, self.pid, self.killed = 0, 123, False
        self.made.append(self)

    def order(self, order: str) -> None:
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
    for _ in range(5):
        drawing.request()
    (child,) = children
    assert child.orders() == [DRAW] * 5
    child.theirs.send(("drawn", {"notes": ["a"], "orders": 4}))
    drawing.receive()
    assert drawing.notes == ["a"]
    child.theirs.send(("failed", {"cause": "ValueError: why", "orders": 1}))
    drawing.finish(wakeup[0], False)  # waits for the fifth
    assert "ValueError: why" in capfd.readouterr().err
    assert drawing.connections == []


def test_search_drawn_to_its_end_is_not_drawn_again(
    children: list[FakeChild], tmp_path: Path, wakeup: tuple[socket.socket, socket.socket]
) -> None:
    drawing = Drawing(tmp_path)
    drawing.request()
    children[0].theirs.send(("drawn", {"notes": [], "orders": 1}))
    drawing.receive()
    drawing.finish(wakeup[0], False)
    assert children[0].killed


def test_orders_that_a_killed_process_left_are_given_to_the_next(
    children: list[FakeChild], tmp_path: Path
) -> None:
    drawing = Drawing(tmp_path)
    drawing.request()
    children[0].kill()
    drawing.receive()
    assert len(children) == 1, "what killed it may do so again"
    for _ in range(2):
        drawing.request()
    children[1].kill()
    drawing.receive()
    assert children[2].orders() == [DRAW]


def test_drawings_take_a_tenth_of_the_time_until_they_are_hurried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drawing_module, "REST", 1000.0)
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    hurried = threading.Event()
    drawn: list[float] = []

    def draw() -> list[str]:
        drawn.append(time.process_time())
        while time.process_time() < drawn[-1] + 0.05:
            pass
        if len(drawn) == 2:
            raise ValueError("on purpose")
        return []

    child = threading.Thread(
        target=drawing_module.answer_orders, args=(orders, hurried, draw, answers.put), daemon=True
    )
    child.start()
    orders.put(DRAW)
    assert answers.get(timeout=20) == ("drawn", {"notes": [], "orders": 1})
    for _ in range(3):
        orders.put(DRAW)
    with pytest.raises(queue.Empty):
        answers.get(timeout=0.3)
    hurried.set()
    answer = ("failed", {"cause": "ValueError: on purpose", "orders": 3})
    assert answers.get(timeout=20) == answer
    orders.put(DRAW)
    assert answers.get(timeout=20)[0] == "drawn", "without a rest"
    orders.put("end")
    child.join(timeout=20)
    assert not child.is_alive()


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
    assert pipe.poll(240)  # of the lowest priority, on a machine that may be busy
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
    """Tell whether this process has CAP_SYS_NICE, which root has not in every container."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (capabilities,) = (line for line in lines if line.startswith("CapEff:"))
    return bool(int(capabilities.split()[1], 16) >> 23 & 1)


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
