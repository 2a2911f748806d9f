"""What a command needs of the place it runs in, before it begins."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from writer_search.common.errors import UserError

# Bytes of the longest path that SQLite opens, and what a search's databases have below its
# directory, a journal beside them included.
LONGEST_PATH = 512
LONGEST_NAME = "/confirm/.recovery/optuna_study.db-journal"


def open_standard_streams() -> None:
    """Open /dev/null on standard input, output and error where they are closed, as daemons have it.

    Otherwise the next files that are opened get their numbers, and somebody's messages.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w")  # noqa: SIM115


def require_directories() -> None:
    """Raise UserError where there is no working directory, or none for temporary files."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working directory is gone: change to one that exists") from None
    try:
        tempfile.gettempdir()
    except OSError:
        raise UserError(
            "no directory for temporary files can be written: set TMPDIR to one that can"
        ) from None


def require_short_path(directory: Path) -> None:
    """Raise UserError for a directory whose path is too long for a database in it."""
    length = len(os.fsencode(os.path.realpath(directory)))
    most = LONGEST_PATH - len(LONGEST_NAME)
    if length > most:
        raise UserError(
            f"--checkpoint_dir: its path has {length} bytes, and SQLite opens no database where it "
            f"has more than {most}: give a shorter one"
        )
