"""How sure a measured accuracy is: intervals by resampling pages within writers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from writer_search.training.metrics import guess_pages, in_top5

RESAMPLES = 2000
SEED = 0
PERCENTILES = (2.5, 97.5)
INTERVAL_METHOD = (
    f"95 % percentile bootstrap: {RESAMPLES} resamples of pages within writers, one less than a "
    f"writer has, seed {SEED}"
)


@dataclass(frozen=True)
class Pages:
    """What a model got right on each page, all (pages,).

    labels: the writer's number.   lines: how many.   right, top5: how many of them were right at
    the first guess, and within five (None with five writers or fewer).   page_right: 0 or 1.
    """

    labels: NDArray[np.int64]
    lines: NDArray[np.int64]
    right: NDArray[np.int64]
    top5: NDArray[np.int64] | None
    page_right: NDArray[np.int64]


def count_pages(
    logits: NDArray[np.float64], labels: NDArray[np.int64], pages: NDArray[np.int64]
) -> Pages:
    """Count what is right by page.   logits (lines, writers), labels (lines,), pages (lines,)"""
    log_softmax = F.log_softmax(torch.from_numpy(logits), 1).numpy()
    page_labels, page_guesses = guess_pages(log_softmax, labels, pages)

    def by_page(hits: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(pages, weights=hits).astype(np.int64)

    return Pages(
        labels=page_labels,
        lines=np.bincount(pages),
        right=by_page(logits.argmax(1) == labels),
        top5=by_page(in_top5(logits, labels)) if logits.shape[1] > 5 else None,
        page_right=(page_guesses == page_labels).astype(np.int64),
    )


def resample(pages: Pages, resamples: int = RESAMPLES) -> dict[str, NDArray[np.float64]]:
    """Compute each metric on resampled pages: name → (resamples,), as fractions.

    Pages are what is resampled, since the lines of one page stand or fall together. Each resample
    draws one page of a writer less than he has, with replacement: with all n the mean's variance
    would come out (n - 1) / n of what it is, half of it with two pages. Rao & Wu 1988; McCarthy &
    Snowden 1985. Of a single page nothing is known.
    """
    rng = np.random.default_rng(SEED)
    writers = np.unique(pages.labels)
    shares: dict[str, NDArray[np.float64]] = {
        name: np.zeros(resamples) for name in ("macro_top1", "macro_top5", "page_macro_top1")
    }
    right, lines = np.zeros(resamples), np.zeros(resamples)
    for writer in writers:
        own = np.flatnonzero(pages.labels == writer)
        drawn = max(1, len(own) - 1)
        times = rng.multinomial(drawn, np.full(len(own), 1 / len(own)), resamples)
        own_lines, own_right = times @ pages.lines[own], times @ pages.right[own]
        right += own_right * (len(own) / drawn)
        lines += own_lines * (len(own) / drawn)
        shares["macro_top1"] += own_right / own_lines
        shares["page_macro_top1"] += times @ pages.page_right[own] / drawn
        if pages.top5 is not None:
            shares["macro_top5"] += times @ pages.top5[own] / own_lines
    found = {name: total / len(writers) for name, total in shares.items()}
    if pages.top5 is None:
        del found["macro_top5"]
    return {**found, "micro_top1": right / lines}


def intervals(pages: Pages) -> dict[str, list[float] | None]:
    """Give the 95 % percentile interval [low, high] of each metric."""
    found: dict[str, list[float] | None] = {
        name: [float(end) for end in np.percentile(values, PERCENTILES)]
        for name, values in resample(pages).items()
    }
    return {"macro_top5": None, **found}
