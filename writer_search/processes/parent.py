"""Child processes as the search process sees them; `child.py` is what they do.

Children are forked from a fork server that has torch imported and no device touched, so that one
starts in hundredths of a second and a broken one takes nothing with it. A pipe joins each to the
search process. Up go `(kind, content)` messages: started, progress, report, threads, done, pruned,
stopped, failed, out_of_memory, device_failed, lost. Down go the orders CONTINUE, PRUNE, STOP
and THREADS. This file imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data import LineSet
from writer_search.config import TrialConfig

CONTINUE, PRUNE, STOP = "continue", "prune", "stop"
THREADS = "threads "  # and how many: what a trial may use from now on
# What terminals send to a whole group, and batch systems to every process of a job.
FOR_THE_SEARCH = (
    *(signal.SIGINT, signal.SIGHUP, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2),
)
UNDER_WAY = ("started", "progress", "report", "threads")  # messages that do not end a trial
LAST_WORDS_SECONDS = 3.0  # between a rank's failure and the last rank that notices it
Message = tuple[str, dict[str, Any]]

SESSION_TRIES = 10  # to weigh a session
STARTS = 3  # of one process, before it is given up

_context = get_context("forkserver")


@dataclass(frozen=True)
class MachineQuestion:
    """What the search wants to know before its first trial; see `child.answer_question`."""

    device: str  # auto, cpu, cuda or cuda:N
    weights: str  # auto, imagenet or none
    backbones: tuple[str, ...] | None  # None: the tier's own
    measure: bool  # whether to find out the faster precision of each
    threads: int  # to measure with


@dataclass(frozen=True)
class Job:
    """All that a trial's process needs.

    gpus: entries of CUDA_VISIBLE_DEVICES; none: the CPU.   micro_batch: images on a device at once.
    continue_from: the trial directory whose checkpoint to go on from.   ranks: processes that train
    the trial together; this is for number `rank`. They meet at `port`, where rank 0 has `listener`.
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


class ChildProcess:
    """The search process's end of one child: a trial, or a question about the machine.

    `work` names the function to run there, as "module:function". Raises OSError where none starts.
    """

    def __init__(self, work: str, argument: Any) -> None:
        for _ in range(STARTS):
            start_fork_server()  # again, where somebody has killed it
            self.connection, theirs = _context.Pipe()
            self._process = _context.Process(target=_work, args=(work, theirs, argument))
            try:
                self._process.start()
                return
            except (
                EOFError,
                OSError,
            ):  # killed meanwhile; what it may have forked ends by its pipe
                self.connection.close()
                time.sleep(0.1)
            finally:
                theirs.close()  # otherwise the end of the child would not be the end of the pipe
        raise ChildProcessError(f"the server that starts processes died {STARTS} times in a row")

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

    def ask_where(self) -> None:
        """Let it write into its log where it is, also where it hangs; see `worker._output_to`."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGQUIT)

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


class TrialProcesses:
    """The search process's end of one trial: a process for each of its ranks.

    Rank 0 speaks for all. A rank that fails, dies or hangs is the trial's end, and its word, or how
    it died, is what `receive` gives; what the others say of its loss is passed over.
    """

    def __init__(self, job: Job, start: Callable[[str, Any], ChildProcess]) -> None:
        listener = socket.create_server(("127.0.0.1", 0)) if job.ranks > 1 else None
        port = listener.getsockname()[1] if listener is not None else 0
        self._jobs = [
            replace(job, rank=rank, port=port, listener=None if rank else listener)
            for rank in range(job.ranks)
        ]
        self._ranks: dict[int, ChildProcess] = {}  # those that have not ended
        self._started: set[int] = set()
        self._over = False  # rank 0 has said its last word
        try:
            for rank, its_job in enumerate(self._jobs):
                self._ranks[rank] = start("writer_search.processes.child:run_trial", its_job)
        except BaseException:
            self.end()
            raise
        finally:
            if listener is not None:
                listener.close()  # rank 0 has its own

    @property
    def connections(self) -> list[Connection]:
        return [child.connection for child in self._ranks.values()]

    def order(self, order: str) -> None:
        if 0 in self._ranks:
            self._ranks[0].order(order)

    def kill(self) -> None:
        for child in self._ranks.values():
            child.kill()

    def end(self) -> None:
        """Wait for the end of rank 0 that has said its last word; end the others at once."""
        for rank, child in self._ranks.items():
            child.end(10.0 if rank == 0 and self._over else 0.0)
        self._ranks.clear()

    def receive(self, connection: Connection) -> Message | None:
        """Receive a rank's message; None where it is of no account to the trial.

        ("died", …) tells that a rank ended without a word: cause, and the log that tells more.
        """
        rank = next(r for r, child in self._ranks.items() if child.connection is connection)
        message = self._hear(rank)
        if message is None or message[0] != "lost":
            return message
        return self._cause_of_loss(rank, message[1])

    def _hear(self, rank: int) -> Message | None:
        job = self._jobs[rank]
        message = self._ranks[rank].receive()
        if message is None:
            code = self._ranks.pop(rank).end()
            if rank > 0 and code == 0:
                return None  # it has followed rank 0 to the end
            if job.gpu is not None and rank not in self._started:
                return "device_failed", {"gpu": job.gpu, "cause": exit_text(code)}
            return "died", {"cause": self._named(rank, exit_text(code)), "log": job.log}
        if message[0] == "started":
            self._started.add(rank)
        elif rank == 0 and message[0] not in UNDER_WAY:
            self._over = True
        return message

    def _cause_of_loss(self, rank: int, lost: dict[str, Any]) -> Message:
        """Find the rank that the others have lost: it failed, died, or is silent where it hangs."""
        silent = {child.connection: r for r, child in self._ranks.items() if r != rank}
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while silent and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(silent), left):
                other = silent[ready]  # type: ignore[index]
                message = self._hear(other)
                if other not in self._ranks or (message and message[0] == "lost"):
                    del silent[ready]  # type: ignore[arg-type]
                if message and message[0] not in (*UNDER_WAY, "lost"):
                    return message  # also where rank 0 has ended well, and was missed for that
        for other in silent.values():
            child = self._ranks.pop(other)
            child.ask_where()
            child.end(LAST_WORDS_SECONDS)
            cause = self._named(other, "hung: the other ranks waited for it in vain")
            return "died", {"cause": cause, "log": self._jobs[other].log}
        return "failed", lost

    def _named(self, rank: int, text: str) -> str:
        return text if len(self._jobs) == 1 else f"rank {rank}: {text}"


def start_fork_server() -> None:
    """Start the fork server where none runs; it imports torch meanwhile, this returns at once."""
    _context.set_forkserver_preload(["writer_search.processes.preload"])
    here = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    with _environment(
        PYTHONPATH=os.pathsep.join([here, before] if before else [here]),
        SEARCH_PID=str(os.getpid()),
        **training_environment(os.environ),
    ):
        with _shielded():
            resource_tracker.ensure_running()
        with _shielded():  # again: starting the tracker lifts it from some signals
            forkserver.ensure_running()


def training_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Give what makes training on a CPU faster, and is read as a program starts.

    Only where `given`, the user's environment, says nothing of the same.
    """
    # A thread without work waits awake for some 0.3 ms, then sleeps. On 2 cores with 2 threads a
    # small model takes 1.4 times as long with threads that sleep at once, and with threads that
    # stay awake 2.5 times as long beside one busy process.
    waiting = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
    # The memory of one step is kept for the next: to have it from the kernel again, page by page,
    # made steps of a ResNet-18 1.04 and of a ResNet-50 1.1 to 1.3 times as long.
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    groups = (waiting, memory)
    return {k: v for own in groups if not own.keys() & given.keys() for k, v in own.items()}


def as_in_a_trial() -> None:
    """Start this program again where its environment is not the one that trials have.

    Keeps the process's number. Before the program begins its work: nothing is closed. Where it
    cannot be started again it goes on as it is.
    """
    missing = training_environment(os.environ)
    from_a_pipe = sys.argv[0] in ("", "-")  # its text is read and gone
    if missing and sys.executable and not from_a_pipe:
        with contextlib.suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, os.environ | missing)


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


def obey_in_thread(connection: Connection, act: Callable[[str], object]) -> None:
    """Act on each order in a thread; end this whole process when the search process is gone."""

    def listen() -> None:
        while True:
            try:
                order = connection.recv()
            except (EOFError, OSError):
                # The search process is gone, however it died: nothing is worth an epilogue.
                os.kill(os.getpid(), signal.SIGKILL)
                return
            act(order)

    threading.Thread(target=listen, daemon=True).start()


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
    if niceness := os.nice(0):
        weigh_session(niceness)
    module, _, function = name.partition(":")
    # Imported here, not above: the search process must not import torch.
    getattr(import_module(module), function)(connection, argument)
