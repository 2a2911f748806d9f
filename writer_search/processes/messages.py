"""What the search process and its children tell each other over their pipe."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data import LineSet
from writer_search.common.errors import UserError, why
from writer_search.config import TrialConfig

CONTINUE, PRUNE, STOP = "continue", "prune", "stop"


THREADS = "threads "  # and how many: what a trial may use from now on


UNDER_WAY = ("started", "progress", "report", "threads")  # messages that do not end a trial


Message = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Gpu:
    """A GPU that a process of its own has opened."""

    entry: str  # of CUDA_VISIBLE_DEVICES
    name: str
    bfloat16: bool  # in hardware


@dataclass(frozen=True)
class MachineQuestion:
    """What the search wants to know before its first trial; see `machine.answer_question`."""

    gpus: tuple[Gpu, ...]  # none: the CPU
    weights: str  # auto, imagenet or none
    backbones: tuple[str, ...] | None  # the networks; None: the tier's own
    measure: bool  # whether to find out the faster precision of each
    threads: int  # to measure with
    memory: Path | None = None  # the file that keeps what was measured


@dataclass(frozen=True)
class Job:
    """All that a trial's process needs.

    gpus: entries of CUDA_VISIBLE_DEVICES; none: the CPU.   micro_batch: images on a device at once.
    continue_from: the trial directory whose checkpoint to go on from.   ranks: processes that train
    the trial together; this is for number `rank`. They meet at `port`, where rank 0 has `listener`.
    sharing: trials that may share a GPU.
    """

    config: TrialConfig
    data: LineSet
    trial_dir: Path
    threads: int
    gpus: tuple[str, ...] = ()
    continue_from: Path | None = None
    micro_batch: int | None = None
    ranks: int = 1
    rank: int = 0
    port: int = 0
    listener: socket.socket | None = None
    sharing: int = 1
    gives_way: bool = False  # to other programs: it goes on with fewer threads where these wait

    @property
    def gpu(self) -> str | None:
        """This rank's own."""
        return self.gpus[self.rank] if self.gpus else None

    @property
    def log(self) -> Path:
        name = f"train.rank{self.rank}.log" if self.rank else "train.log"
        return self.trial_dir / name


@dataclass(frozen=True)
class TestQuestion:
    """What is to be measured on the test lines; see `child.measure_on_test`."""

    model_file: Path
    data: LineSet
    threads: int
    gpus: tuple[str, ...]  # one or none


def reply(connection: Connection, find: Callable[[], Message]) -> None:
    """Send what `find` gives, or ("mistake", …) where it raises UserError.

    This process ends with the search process meanwhile, downloads included.
    """
    try:
        obey_in_thread(connection, lambda order: None)
        message = find()
    except UserError as error:
        message = "mistake", {"cause": str(error)}
    except BlockingIOError as error:
        message = "mistake", {"cause": why(error)}
    with suppress(OSError):  # nobody waits for it any more
        connection.send(message)


def obey_in_thread(connection: Connection, act: Callable[[str], object]) -> None:
    """Act on each order in a thread; end this whole process when the search process is gone.

    Raises BlockingIOError where no thread can be started.
    """

    def listen() -> None:
        while True:
            try:
                order = connection.recv()
            except (EOFError, OSError):
                # The search process is gone, however it died: nothing is worth an epilogue.
                os.kill(os.getpid(), signal.SIGKILL)
                return
            act(order)

    try:
        threading.Thread(target=listen, daemon=True).start()
    except RuntimeError as error:
        raise BlockingIOError(errno.EAGAIN, str(error)) from None
