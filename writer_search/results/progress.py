"""What a running search shows: a line that is rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from writer_search.common.output import live, terminal_columns
from writer_search.common.text import duration, epoch_value, percent, short_duration
from writer_search.results.estimate import Range, range_text

REFRESH_SECONDS = 0.1


@dataclass(frozen=True)
class EpochFacts:
    """What an epoch has brought, and how the search stands after it. Values are fractions.

    best: value and number of the best trial, one that runs included.   left: seconds.
    network: the value of a network without the descriptor beside it.
    """

    loss: float
    value: float
    best: tuple[float, int] | None
    seconds: float
    left: Range | None
    network: float | None = None

    def line(self) -> str:
        best = (
            "none yet" if self.best is None else f"{percent(self.best[0])} (trial {self.best[1]})"
        )
        return (
            f"loss {self.loss:.3f} | {epoch_value(self.value, self.network)} | best {best} | "
            f"{duration(self.seconds)} | left {range_text(self.left)}"
        )


@dataclass
class _Running:
    """A trial as it is shown."""

    epochs: int
    done: float = 0.0
    value: float | None = None


class Progress:
    """Shows trials and their epochs. One process prints all, so that nothing is torn."""

    def __init__(self, complete: int, n_trials: int) -> None:
        self._complete, self._n_trials = complete, n_trials
        self._running: dict[int, _Running] = {}
        self._facts: EpochFacts | None = None  # the last ones
        self._shown = 0.0  # when, by time.monotonic()

    def line(self, text: str) -> None:
        """Print a line; on a terminal, above the one that is rewritten."""
        live.make_way()
        print(text, flush=True)
        self._show()

    def start(self, number: int, epochs: int) -> None:
        """Tell a trial's start.   epochs: at most"""
        self._running[number] = _Running(epochs)
        self._show()

    def advance(self, number: int, epochs: float) -> None:
        """Tell how far a running trial is: epochs done, with a fraction."""
        self._running[number].done = epochs
        if time.monotonic() - self._shown > REFRESH_SECONDS:
            self._show()

    def epoch(self, number: int, epoch: int, epochs: int, facts: EpochFacts) -> None:
        """Tell an epoch's end: in a line, where none is rewritten."""
        self._running[number] = _Running(epochs, epoch, facts.value)
        self._facts = facts
        if terminal_columns():
            self._show()
        else:
            self.line(f"trial {number:3d} | epoch {epoch:2d}/{epochs} | {facts.line()}")

    def end(self, number: int, facts: str, complete: int) -> None:
        """Tell a trial's end; it may not even have been started."""
        self._running.pop(number, None)
        self._complete = complete
        self.line(f"trial {number:3d} | {facts}")

    def close(self) -> None:
        self._running.clear()
        live.make_way()

    def _show(self) -> None:
        columns = terminal_columns()
        if columns and self._running:
            self._shown = time.monotonic()
            live.show(self.lines(columns))

    def lines(self, columns: int) -> list[str]:
        """Give what is shown in so many columns: one line, or one more for each of several trials.

        What is too long loses what matters least: the count of trials, then fractions and words.
        """
        ways = [(True, 2), (False, 2), (False, 1), (False, 0)]
        if len(self._running) == 1:
            lines = [[" | ".join([*self._trials(w)[0], *self._search(a, w)])] for a, w in ways]
        else:
            lines = [
                [*(" | ".join(trial) for trial in self._trials(w)), " | ".join(self._search(a, w))]
                for a, w in [(True, 2), *ways]
            ]
        return next((ls for ls in lines if max(map(len, ls)) < columns), lines[-1])

    def _trials(self, words: int) -> list[list[str]]:
        return [
            [
                f"trial {number}",
                f"epoch {trial.done:.{int(words == 2)}f}/{trial.epochs}",
                *([] if trial.value is None else [f"val {percent(trial.value)}"]),
            ]
            for number, trial in sorted(self._running.items())
        ]

    def _search(self, with_count: bool, words: int) -> list[str]:
        parts = []
        if self._facts is not None and self._facts.best is not None:
            value, number = self._facts.best
            parts.append(f"best {percent(value)} ({'trial ' if words == 2 else ''}{number})")
        if with_count or not self._facts:
            parts.append(f"{self._complete}/{self._n_trials} complete")
        if self._facts is not None and self._facts.left is not None:
            low, high = (short_duration(seconds) for seconds in self._facts.left)
            parts.append(f"left {high}" if low == high or not words else f"left {low}-{high}")
        return parts
