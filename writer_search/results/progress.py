"""What a running search shows: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total} epochs{postfix}"
ALL_BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} complete{postfix}"


class Progress:
    """Shows trials and their epochs. One process prints all, so that nothing is torn."""

    def __init__(self, complete: int, n_trials: int, epochs: int) -> None:
        self._epochs = epochs
        columns = shutil.get_terminal_size((0, 0)).columns
        self._on_terminal = sys.stderr.isatty() and sys.stdout.isatty() and columns > 0
        self._bars: dict[int, Any] = {}
        self._all = tqdm(
            total=n_trials,
            initial=complete,
            desc="trials",
            bar_format=ALL_BAR,
            disable=not self._on_terminal,
            dynamic_ncols=True,
            leave=False,
        )

    def line(self, text: str) -> None:
        """Print a line above the bars, or just a line."""
        if self._on_terminal:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def start(self, number: int) -> None:
        self._bars[number] = tqdm(
            total=self._epochs,
            desc=f"trial {number:3d}",
            bar_format=BAR,
            disable=not self._on_terminal,
            dynamic_ncols=True,
            leave=False,
        )

    def advance(self, number: int, epochs: float) -> None:
        """Move a running trial's bar: epochs done, with a fraction."""
        bar = self._bars[number]
        bar.n = min(epochs, self._epochs)
        bar.refresh()

    def epoch(self, number: int, epoch: int, epochs: int, facts: str) -> None:
        """Tell an epoch's end: in the bar, or in a line where there is no bar."""
        if self._on_terminal:
            self._bars[number].total = epochs
            self._bars[number].set_postfix_str(facts, refresh=False)
            self.advance(number, epoch)
        else:
            self.line(f"trial {number:3d} | epoch {epoch:2d}/{epochs} | {facts}")

    def end(self, number: int, facts: str, complete: int) -> None:
        """Tell a trial's end and take its bar away."""
        self._bars.pop(number).close()
        self.line(f"trial {number:3d} | {facts}")
        self._all.n = complete
        self._all.refresh()

    def close(self) -> None:
        for bar in [*self._bars.values(), self._all]:
            bar.close()
        self._bars.clear()
