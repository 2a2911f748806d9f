"""What a command needs of the place it runs in, before it begins."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from writer_search.common.errors import UserError, require_working_directory
from writer_search.common.locks import refuse_if_in_use

# Bytes of the longest path that SQLite opens, and what a search's databases have below its
# directory, a journal beside them included.
LONGEST_PATH = 512
LONGEST_NAME = "/confirm/.recovery/optuna_study.db-journal"
SPARE_FILES = 8


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


@contextmanager
def spare_files() -> Iterator[Callable[[], OSError | None]]:
    """Hold files open; gives what closes them, to record by where no more can be opened.

    That gives the system's word where none could be opened before.
    """
    with ExitStack() as spare:
        for _ in range(SPARE_FILES):
            spare.enter_context(open(os.devnull))

        def free() -> OSError | None:
            shortage = None
            try:
                os.close(os.open(os.devnull, os.O_RDONLY))
            except OSError as error:
                shortage = OSError(error.errno, error.strerror)
            spare.close()
            return shortage

        yield free


def require_directories() -> None:
    """Raise UserError where there is no working directory, or none for temporary files."""
    require_working_directory()
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
            f"--checkpoint_dir: its path has {length} bytes, and SQLite allows {most} here: "
            "give a shorter one"
        )


def check_checkpoint_dir(directory: Path) -> None:
    """Raise UserError when the directory cannot hold a search; creates nothing."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--checkpoint_dir {directory}: {existing} is a file, not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--checkpoint_dir {directory} cannot be written: no permission")
    require_short_path(directory)
    refuse_if_in_use(directory)


def keep_apart(checkpoint_dir: Path, data_root: Path) -> None:
    """Raise UserError where a search would write between the line images, or be read for them.

    A directory of writers may be a link; what is below it belongs to the line images as well.
    """
    own = {Path(os.path.abspath(checkpoint_dir)), Path(os.path.realpath(checkpoint_dir))}
    lines = {Path(os.path.abspath(data_root)), Path(os.path.realpath(data_root))}
    linked = {Path(os.path.realpath(link)) for link in _links_below(data_root)}
    if any(path.is_relative_to(place) for path in own for place in lines | linked):
        raise UserError(
            f"--checkpoint_dir {checkpoint_dir} lies within the line images, --data_root "
            f"{data_root}: give a directory outside of them"
        )
    for place in lines:
        for path in own:
            below = place.relative_to(path).parts if place.is_relative_to(path) else ()
            if below and re.fullmatch(r"trial_\d+|summary|confirm|\.recovery", below[0]):
                raise UserError(
                    f"--data_root {data_root} lies in {path / below[0]}, where the search writes: "
                    "give another --checkpoint_dir"
                )


def _links_below(data_root: Path) -> list[Path]:
    """Find the directories that are links, where splits and writers are."""
    try:
        return [
            path
            for pattern in ("*", "*/*")
            for path in data_root.glob(pattern)
            if path.is_symlink() and path.is_dir()
        ]
    except OSError:  # told by whoever reads the lines
        return []
