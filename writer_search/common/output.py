"""What is printed: streams that outlast their reader, steps with their times, live lines."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from writer_search.common.text import duration


class _Lasting:
    """A stream that outlasts its reader: what nobody can read any more is not worth a search."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # not a notebook's
            self._stream.reconfigure(errors="backslashreplace")  # file names may hold anything

    def write(self, text: str) -> int:
        live.make_way()
        try:
            self._stream.write(text)
        except OSError as error:
            self._outlast(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._outlast(error)

    def _outlast(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):  # as another program at the same end set it
            os.set_blocking(self._stream.fileno(), True)
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let no closed pipe or terminal, and no full disk behind a log, end the program.

    What is printed meanwhile, by whomever, goes above the live lines.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)
    try:
        yield
    finally:
        live.drop()
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def terminal_columns() -> int:
    """Give the width of the terminal that both streams lead to; 0 where they do not."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()) or os.environ.get("TERM") == "dumb":
        return 0
    return shutil.get_terminal_size((0, 0)).columns


def wrapped(parts: Sequence[str], between: str, indent: int = 0) -> list[str]:
    """Join parts into lines as wide as the terminal but for an indent; into one off a terminal."""
    columns = (terminal_columns() or 10**9) - indent
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}{between}{part}" if lines[-1] else part
        if len(longer) + len(between.rstrip()) < columns or not lines[-1]:
            lines[-1] = longer
        else:
            lines[-1] += between.rstrip()
            lines.append(part)
    return lines


class Live:
    """What stands at the end of the output for now.

    On a terminal, lines that are rewritten in place. Elsewhere, the beginning of a line: a step
    that is under way, whose time follows when it is done.
    """

    def __init__(self) -> None:
        self._lines = 0  # that stand on the terminal
        self._is_open = False  # a line has begun, off a terminal
        self._step: tuple[str, float] | None = None  # its name, and when it began

    def show(self, lines: Sequence[str]) -> None:
        """Put lines, on a terminal alone, in the place of those that stand there."""
        columns = terminal_columns()
        if not columns:
            return
        erasing, self._lines = self._erasing(), 0
        if rows := shutil.get_terminal_size((0, 0)).lines:
            lines = lines[-max(1, rows - 1) :]  # what has scrolled away could not be overwritten
        # Nor could a line that wraps.
        sys.stderr.write(erasing + "\n".join(line[: columns - 1] for line in lines))
        sys.stderr.flush()
        self._lines = len(lines)

    def make_way(self) -> None:
        """Take away what stands there, for something that stays."""
        if self._lines:
            erasing, self._lines = self._erasing(), 0
            sys.stderr.write(erasing)
            sys.stderr.flush()
        if self._is_open:
            self._is_open = False
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _erasing(self) -> str:
        if not self._lines:
            return ""
        up = f"\x1b[{self._lines - 1}A" if self._lines > 1 else ""
        return f"\r{up}\x1b[J"

    # -------------------------------------------------------------------------------------- steps

    def begin(self, step: str) -> None:
        """Say what is being done from now on; ends the step before."""
        if self._step is not None and self._step[0] == step:
            return
        self.end()
        self._step = step, time.monotonic()
        if terminal_columns():
            self.show([f"{step} ..."])
        else:
            sys.stdout.write(f"{step} ...")
            sys.stdout.flush()
            self._is_open = True

    def end(self) -> None:
        """Say how long the step took."""
        if self._step is None:
            return
        (step, began), self._step = self._step, None
        took = duration(time.monotonic() - began)
        if self._is_open:
            self._is_open = False
            sys.stdout.write(f" {took}\n")
        else:
            print(f"{step} ... {took}")
        sys.stdout.flush()

    def drop(self) -> None:
        """Forget the step under way: something else has ended it."""
        self._step = None
        self.make_way()


live = Live()
