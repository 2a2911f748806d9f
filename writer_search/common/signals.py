"""Signals that end a search: in one place, and never in the middle of a write."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

AGAIN_SECONDS = 1.0  # one press of Ctrl-C may arrive twice: from the terminal, and from a wrapper
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(BaseException):
    """A signal asked for the end of the search; its name is the argument.

    As KeyboardInterrupt is no Exception: it may surface in any line, and a handler that expects
    anything of a damaged file must not take it for the file's fault.

    began: whether there was a search already, with something to save.   unsaved: the trials that
    did not save their last state.
    """

    def __init__(self, name: str, began: bool = False, unsaved: Sequence[int] = ()) -> None:
        super().__init__(name)
        self.began, self.unsaved = began, unsaved

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + signal.Signals[str(self)].value


class StopSignals:
    """Turns signals into the end of the search.

    Outside of `deferred`, where there is nothing to save, a signal raises Interrupted. Inside it is
    only remembered in `name`, and `wakeup` becomes readable. Of further ones only Ctrl-C, a
    person's, ends the process at once: batch systems and closing terminals send several.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._deferring = False
        self.wakeup, self._wake = socket.socketpair()

    def __enter__(self) -> StopSignals:
        self.wakeup.setblocking(False)
        self._wake.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        # SIGINT also where a script started this in the background, and so had it ignored; but
        # SIGHUP is ignored at the wish of whoever typed nohup.
        caught = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._old = {number: signal.signal(number, self._remember) for number in caught}
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._pass_over
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._old_hook
        signal.set_wakeup_fd(self._old_wakeup)
        self.wakeup.close()
        self._wake.close()

    def _pass_over(self, lost: sys.UnraisableHookArgs) -> None:
        """Say nothing of an Interrupted raised while an object was removed: `name` has it."""
        if not isinstance(lost.exc_value, Interrupted):
            self._old_hook(lost)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            if time.monotonic() < self._since + AGAIN_SECONDS:
                return
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
                os._exit(128 + number)  # the first process of a container is spared by the kernel
        else:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
        if not self._deferring:
            raise Interrupted(self.name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
