"""The fork server, which imports torch once, and what every child does first."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from multiprocessing import current_process, forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_executable, get_preparation_data
from multiprocessing.util import is_abstract_socket_namespace
from pathlib import Path
from typing import Any

from writer_search.common.environment import _environment, training_environment

# What terminals send to a whole group, and batch systems to every process of a job.
FOR_THE_SEARCH = (
    *(signal.SIGINT, signal.SIGHUP, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2),
)


SESSION_TRIES = 10  # to weigh a session
IMPORT_TORCHVISION = signal.SIGALRM  # to the server
FORK_FAILED = 100  # the server's exit code where it could not fork, and the number of the error


_context = get_context("forkserver")


def start_fork_server() -> None:
    """Start the fork server where none runs; it imports torch meanwhile, this returns at once.

    Raises OSError.
    """
    _leave_unreachable_server()
    if forkserver._forkserver._forkserver_pid is None or server_exit_code() is not None:  # type: ignore[attr-defined]
        _require_interpreter()
    _keep_directory_for_socket()
    _context.set_forkserver_preload(["writer_search.processes.preload"])
    here = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    with _environment(
        PYTHONPATH=os.pathsep.join([here, before] if before else [here]),
        # Not from the working directory, which may hold a data.py or a train.py of the user's own.
        PYTHONSAFEPATH="1",
        SEARCH_PID=str(os.getpid()),
        SEARCH_MAIN=_command_file(),
        **training_environment(os.environ),
    ):
        with _shielded():
            resource_tracker.ensure_running()
        with _shielded(), in_some_directory():  # again: the tracker's start lifts it from some
            forkserver.ensure_running()


def _command_file() -> str:
    """Give the file that each child would run, as multiprocessing has it."""
    with in_some_directory():
        return str(get_preparation_data("").get("init_main_from_path", ""))


def preload_torchvision() -> None:
    """Let the server import torchvision for trials to come; this returns at once.

    It starts no other process meanwhile: to be called when the trials that can run do.
    """
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if server is not None:
        with contextlib.suppress(ProcessLookupError):  # the next one does without
            os.kill(server, IMPORT_TORCHVISION)


def _require_interpreter() -> None:
    """Raise OSError where Python cannot be started: multiprocessing would not notice."""
    interpreter = os.fsdecode(get_executable())
    os.stat(interpreter)
    if not os.access(interpreter, os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), interpreter)


def _leave_unreachable_server() -> None:
    """Forget the server whose socket somebody has removed, as those do who tidy /tmp.

    It stays, and tells how its children end: the file that keeps it alive is not closed.
    """
    server: Any = forkserver._forkserver
    address = server._forkserver_address
    is_no_file = is_abstract_socket_namespace(address)  # Python 3.11.0
    if server._forkserver_pid is None or is_no_file or os.path.exists(address):
        return
    server._forkserver_pid = server._forkserver_alive_fd = server._forkserver_address = None


def _keep_directory_for_socket() -> None:
    """Make the directory that multiprocessing would make, and fail to remove where it is gone."""
    kept = current_process()._config  # type: ignore[attr-defined]
    if not os.path.isdir(kept.get("tempdir", "")):
        if not os.path.isdir(tempfile.gettempdir()):
            tempfile.tempdir = None  # another one is sought
        kept["tempdir"] = tempfile.mkdtemp(prefix="pymp-")
        atexit.register(shutil.rmtree, kept["tempdir"], ignore_errors=True)


def server_exit_code() -> int | None:
    """Give the exit code (-signal) of a fork server that has died; None where it runs."""
    server: Any = forkserver._forkserver
    try:
        ended = os.waitid(os.P_PID, server._forkserver_pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (ChildProcessError, TypeError):  # it has none
        return None
    if ended is None:
        return None
    return int(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)


@contextlib.contextmanager
def in_some_directory() -> Iterator[None]:
    """Be in a directory that exists while a process is started, which begins there.

    For a working directory that was deleted. This process goes back to it: otherwise relative
    paths, which lead nowhere now, would lead elsewhere.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        gone = os.open(".", os.O_PATH)
        os.chdir("/")
        try:
            yield
        finally:
            os.fchdir(gone)
            os.close(gone)
    else:
        yield


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
