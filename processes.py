"""Child processes as the search process sees them; `worker.py` is what they do.

Children are forked from a fork server that has torch imported and no device touched, so that one
starts in hundredths of a second and a broken one takes nothing with it. A pipe joins each to the
search process. Up go `(kind, content)` messages: started, progress, report, done, pruned, stopped,
failed, out_of_memory, device_failed. Down go the orders CONTINUE, PRUNE and STOP. This file imports
no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from config import TrialConfig
from data import LineSet

CONTINUE, PRUNE, STOP = "continue", "prune", "stop"
Message = tuple[str, dict[str, Any]]

_context = get_context("forkserver")


@dataclass(frozen=True)
class MachineQuestion:
    """What the search wants to know before its first trial; see `worker.answer_question`."""

    device: str  # auto, cpu, cuda or cuda:N
    weights: str  # auto, imagenet or none
    backbones: tuple[str, ...] | None  # None: the tier's own
    measure: bool  # whether to find out the faster precision of each


@dataclass(frozen=True)
class Job:
    """All that a trial's process needs.

    gpus: entries of CUDA_VISIBLE_DEVICES; none: the CPU.   micro_batch: images on a device at once.
    continue_from: the trial directory whose checkpoint to go on from.
    """

    config: TrialConfig
    data: LineSet
    trial_dir: Path
    threads: int
    gpus: tuple[str, ...] = ()
    continue_from: Path | None = None
    micro_batch: int | None = None


@dataclass(frozen=True)
class TestQuestion:
    """What is to be measured on the test lines; see `worker.measure_on_test`."""

    model_file: Path
    data: LineSet
    threads: int
    gpus: tuple[str, ...]  # one or none


class ChildProcess:
    """The search process's end of one child: a trial, or a question about the machine.

    `work` names the function to run there, as "module:function".
    """

    def __init__(self, work: str, argument: Any) -> None:
        start_fork_server()  # again, where somebody has killed it
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_work, args=(work, theirs, argument))
        self._process.start()
        theirs.close()  # otherwise the end of the child would not be the end of the pipe

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def order(self, order: str) -> None:
        """Send an order; a child that is gone is found out by `receive`."""
        with contextlib.suppress(OSError):
            self.connection.send(order)

    def receive(self) -> Message | None:
        """Wait for the next message; None when the child has ended."""
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError):
            return None
        return message

    def kill(self) -> None:
        """End the child at once, unless it has ended."""
        with contextlib.suppress(ValueError):  # `end` has closed it
            self._process.kill()

    def end(self, seconds: float = 10.0) -> int | None:
        """Wait for the child's end, killing it after `seconds`; give its exit code (-signal)."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self.connection.close()
        code = self._process.exitcode
        self._process.close()
        return code


def start_fork_server() -> None:
    """Start the fork server where none runs; it imports torch meanwhile, this returns at once."""
    _context.set_forkserver_preload(["fork_server_preload"])
    here = str(Path(__file__).parent)
    before = os.environ.get("PYTHONPATH")
    with _environment(
        PYTHONPATH=os.pathsep.join([here, before] if before else [here]),
        # Threads that spin while they wait starve each other where anything else runs: 7 times
        # slower training of a small model beside one busy process, on 2 cores with 2 threads.
        OMP_WAIT_POLICY=os.environ.get("OMP_WAIT_POLICY", "passive"),
        SEARCH_PID=str(os.getpid()),
    ):
        # A Ctrl-C while it imports is not for it: it ends with this process.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a program that is started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def exit_text(code: int | None) -> str:
    """Say how a process that left no word ended."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL (by hand, or by the system's out-of-memory killer)"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code} without a word"


def _work(name: str, connection: Connection, argument: Any) -> None:
    # A session of its own: a signal to one child's group reaches that child alone.
    os.setsid()
    module, _, function = name.partition(":")
    # Imported here, not above: the search process must not import torch.
    getattr(import_module(module), function)(connection, argument)
