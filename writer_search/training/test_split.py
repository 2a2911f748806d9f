"""Measures a model on the test lines, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data import LineSet
from writer_search.lines.report import STRANGERS
from writer_search.training.batches import Lines, strip_on
from writer_search.training.bootstrap import INTERVAL_METHOD, Pages, count_pages, intervals
from writer_search.training.checkpoints import load_model
from writer_search.training.evaluation import line_logits
from writer_search.training.metrics import compute_metrics
from writer_search.training.optimisation import for_use_on
from writer_search.training.outcomes import DivergedError

TEST_METRICS = ("macro_top1", "micro_top1", "macro_top5", "page_macro_top1", "loss")


def measure_test_split(model_file: Path, data: LineSet, device: torch.device) -> dict[str, Any]:
    """Give a saved model's metrics on the test lines, with intervals, as JSON-able values.

    Raises UserError for a file that is no model, DivergedError for output that is not finite.
    """
    model, config, writers = load_model(model_file)
    config = for_use_on(config, device)
    lines = Lines.of(data, "test", strip_on(data, device), device)
    with torch.inference_mode():
        output = line_logits(model.to(device), config, lines, len(writers))
    logits = output.double().cpu().numpy()
    if not np.isfinite(logits).all():
        raise DivergedError("the model's output on the test lines is not finite")
    labels, numbers = lines.labels.cpu().numpy(), lines.pages.cpu().numpy()
    metrics, pages = (
        compute_metrics(logits, labels, numbers, writers, lines.has_pages),
        count_pages(logits, labels, numbers),
    )
    left_out = data.report.get("left_out", {}).get(STRANGERS, {})
    return {
        **{name: getattr(metrics, name) for name in TEST_METRICS},
        **_intervals(pages, logits, labels, numbers, lines.has_pages),
        "lines_not_counted": left_out.get("count", 0),
        "lines": len(labels),
        "pages": len(pages.labels) if lines.has_pages else None,
        "writers_with_one_page": int((np.bincount(pages.labels) == 1).sum())
        if lines.has_pages
        else None,
        "writers_without_test_lines": sorted(set(writers) - set(metrics.per_writer)),
        "per_writer": {
            name: _of_writer(pages, writers.index(name), share, lines.has_pages)
            for name, share in metrics.per_writer.items()
        },
    }


def _intervals(
    pages: Pages,
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    numbers: NDArray[np.int64],
    has_pages: bool,
) -> dict[str, Any]:
    """Give intervals by pages; by lines where they are not known, or no writer's pages differ.

    A writer's single page would never vary: each of its lines is resampled as if it were a page.
    numbers (lines,): of the lines' pages.
    """
    if has_pages:
        by_pages = intervals(pages)
        if len(set(by_pages["macro_top1"] or ())) > 1:
            is_single = (np.bincount(pages.labels) == 1)[labels]
            apart = np.where(is_single, len(pages.labels) + np.arange(len(labels)), numbers)
            _, units = np.unique(apart, return_inverse=True)
            whole = {"page_macro_top1": by_pages["page_macro_top1"]}
            return {
                "intervals": {**intervals(count_pages(logits, labels, units)), **whole},
                "interval_unit": "pages",
                "interval_method": f"{INTERVAL_METHOD}; the lines of a single page",
            }
    single = count_pages(logits, labels, np.arange(len(labels)))
    return {
        "intervals": {**intervals(single), "page_macro_top1": None},
        "interval_unit": "lines",
        "interval_method": INTERVAL_METHOD.replace("pages", "lines"),
    }


def _of_writer(pages: Pages, label: int, share: float, has_pages: bool) -> dict[str, Any]:
    own = pages.labels == label
    return {
        "top1": share,
        "lines": int(pages.lines[own].sum()),
        "pages": int(own.sum()) if has_pages else None,
        "page_top1": float(pages.page_right[own].mean()) if has_pages else None,
    }
