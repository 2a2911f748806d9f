"""Writes synthetic lines in books: a writer's hand stays his own, and each book changes the rest.

Validation lines are of the books that training has seen, test lines of other books. What tells
books apart instead of hands does worse on the latter; on real sets, where a hand is often one
codex, nobody can tell.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from writer_search.demo import Hand, generator, make_line, sample_hand, sample_sheet

SEEN, UNSEEN = 2, 2  # books of a writer
LINES = {"train": 6, "val": 4, "test": 4}  # of a book


def hand_in_book(hand: Hand, scale: float, rng: np.random.Generator) -> Hand:
    """Change the hand as a book may: its pen, size (by up to `scale`), slant and speed.

    A quick hand joins its letters by longer strokes and keeps its line less well.
    """
    speed = rng.uniform(0.8, 1.25)
    return replace(
        hand,
        tooth=hand.tooth * rng.uniform(1 - scale, 1 + scale),
        nib_width=hand.nib_width * rng.uniform(0.7, 1.4),
        slant=hand.slant + rng.uniform(-0.08, 0.08),
        join=hand.join * speed,
        wobble=hand.wobble * speed,
        roundness=hand.roundness * speed**0.5,
    )


def write_books(root: Path, writers: int, line_height: int, scale: float, seed: int) -> None:
    """Write root/{split}/{writer}/{book}/page_1/line_1.png and so on."""
    for writer in range(1, writers + 1):
        hand = sample_hand(generator(seed, writer))
        for book in range(1, SEEN + UNSEEN + 1):
            rng = generator(seed, writer, book)
            own, sheet = hand_in_book(hand, scale, rng), sample_sheet(rng)
            for split in ("train", "val") if book <= SEEN else ("test",):
                page = root / split / f"writer_{writer:02d}" / f"book_{book}" / f"{split}_page"
                page.mkdir(parents=True)
                for line in range(LINES[split]):
                    image = make_line(own, sheet, line_height, rng)
                    image.save(page / f"line_{line + 1}.png", compress_level=1)
