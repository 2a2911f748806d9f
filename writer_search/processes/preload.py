"""Imported once by the fork server, before it forks its first child."""

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import sys
from types import TracebackType

import __main__

# What is imported stays: to look for garbage in it meanwhile takes a tenth of the time.
gc.disable()

# Where the search process dies while this one imports torch, which takes seconds: it would notice
# only afterwards. The kernel ends it; its children do not inherit that, they watch their pipes.
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.environ.get("SEARCH_PID") != str(os.getppid()):
    os._exit(1)  # it is dead already

# Out of the terminal's process group: a signal to the group is for the search process, which tells
# its trials. A fork server that died of it would take the news of its children's ends along.
os.setsid()

from writer_search.processes.fork_server import FORK_FAILED, IMPORT_TORCHVISION  # noqa: E402

# What keeps the server from forking has to be told: it would die with a traceback.
SERVER, real_fork = os.getpid(), os.fork


def fork_or_tell() -> int:
    """Fork; where the server itself cannot, let it end with the error as its exit code."""
    try:
        return real_fork()
    except OSError as error:
        if os.getpid() == SERVER:
            os._exit(FORK_FAILED + (error.errno or 0))
        raise


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, but not of a message that ends within: the search died as it sent it."""
    if not issubclass(kind, EOFError | pickle.UnpicklingError):
        sys.__excepthook__(kind, error, trace)


def import_torchvision(*_: object) -> None:
    """Import it for trials to come, when the search says so.

    With torch it would take two seconds more, for which the first trial would wait.
    """
    with contextlib.suppress(Exception):  # to be told by the trial that needs it
        import torchvision  # noqa: F401


os.fork = fork_or_tell
sys.excepthook = tell
signal.signal(IMPORT_TORCHVISION, import_torchvision)

from writer_search.processes import child  # noqa: E402, F401  (with torch; touches no device)

# Each child would run the command's file anew, for a tenth of a second: nothing there is for it.
if command := os.environ.get("SEARCH_MAIN"):
    __main__.__file__ = command

gc.freeze()
gc.enable()
