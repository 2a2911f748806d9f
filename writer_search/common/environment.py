"""The environment that a training runs in."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping

_replaced: dict[str, str | None] = {}  # what the user had given of what this program has set


def count_in_utc() -> None:
    """Let local time be UTC in this process, and in what it starts from now on.

    Optuna's trials carry naive local times: where an hour comes twice, in autumn, or the time zone
    changes, they are wrong by an hour. All times in files are UTC.
    """
    if os.environ.get("TZ") != "UTC":
        _replaced["TZ"] = os.environ.get("TZ")
        os.environ["TZ"] = "UTC"
        time.tzset()


def users_environment() -> dict[str, str]:
    """Give the environment for the user's own commands: the one that this program was given."""
    given = {**os.environ, **_replaced}
    return {name: value for name, value in given.items() if value is not None}


def training_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Give what makes training on a CPU faster, and is read as a program starts.

    Only where `given`, the user's environment, says nothing of the same.
    """
    # The memory of one step is kept for the next: to have it from the kernel again, page by page,
    # made steps of a ResNet-18 1.04 and of a ResNet-50 1.1 to 1.3 times as long.
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    return {} if memory.keys() & given.keys() else memory


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
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a program that is started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
