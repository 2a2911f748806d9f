"""Signals in this process: what is remembered, raised, ignored."""

from __future__ import annotations

import os
import signal
import time

import pytest

from writer_search.common import signals
from writer_search.common.signals import Interrupted, StopSignals


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGTERM),  # from a batch system, and from its script
        (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM),  # a terminal that closes
        (signal.SIGUSR1, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),  # one Ctrl-C, passed on by a wrapper as well
    ],
)
def test_further_signals_break_no_saving_off(numbers: tuple[signal.Signals, ...]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    with StopSignals() as stop, stop.deferred():
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        assert stop.name == numbers[0].name


def test_interruption_that_something_swallowed_is_raised_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def be_told() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)

    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0.2)
    with StopSignals() as stop:
        with pytest.raises(Interrupted):
            be_told()
        be_told()  # at once: the same wish
        with pytest.raises(Interrupted):
            be_told()
        assert stop.name == "SIGTERM"


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert stop.name is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_while_an_object_is_removed_is_remembered_without_a_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Python can raise nothing from there: it would print a traceback."""

    class Signalling:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with StopSignals() as stop:
        Signalling()
        assert stop.name == "SIGTERM"
    assert capfd.readouterr().err == ""
