"""Deletes the weights that nobody needs any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from writer_search.results.rows import UNFINISHED, Row, best_first, is_resumable, trial_dir


def remove_weights(
    checkpoint_dir: Path,
    rows: Sequence[Row],
    kept: int,
    running: Collection[int],
    removed: set[int],
) -> None:
    """Delete the weights of finished trials that are not among the best `kept`.

    A trial that is worth going on with keeps its own until one that continues it has ended by
    itself. `removed` holds the trials that have none any more, and grows: what is not needed once
    is never needed again.
    """
    needed = {row.number for row in best_first(rows)[:kept]} | set(running)
    resumable = {row.number for row in rows if is_resumable(row.attributes)}
    for row in reversed(rows):  # a trial that is continued stands before the one that continues it
        if row.state not in UNFINISHED and row.number not in resumable:
            resumable.discard(row.attributes.get("continues"))
    needed |= resumable
    needed |= removed
    for row in rows:
        if row.state not in UNFINISHED and row.number not in needed:
            for weights in trial_dir(checkpoint_dir, row.number).glob("*.pth"):
                weights.unlink(missing_ok=True)
            removed.add(row.number)
