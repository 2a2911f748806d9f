"""Copies of a state's tensors, to be written while the training goes on.

The copies of a state lie in one memory for each type of number. So a checkpoint is a few large
tensors and a text that tells which part is which: to pickle the 300 tensors of a small network one
by one takes longer than to write them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")

Place = tuple[Any, ...]  # keys of dictionaries within dictionaries


class TensorCopies:
    """Copies tensors into memory that each copy uses again: new memory takes ten times as long.

    source: the device that they are on. From a GPU they come in one go into page-locked memory,
    while the training goes on, and are there when `wait` returns. on_host: where the copies are.
    """

    def __init__(self, source: torch.device, *, on_host: bool) -> None:
        self._source, self._on_host = source, on_host
        self._copies: dict[Place, Tensor] = {}
        self._memory: dict[str, Tensor] = {}
        self._layout = ""
        self._events: list[torch.cuda.Event] = []

    @torch.inference_mode(False)  # a validation may be under way, the next copy in none
    @torch.no_grad()
    def take(self, contents: dict[Any, Any]) -> dict[Any, Any]:
        """Give dictionaries within dictionaries with their tensors copied, all else as it is."""
        found = dict(_tensors(contents))
        if not _are_alike(found, self._copies):
            self._allocate(found)
        if self._source.type != "cuda":
            self._fill(found)
        else:
            with torch.cuda.device(self._source):
                self._events = [_event(), _event()]
                self._events[0].record()
                self._fill(found)
                self._events[1].record()
        return _filled(contents, self._copies)

    def _allocate(self, tensors: dict[Place, Tensor]) -> None:
        """Make memory for copies of tensors like these, with the same strides."""
        layout: list[tuple[Any, ...]] = []
        sizes: dict[torch.dtype, int] = {}
        for place, tensor in tensors.items():
            start = sizes.get(tensor.dtype, 0)
            sizes[tensor.dtype] = start + tensor.numel()
            strides = torch.empty_like(tensor, device="meta").stride()
            layout.append((place, _name(tensor.dtype), tensor.shape, strides, start))
        self._memory = {_name(dtype): self._room(dtype, size) for dtype, size in sizes.items()}
        self._layout = json.dumps(layout)
        self._copies = _parts(self._memory, self._layout)

    def _room(self, dtype: torch.dtype, size: int) -> Tensor:
        # What has the same size already is kept: a small tensor may change its shape at each copy.
        memory = self._memory.get(_name(dtype))
        if memory is not None and memory.numel() == size:
            return memory
        device = CPU if self._on_host else self._source
        pinned = self._on_host and self._source.type == "cuda"
        return torch.empty(size, dtype=dtype, device=device, pin_memory=pinned)

    def _fill(self, tensors: dict[Place, Tensor]) -> None:
        for place, tensor in tensors.items():
            self._copies[place].copy_(tensor, non_blocking=True)

    def packed(self, taken: dict[Any, Any]) -> dict[Any, Any]:
        """Give what `take` gave last with its tensors as their memory, for `unpacked`."""
        return {**_without_tensors(taken), "memory": self._memory, "layout": self._layout}

    def wait(self) -> float:
        """Wait until the copies are there; give the seconds that a GPU spent on them."""
        if not self._events:
            return 0.0
        before, after = self._events
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000


def unpacked(contents: dict[Any, Any]) -> dict[Any, Any]:
    """Give what was packed; anything else, such as what earlier versions saved, as it is."""
    if "layout" not in contents:
        return contents
    plain = dict(contents)
    parts = _parts(plain.pop("memory"), plain.pop("layout"))
    return _filled(plain, parts)


def _parts(memory: dict[str, Tensor], layout: str) -> dict[Place, Tensor]:
    return {
        tuple(place): memory[dtype].as_strided(shape, strides, start)
        for place, dtype, shape, strides, start in json.loads(layout)
    }


def _tensors(contents: dict[Any, Any], place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    for key, value in contents.items():
        if isinstance(value, Tensor):
            yield (*place, key), value
        elif isinstance(value, dict):
            yield from _tensors(value, (*place, key))


def _without_tensors(contents: dict[Any, Any]) -> dict[Any, Any]:
    return {
        key: _without_tensors(value) if isinstance(value, dict) else value
        for key, value in contents.items()
        if not isinstance(value, Tensor)
    }


def _filled(contents: dict[Any, Any], tensors: dict[Place, Tensor]) -> dict[Any, Any]:
    """Give the contents with these tensors in their places."""
    filled = _without_tensors(contents)
    for place, tensor in tensors.items():
        inner = filled
        for key in place[:-1]:
            inner = inner.setdefault(key, {})
        inner[place[-1]] = tensor
    return filled


def _are_alike(tensors: dict[Place, Tensor], others: dict[Place, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        tensor.shape == others[place].shape and tensor.dtype == others[place].dtype
        for place, tensor in tensors.items()
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _event() -> torch.cuda.Event:
    """Make an event that is waited for asleep."""
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
