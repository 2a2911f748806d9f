"""The drawing process: the pictures and the report of a search, made beside it.

Drawing takes seconds, and the loop that owns the study must not wait for it. So one child process
of low priority draws when trials have finished. It only reads what the search has written.
Whatever happens to it is told in one line, and never worth a search. Both ends of its pipe are in
here; this file imports nothing that is slow, the child does.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from writer_search.common.text import one_line
from writer_search.processes.fork_server import weigh_session
from writer_search.processes.messages import Message, obey_in_thread
from writer_search.processes.parent import ChildProcess, exit_text
from writer_search.results.rows import DATABASE, Reading, Row, read_database

DRAW = "draw"
HURRY = "hurry"  # rest no more, and give way no more: no trial is left
REST = 9.0  # times the processor time of a drawing, before the next: a tenth of one core at most
NICENESS = 19  # the least, also of its session: a trial that wants the processor goes first
LAST_SECONDS = 120.0  # what the last drawing may take, when no trial runs any more
MOST_CRASHES = 3  # in a row, after which the pictures are given up
MOST_WAITING = 2  # orders: one may be drawn already, by the next one what is new since then


@dataclass(frozen=True)
class Source:
    """Where to read a search, and write what is drawn.

    read: reads the study, in the drawing process.
    """

    checkpoint_dir: Path
    read: Callable[[], Reading]


class Drawing:
    """The search process's end of the drawing process, which is started when first needed.

    At most one is there, and it draws the newest state: what was asked for while it was busy or
    rested is drawn once, afterwards. `notes` says, in lines, which pictures the last drawing left
    out and why.
    """

    def __init__(self, checkpoint_dir: Path, read: Callable[[], Reading] | None = None) -> None:
        """read: for a study that is elsewhere; the drawing process imports it by name."""
        self.notes: list[str] = []
        self._source = Source(
            checkpoint_dir, read or partial(read_database, checkpoint_dir / DATABASE)
        )
        self._child: ChildProcess | None = None
        self._waiting = 0  # orders that no drawing has answered
        self._again = False  # another is to be sent, once one is answered
        self._hurried = False
        self._crashes = 0

    @property
    def connections(self) -> list[Connection]:
        """Give what becomes readable when `receive` has something to do."""
        return [] if self._child is None else [self._child.connection]

    def request(self) -> None:
        """Let the present state be drawn, soon; returns at once."""
        if self._waiting == MOST_WAITING:  # more of them would fill the pipe to one that hangs
            self._again = True
            return
        if self._crashes >= MOST_CRASHES:
            return
        try:
            if self._child is None:
                self._child = ChildProcess(f"{__name__}:draw_on_demand", self._source)
        except (OSError, EOFError) as error:
            self._crashed(one_line(error))
            return
        self._child.order(DRAW)
        if self._hurried:
            self._child.order(HURRY)
        self._waiting, self._again = self._waiting + 1, False

    def receive(self) -> None:
        """Take the drawing process's word, or notice its end."""
        if self._child is None:
            return
        message = self._child.receive()
        if message is None:
            self._again, self._waiting = self._waiting > 0, 0  # its successor draws what it left
            code = self._child.end()
            self._child = None
            self._crashed(exit_text(code))
        else:
            kind, content = message
            self._waiting -= content["orders"]
            if kind == "failed":
                self._crashed(content["cause"])
            else:
                self._crashes = 0
                self.notes = content["notes"]
        if self._again:
            self.request()

    def finish(self, wakeup: socket.socket, is_stopping: bool) -> None:
        """Wait until the newest state is drawn, unless a signal comes; then end the process.

        wakeup: becomes readable with a signal.   is_stopping: one has come; nothing is waited for.
        """
        if self._child is not None:
            self._child.order(HURRY)
        self._hurried = True
        deadline = time.monotonic() + LAST_SECONDS
        while self._waiting and not is_stopping:
            left = deadline - time.monotonic()
            ready = connection.wait([*self.connections, wakeup], timeout=max(0.0, left))
            if not ready:
                self._crashed(f"took longer than {LAST_SECONDS:g} s")
            if not ready or wakeup in ready:
                break
            self.receive()
        self.kill()

    def kill(self) -> None:
        """End the drawing process at once, where there is one; clear away half-drawn files."""
        if self._child is None:
            return
        pid = self._child.pid
        self._child.kill()
        self._child.end()
        self._child = None
        self._waiting, self._again = 0, False
        # Its own: another search may draw into the same directory.
        for unfinished in (f"summary/.*.{pid}.tmp", f"trial_*/.curves.png.{pid}.tmp"):
            for leftover in self._source.checkpoint_dir.glob(unfinished):
                leftover.unlink(missing_ok=True)

    def write_report(self, rows: Sequence[Row], recorded: Mapping[str, Any]) -> None:
        """Write the report from here, when the drawing process has ended."""
        from writer_search.results.report import write_report

        try:
            write_report(self._source.checkpoint_dir, rows, recorded, self.notes)
        except Exception as error:
            self._crashed(one_line(f"{type(error).__name__}: {error}"))

    def _crashed(self, cause: str) -> None:
        self._crashes += 1
        last = "; given up for this run" if self._crashes == MOST_CRASHES else ""
        print(f"warning: drawing the search: {cause}{last}", file=sys.stderr, flush=True)


def draw_on_demand(pipe: Connection, source: Source) -> None:
    """Draw at orders, until the search is gone. What a child process runs."""
    usual = os.nice(0)  # the search's own
    give_way()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    hurried = threading.Event()

    def obey(order: str) -> None:
        if order == HURRY:
            take_turns(usual)
            hurried.set()
        else:
            orders.put(order)

    def answer(message: Message) -> None:
        with contextlib.suppress(OSError):  # nobody listens: `obey_in_thread` ends this process
            pipe.send(message)

    obey_in_thread(pipe, obey)
    answer_orders(orders, hurried, lambda: draw(source), answer)


def give_way() -> None:
    """Let this process run only where others leave time."""
    weigh_session(NICENESS)
    os.nice(NICENESS)
    # With all three it has a sixth of a core beside a trial on all cores, whose steps take 1.1
    # times as long meanwhile; without this one a third, and they 1.4 times as long.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def take_turns(niceness: int) -> None:
    """Take back what `give_way` did to the main thread, as far as this user may."""
    weigh_session(niceness)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(os.getpid(), os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, os.getpid(), niceness)


def answer_orders(
    orders: queue.SimpleQueue[str],
    hurried: threading.Event,
    draw_now: Callable[[], list[str]],
    answer: Callable[[Message], None],
) -> None:
    """Draw and rest in turn, for ever; one drawing answers all orders that came until it began.

    hurried: whether the rests are over.
    """
    rested = 0.0
    while True:
        orders.get()
        hurried.wait(max(0.0, rested - time.monotonic()))
        answered = 1
        while not orders.empty():
            orders.get()
            answered += 1
        used = time.process_time()
        try:
            message = ("drawn", {"notes": draw_now(), "orders": answered})
        except BaseException as error:
            cause = one_line(f"{type(error).__name__}: {error}")
            message = ("failed", {"cause": cause, "orders": answered})
        rested = time.monotonic() + REST * (time.process_time() - used)
        answer(message)


def draw(source: Source) -> list[str]:
    """Draw the pictures, write the report; say which pictures were left out, and why."""
    from writer_search.results.pictures.trials import draw_all, draw_missing_curves
    from writer_search.results.report import write_report

    trials, rows, recorded = source.read()
    notes = draw_all(source.checkpoint_dir, trials)
    write_report(source.checkpoint_dir, rows, recorded, notes)
    # Last: after an older version's search there are hundreds.
    draw_missing_curves(source.checkpoint_dir, trials)
    return notes
