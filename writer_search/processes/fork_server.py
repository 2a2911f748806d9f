"""The fork server, which imports torch once, and what every child does first."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from importlib import import_module
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from writer_search.common.environment import _environment, training_environment

# What terminals send to a whole group, and batch systems to every process of a job.
FOR_THE_SEARCH = (
    *(signal.SIGINT, signal.SIGHUP, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2),
)


SESSION_TRIES = 10  # to weigh a session


_context = get_context("forkserver")


def start_fork_server() -> None:
    """Start the fork server where none runs; it imports torch meanwhile, this returns at once."""
    _context.set_forkserver_preload(["writer_search.processes.preload"])
    here = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    with _environment(
        PYTHONPATH=os.pathsep.join([here, before] if before else [here]),
        # Not from the working directory, which may hold a data.py or a train.py of the user's own.
        PYTHONSAFEPATH="1",
        SEARCH_PID=str(os.getpid()),
        **training_environment(os.environ),
    ):
        with _shielded():
            resource_tracker.ensure_running()
        with _shielded():  # again: starting the tracker lifts it from some signals
            forkserver.ensure_running()


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """Keep signals from programs that are started meanwhile.

    They are for the search, with which all its processes end. A program inherits what is blocked,
    for life; this process gets late what comes meanwhile, but loses nothing.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_SEARCH)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def weigh_session(niceness: int) -> None:
    """Make this process's session as nice to others as said.

    Where Linux groups processes by session it shares the processor between sessions, and a process
    that is nice goes behind others of its own session alone: measured, half of the core.
    """
    for _ in range(SESSION_TRIES):
        try:
            Path("/proc/self/autogroup").write_text(str(niceness))
            return
        except BlockingIOError:  # whoever is not root may change one in a tenth of a second
            time.sleep(0.1)
        except OSError:  # this Linux does not
            return


def _work(name: str, connection: Connection, argument: Any) -> None:
    # A session of its own: a signal to one child's group reaches that child alone.
    os.setsid()
    if niceness := os.nice(0):
        weigh_session(niceness)
    module, _, function = name.partition(":")
    # Imported here, not above: the search process must not import torch.
    getattr(import_module(module), function)(connection, argument)
