"""Copies of a state's tensors, to be written while the training goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


class TensorCopies:
    """Copies tensors into memory that each copy uses again: new memory takes ten times as long.

    source: the device that they are on. From a GPU they come in one go into page-locked memory,
    while the training goes on, and are there when `wait` returns. on_host: where the copies are.
    """

    def __init__(self, source: torch.device, *, on_host: bool) -> None:
        self._source, self._on_host = source, on_host
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._events: list[torch.cuda.Event] = []

    @torch.inference_mode(False)  # a validation may be under way, the next copy in none
    @torch.no_grad()
    def take(self, contents: dict[Any, Any]) -> dict[Any, Any]:
        """Give dictionaries within dictionaries with their tensors copied, all else as it is."""
        if self._source.type != "cuda":
            return self._taken(contents, ())  # type: ignore[no-any-return]
        with torch.cuda.device(self._source):
            self._events = [_event(), _event()]
            self._events[0].record()
            taken: dict[Any, Any] = self._taken(contents, ())
            self._events[1].record()
        return taken

    def _taken(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, dict):
            return {key: self._taken(item, (*place, key)) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        copy = self._copies.get(place)
        if copy is None or copy.shape != value.shape:
            device = CPU if self._on_host else value.device
            pinned = self._on_host and value.is_cuda
            copy = torch.empty_like(value, device=device, pin_memory=pinned, requires_grad=False)
            self._copies[place] = copy
        return copy.copy_(value, non_blocking=True)

    def wait(self) -> float:
        """Wait until the copies are there; give the seconds that a GPU spent on them."""
        if not self._events:
            return 0.0
        before, after = self._events
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000


def _event() -> torch.cuda.Event:
    """Make an event that is waited for asleep."""
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
