"""Imported once by the fork server, before it forks its first child."""

import ctypes
import os
import signal

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


def fork_or_tell() -> int:
    """Fork; where the server itself cannot, let it end with the error as its exit code."""
    try:
        return real_fork()
    except OSError as error:
        if os.getpid() == SERVER:
            os._exit(FORK_FAILED + (error.errno or 0))
        raise


os.fork = fork_or_tell

from writer_search.processes import child  # noqa: E402, F401  (with torch; touches no device)
