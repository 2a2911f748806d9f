"""Reads whom a trial takes for whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Pairs = list[tuple[int, int, int]]


def confusion_of(metrics: Mapping[str, Any]) -> tuple[list[str], Pairs]:
    """Give the writers' names, and (true writer, guessed writer, lines) where there are lines.

    Raises ValueError where it is not recorded, or makes no sense.
    """
    try:
        recorded = metrics["confusion"]
        names = [str(name) for name in recorded["writers"]]
        if "counts" in recorded:  # an earlier version's table
            rows = recorded["counts"]
            if [len(row) for row in rows] != [len(names)] * len(names):
                raise ValueError("it is not square")
            found = [(t, g, int(n)) for t, row in enumerate(rows) for g, n in enumerate(row) if n]
        else:
            found = [(int(true), int(guessed), int(n)) for true, guessed, n in recorded["pairs"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"no confusion of writers: {error}") from None
    known = range(len(names))
    if not all(true in known and guessed in known and n > 0 for true, guessed, n in found):
        raise ValueError("no confusion of writers: of writers without a name")
    return names, found
