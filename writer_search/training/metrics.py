"""What a model gets right: plain functions of logits, labels and pages."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from writer_search.training.certainty import sure_from

OF_THE_BEST = ("confusion", "predictions")  # kept of the best epoch alone


def row_of(best: dict[str, Any]) -> dict[str, Any]:
    """Give the best epoch's row as the history has it."""
    return {name: value for name, value in best.items() if name not in OF_THE_BEST}


@dataclass(frozen=True)
class Metrics:
    """What a model gets right on one split, as fractions.

    sure_from: the probability from which on nine of ten lines are right, see `certainty`; None in
    what an earlier version measured.
    macro_top1: mean over writers of the share of their lines whose first guess is right.
    macro_top5: the same for the first five guesses; None with five writers or fewer.
    micro_top1: share of all lines. page_macro_top1: pages instead of lines; None where some are not
    known.
    network_macro_top1: macro_top1 of the network without the descriptor beside it; None where there
    is none, and in what an earlier version measured.
    loss: mean cross-entropy of lines. per_writer: each writer's share, writers with lines only.
    confusion: (pairs, 3), int32: true writer, guessed writer, lines, where there are any; a table
    of 2,000 writers would have four million numbers.
    predictions: (lines, 4), float32: of each line the guessed writer, his probability, the true
    writer's probability, and the writer that the line's page is taken for; None where they were not
    kept. Neither is compared by `==`.
    """

    sure_from: float | None = field(kw_only=True, default=None)
    network_macro_top1: float | None = field(kw_only=True, default=None)
    macro_top1: float
    macro_top5: float | None
    micro_top1: float
    page_macro_top1: float | None
    loss: float
    per_writer: dict[str, float]
    confusion: NDArray[np.int32] = field(compare=False)
    predictions: NDArray[np.float32] | None = field(default=None, compare=False)

    def row(self) -> dict[str, Any]:
        """Give what every epoch keeps."""
        row = row_of({each.name: getattr(self, each.name) for each in fields(self)})
        if self.network_macro_top1 is None:
            del row["network_macro_top1"]
        return row


def compute_metrics(
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    pages: NDArray[np.int64],
    writers: tuple[str, ...],
    has_pages: bool = True,
) -> Metrics:
    """Compute all metrics from logits (lines, writers), labels (lines,) and pages (lines,).

    has_pages: whether pages are known, so that they can be measured.
    A line is right when its writer has the highest logit of *all* writers; ties go to the first.
    """
    guesses = logits.argmax(1)
    right = guesses == labels
    measured, per_writer = _by_writer(right, labels, len(writers))
    log_softmax = F.log_softmax(torch.from_numpy(logits), 1).numpy()
    page_labels, page_guesses = guess_pages(log_softmax, labels, pages)
    page_right = _mean_by(page_guesses == page_labels, page_labels, len(writers))[measured]
    every = np.arange(len(labels))
    top5 = None
    if len(writers) > 5:
        top5 = float(_mean_by(in_top5(logits, labels), labels, len(writers))[measured].mean())
    return Metrics(
        sure_from=sure_from(np.exp(log_softmax.max(1)), right),
        macro_top1=float(per_writer.mean()),
        macro_top5=top5,
        micro_top1=float(right.mean()),
        page_macro_top1=float(page_right.mean()) if has_pages else None,
        loss=float(-log_softmax[every, labels].mean()),
        per_writer={
            writers[w]: float(share) for w, share in zip(measured, per_writer, strict=True)
        },
        confusion=_confusion(labels, guesses),
        predictions=np.stack(
            [
                guesses,
                np.exp(log_softmax[every, guesses]),
                np.exp(log_softmax[every, labels]),
                page_guesses[pages],
            ],
            1,
        ).astype(np.float32),
    )


def macro_top1(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Compute one of the metrics from logits (lines, writers) and labels (lines,)."""
    _, per_writer = _by_writer(logits.argmax(1) == labels, labels, logits.shape[1])
    return float(per_writer.mean())


def _by_writer(
    right: NDArray[np.bool_], labels: NDArray[np.int64], num_writers: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Give the writers that have lines, and each one's share of right lines."""
    measured = np.flatnonzero(np.bincount(labels, minlength=num_writers))
    return measured, _mean_by(right, labels, num_writers)[measured]


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


def guess_pages(
    log_softmax: NDArray[np.float64], labels: NDArray[np.int64], pages: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give each page's writer, and whom its lines' mean log-softmax guesses: (pages,).

    log_softmax (lines, writers), labels (lines,), pages (lines,) numbered from 0 without gaps.
    """
    num_pages = int(pages.max()) + 1
    page_scores = np.zeros((num_pages, log_softmax.shape[1]))
    np.add.at(page_scores, pages, log_softmax)  # the mean has the same argmax as the sum
    page_labels = np.zeros(num_pages, np.int64)
    page_labels[pages] = labels
    return page_labels, page_scores.argmax(1)
