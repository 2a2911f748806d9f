"""Imported once by the fork server, before it forks its first child."""

import contextlib
import ctypes
import gc
import os
import signal

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

from writer_search.processes.fork_server import FORK_FAILED  # noqa: E402

# What keeps the server from forking has to be told: it would die with a traceback.
SERVER, real_fork = os.getpid(), os.fork
CALM_SECONDS = 2.0  # after a fork; the first is of a question, and a trial's comes soon after


def fork_or_tell() -> int:
    """Fork; where the server itself cannot, let it end with the error as its exit code."""
    is_server = os.getpid() == SERVER
    try:
        child = real_fork()
    except OSError as error:
        if is_server:
            os._exit(FORK_FAILED + (error.errno or 0))
        raise
    if is_server and child and os.environ.get("NEEDS_TORCHVISION"):
        signal.setitimer(signal.ITIMER_REAL, CALM_SECONDS)
    return child


def import_torchvision(*_: object) -> None:
    """Import what most networks need, for trials to come.

    It takes two seconds more than torch: the first trial begins without, or imports it itself.
    """
    with contextlib.suppress(Exception):  # to be told by the trial that needs it
        import torchvision  # noqa: F401


os.fork = fork_or_tell
signal.signal(signal.SIGALRM, import_torchvision)

from writer_search.processes import child  # noqa: E402, F401  (with torch; touches no device)

gc.freeze()
gc.enable()
