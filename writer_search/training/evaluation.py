"""Measures a model on all lines of a split, each covered whole by windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model import WriterModel, for_inference
from writer_search.config import TrialConfig
from writer_search.training.batches import (
    Lines,
    gather,
    views,
)
from writer_search.training.metrics import Metrics, compute_metrics
from writer_search.training.optimisation import (
    autocast,
)
from writer_search.training.outcomes import DivergedError
from writer_search.training.ranks import ALONE, Ranks

EVALUATION_BATCH = 64


@torch.inference_mode()
def evaluate(
    model: WriterModel,
    config: TrialConfig,
    lines: Lines,
    writers: tuple[str, ...],
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Metrics:
    """Measure a model on all lines of a split, each covered whole by windows.

    Raises DivergedError when the output is not finite.
    """
    logits = line_logits(model, config, lines, len(writers), check, ranks).double().cpu()
    # Rank 0's for all: a last bit that differs would let one rank go on and another end.
    logits = ranks.of_first(logits)
    if not logits.isfinite().all():
        raise DivergedError("the model's output on the validation lines is not finite")
    return compute_metrics(
        logits.numpy(), lines.labels.cpu().numpy(), lines.pages.cpu().numpy(), writers
    )


def line_logits(
    model: WriterModel,
    config: TrialConfig,
    lines: Lines,
    num_writers: int,
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Average each line's logits over its windows: (lines, writers), float32.

    A model that sees whole lines has one view of each. Ranks take turns at batches of views, the
    same ones as a single process; none is done twice.
    """
    device = lines.device
    if model.sees_whole_lines:
        line, place, parts = views(lines, None)
    else:
        line, place, parts = views(lines, config.crop_width, EVALUATION_BATCH)
    by_view = torch.zeros(len(line), num_writers, device=device)
    model = for_inference(model)
    for turn in range(0, len(parts), ranks.size):
        check()
        for part, width in parts[turn : turn + ranks.size][ranks.rank : ranks.rank + 1]:
            images = gather(lines, place[part], width)
            with autocast(config, device):
                logits = model(images)
            by_view[part] = logits.float()
    ranks.add_up(by_view)
    line = line.to(device)
    total = torch.zeros(len(lines), num_writers, device=device).index_add_(0, line, by_view)
    return total / torch.bincount(line, minlength=len(lines))[:, None]
