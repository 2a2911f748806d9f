"""Child processes as the search process sees them; `child.py` is what they do.

Children are forked from a fork server that has torch imported and no device touched, so that one
starts in hundredths of a second and a broken one takes nothing with it. A pipe joins each to the
search process. Up go `(kind, content)` messages: started, progress, report, threads, done, pruned,
stopped, failed, device_failed, device_fault, lost, died. Down go the orders CONTINUE, PRUNE, STOP
and THREADS. This file imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.process
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from writer_search.common.errors import LIMITS, why
from writer_search.common.place import spare_files
from writer_search.common.text import one_line
from writer_search.processes.causes import Cause, Kind
from writer_search.processes.fork_server import (
    FORK_FAILED,
    _context,
    _work,
    in_some_directory,
    server_exit_code,
    start_fork_server,
)
from writer_search.processes.messages import UNDER_WAY, Job, Message

UNKILLABLE_SECONDS = 10.0  # after SIGKILL, before a process is left to the kernel
IMPORT_SECONDS = 120.0  # that the fork server may take for torchvision, from a disk that is far
LAST_WORDS_SECONDS = 3.0  # between a rank's failure and the last rank that notices it

# What `fork` may say. The server's exit code may be another: Python's own is 120 at times.
OF_FORK = {errno.EAGAIN, errno.ENOMEM, errno.ENOSYS, errno.EPERM}
STARTS = 3  # of one process, before it is given up


class ChildProcess:
    """The search process's end of one child: a trial, or a question about the machine.

    `work` names the function to run there, as "module:function". Raises OSError where none starts.
    """

    def __init__(self, work: str, argument: Any) -> None:
        for _ in range(STARTS):
            try:
                start_fork_server()  # again, where somebody has killed it
                self._start(work, argument)
                return
            except (EOFError, OSError) as error:
                time.sleep(0.1)
                cause = _cause_of_no_start(error, server_exit_code())
                if cause.errno in LIMITS:  # another try would hide it
                    break
        raise OSError(cause.errno, f"no process can be started: {why(cause)}")

    def _start(self, work: str, argument: Any) -> None:
        """Let the fork server start it. Raises OSError, EOFError where the server is killed."""
        with spare_files():  # as many as it takes: the server dies of a start that is broken off
            pass
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_work, args=(work, theirs, argument))
        try:
            with in_some_directory():
                self._process.start()
        except BaseException:
            self.connection.close()  # what may have been forked ends by it
            raise
        finally:
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

    def ask_where(self) -> None:
        """Let it write into its log where it is, also where it hangs; see `child._output_to`."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGQUIT)

    def end(self, seconds: float = 10.0) -> int | None:
        """Wait for the child's end, killing it after `seconds`; give its exit code (-signal).

        None where it does not end even so: it hangs in a driver, and the kernel ends it afterwards.
        """
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(UNKILLABLE_SECONDS)
        if self._process.exitcode is None and _has_ended(self.pid):
            # The fork server, which alone learns how, has been importing something for so long.
            self._process.join(IMPORT_SECONDS)
        self.connection.close()
        code = self._process.exitcode
        if code is None:  # this program's own end is not to wait for it either
            multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]
            return None
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
            kind = Kind.KILLED if code == -signal.SIGKILL else Kind.OTHER
            how = f"{exit_text(code)}{_last_words(job.log)}" if (code or 0) > 0 else exit_text(code)
            cause = Cause(kind, self._named(rank, how))
            # NCCL ends a rank that has waited for another one for too long.
            was_waiting = code == -signal.SIGABRT and len(self._jobs) > 1
            return "lost" if was_waiting else "died", {"cause": cause, "log": job.log}
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
            hung = self._named(other, "hung: the other ranks waited for it in vain")
            return "died", {"cause": Cause(Kind.OTHER, hung), "log": self._jobs[other].log}
        return "died" if "log" in lost else "failed", lost

    def _named(self, rank: int, text: str) -> str:
        return text if len(self._jobs) == 1 else f"rank {rank}: {text}"


def _has_ended(pid: int) -> bool:
    """Tell whether a process is gone but for the news of its end."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in ("Z", "X")


def _last_words(log: Path) -> str:
    """Quote the last line of a log, as a library leaves it that ends the process."""
    try:
        lines = log.read_text(errors="backslashreplace").split("\n")
    except OSError:
        return ""
    said = [line for line in lines if line.strip()]
    return f" ({log.name} ends: {one_line(said[-1], 200)})" if said else ""


def _cause_of_no_start(error: EOFError | OSError, code: int | None) -> OSError:
    """Say why no process has started.   code: the fork server's exit code, where it has died."""
    if isinstance(error, OSError) and code is None:
        return error
    if code is not None and code - FORK_FAILED in OF_FORK:
        return OSError(code - FORK_FAILED, os.strerror(code - FORK_FAILED))
    how = "died" if code is None else exit_text(code)
    return ChildProcessError(errno.ECHILD, f"the server that starts them: {how}")


def exit_text(code: int | None) -> str:
    """Say how a process that left no word ended."""
    if code is None:
        return "did not end, even after SIGKILL: it probably hangs in a driver"
    if code == -signal.SIGKILL:
        return "killed by SIGKILL (by hand, or by the system's out-of-memory killer)"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code} without a word"
