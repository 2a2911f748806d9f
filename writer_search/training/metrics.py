"""What a model gets right: plain functions of logits, labels and pages."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from writer_search.training.certainty import sure_from


@dataclass(frozen=True)
class Metrics:
    """What a model gets right on one split, as fractions.

    sure_from: the probability from which on nine of ten lines are right, see `certainty`; None in
    what an earlier version measured.
    macro_top1: mean over writers of the share of their lines whose first guess is right.
    macro_top5: the same for the first five guesses; None with five writers or fewer.
    micro_top1: share of all lines. page_macro_top1: pages instead of lines.
    loss: mean cross-entropy of lines. per_writer: each writer's share, writers with lines only.
    confusion: (pairs, 3), int32: true writer, guessed writer, lines, where there are any; a table
    of 2,000 writers would have four million numbers. Not compared by `==`.
    """

    sure_from: float | None = field(kw_only=True, default=None)
    macro_top1: float
    macro_top5: float | None
    micro_top1: float
    page_macro_top1: float
    loss: float
    per_writer: dict[str, float]
    confusion: NDArray[np.int32] = field(compare=False)

    def row(self) -> dict[str, Any]:
        """Give what every epoch keeps: all but the confusion."""
        names = (each.name for each in fields(self) if each.name != "confusion")
        return {name: getattr(self, name) for name in names}


def compute_metrics(
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    pages: NDArray[np.int64],
    writers: tuple[str, ...],
) -> Metrics:
    """Compute all metrics from logits (lines, writers), labels (lines,) and pages (lines,).

    A line is right when its writer has the highest logit of *all* writers; ties go to the first.
    """
    counts = np.bincount(labels, minlength=len(writers))
    measured = np.flatnonzero(counts)
    guesses = logits.argmax(1)
    right = guesses == labels
    per_writer = _mean_by(right, labels, len(writers))[measured]
    log_softmax = F.log_softmax(torch.from_numpy(logits), 1).numpy()
    top5 = None
    if len(writers) > 5:
        top5 = float(_mean_by(in_top5(logits, labels), labels, len(writers))[measured].mean())
    return Metrics(
        sure_from=sure_from(np.exp(log_softmax.max(1)), right),
        macro_top1=float(per_writer.mean()),
        macro_top5=top5,
        micro_top1=float(right.mean()),
        page_macro_top1=_page_macro_top1(log_softmax, labels, pages),
        loss=float(-log_softmax[np.arange(len(labels)), labels].mean()),
        per_writer={
            writers[w]: float(share) for w, share in zip(measured, per_writer, strict=True)
        },
        confusion=_confusion(labels, guesses),
    )


def _confusion(labels: NDArray[np.int64], guesses: NDArray[np.int64]) -> NDArray[np.int32]:
    """Count lines by (true writer, guessed writer): (pairs, 3), sorted."""
    pairs, lines = np.unique(np.stack([labels, guesses], 1), axis=0, return_counts=True)
    return np.concatenate([pairs, lines[:, None]], 1).astype(np.int32)


def _mean_by(
    values: NDArray[Any], groups: NDArray[np.int64], num_groups: int
) -> NDArray[np.float64]:
    """Average values by group; 0 where a group is empty."""
    sums = np.bincount(groups, weights=values, minlength=num_groups)
    mean: NDArray[np.float64] = sums / np.bincount(groups, minlength=num_groups).clip(min=1)
    return mean


def in_top5(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell of each line whether its writer is among the first five guesses: (lines,)."""
    true_logit = logits[np.arange(len(labels)), labels]
    found: NDArray[np.bool_] = (logits > true_logit[:, None]).sum(1) < 5
    return found


def pages_right(
    log_softmax: NDArray[np.float64], labels: NDArray[np.int64], pages: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Give each page's writer, and whether its lines' mean log-softmax guesses him: (pages,).

    log_softmax (lines, writers), labels (lines,), pages (lines,) numbered from 0 without gaps.
    """
    num_pages = int(pages.max()) + 1
    page_scores = np.zeros((num_pages, log_softmax.shape[1]))
    np.add.at(page_scores, pages, log_softmax)  # the mean has the same argmax as the sum
    page_labels = np.zeros(num_pages, np.int64)
    page_labels[pages] = labels
    return page_labels, page_scores.argmax(1) == page_labels


def _page_macro_top1(
    log_softmax: NDArray[np.float64], labels: NDArray[np.int64], pages: NDArray[np.int64]
) -> float:
    page_labels, right = pages_right(log_softmax, labels, pages)
    by_writer = _mean_by(right, page_labels, log_softmax.shape[1])
    return float(by_writer[np.unique(page_labels)].mean())
