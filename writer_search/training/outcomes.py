"""How a training may end before its time."""

from __future__ import annotations


class Pruned(Exception):
    """Raised by `report`: the trial is not worth finishing."""


class Stopped(Exception):
    """Raised by `check`: the trial is to save its state and end."""


class DivergedError(Exception):
    """The loss or the model's output is not finite: what, and in which epoch if that is known."""

    def __init__(self, what: str, epoch: int | None = None) -> None:
        super().__init__(what if epoch is None else f"{what} in epoch {epoch}")
        self.what, self.epoch = what, epoch
