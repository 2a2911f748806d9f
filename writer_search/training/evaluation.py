"""Measures a model on all lines of a split, each covered whole by windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from model import WriterModel, for_inference
from writer_search.config import TrialConfig
from writer_search.training.batches import SIZES, InMemory, Lines, gather, varied_lines, views
from writer_search.training.metrics import Metrics, compute_metrics, macro_top1
from writer_search.training.optimisation import autocast
from writer_search.training.outcomes import DivergedError
from writer_search.training.ranks import ALONE, Ranks

EVALUATION_BATCH = 64  # windows at once, where no smaller micro-batch bounds them
EVALUATION_BATCH_ON_GPU = 256  # one that is half idle takes as long for fewer


def evaluate(
    model: WriterModel,
    config: TrialConfig,
    lines: Lines,
    writers: tuple[str, ...],
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    micro_batch: int | None = None,
    described: Tensor | None = None,
) -> Metrics:
    """Measure a model on all lines of a split, each covered whole by windows.

    micro_batch: the most windows on a device at once.   described: see
    `own_and_line_logits`.
    Raises DivergedError when the output is not finite.
    """
    how = (check, ranks, micro_batch, described)
    found = own_and_line_logits(model, config, lines, len(writers), *how)
    # Rank 0's for all: a last bit that differs would let one rank go on and another end.
    own, logits = ranks.of_first(found)
    if not logits.isfinite().all():
        raise DivergedError("the model's output on the validation lines is not finite")
    labels, pages = lines.labels.cpu().numpy(), lines.pages.cpu().numpy()
    metrics = compute_metrics(logits.double().numpy(), labels, pages, writers, lines.has_pages)
    if model.beside is None:
        return metrics
    return replace(metrics, network_macro_top1=macro_top1(own.double().numpy(), labels))


def line_logits(model: WriterModel, config: TrialConfig, lines: Lines, num_writers: int) -> Tensor:
    """Give each line's logits: (lines, writers), float32, on the host."""
    return own_and_line_logits(model, config, lines, num_writers)[1]


def own_and_line_logits(
    model: WriterModel,
    config: TrialConfig,
    lines: Lines,
    num_writers: int,
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    micro_batch: int | None = None,
    described: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give each line's logits without and with a descriptor beside the model; the same if none is.

    With it they are the weighted sum of both's log-probabilities. `described` are the descriptor's
    logits, where they are known.
    """
    own = own_logits(model, config, lines, num_writers, check, ranks, micro_batch)
    if model.beside is None:
        return own, own
    if described is None:
        described = own_logits(model.beside, config, lines, num_writers, check, ranks)
    return own, own.log_softmax(1) + config.cohog_weight * described.log_softmax(1)


@torch.inference_mode()
def own_logits(
    model: WriterModel,
    config: TrialConfig,
    lines: Lines,
    num_writers: int,
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    micro_batch: int | None = None,
) -> Tensor:
    """Average each line's logits over its windows: (lines, writers), float32, on the host.

    A descriptor sees whole lines, each in several sizes, and a writer gets the most that one of
    them gives him. A descriptor beside the model is not asked. Ranks take turns at batches of
    views, the same ones as a single process; none is done twice.
    """
    device = lines.device
    if model.sees_whole_lines:
        line, place, parts = views(lines, None)
    else:
        line, place, parts = views(lines, config.crop_width, windows_at_once(device, micro_batch))
    by_view = torch.zeros(len(line), num_writers, device=device)
    model = for_inference(model)
    if config.precision == "bfloat16":
        cast_weights(model)

    def logits_of(place: Tensor, width: int) -> Tensor:
        with autocast(config, device):
            return logits_in_sizes(model, config, gather(lines, place, width))

    in_memory = InMemory()
    for turn in range(0, len(parts), ranks.size):
        check()
        for part, width in parts[turn : turn + ranks.size][ranks.rank : ranks.rank + 1]:
            by_view[part] = in_memory(logits_of, place[part], width)
    ranks.add_up(by_view)
    # On the host, where sums are taken in the same order each time.
    by_view, line = by_view.cpu(), line.cpu()
    total = torch.zeros(len(lines), num_writers).index_add_(0, line, by_view)
    return total / torch.bincount(line, minlength=len(lines))[:, None]


def logits_in_sizes(model: WriterModel, config: TrialConfig, images: Tensor) -> Tensor:
    """Ask a model for the logits of images: (batch, writers), float32.

    A descriptor is asked in each of the configuration's sizes. A book may be larger or smaller than
    those that its writer was trained on, and the size in which it is most like his is the one to
    judge by.
    """
    if not model.sees_whole_lines or config.cohog_sizes == 1:
        own: Tensor = model(images)
        return own.float()
    sizes = [size * config.cohog_variation for size in SIZES[: config.cohog_sizes]]
    logits = torch.stack([model(varied_lines(images, size)).float() for size in sizes])
    return logits.log_softmax(2).amax(0)


def windows_at_once(device: torch.device, micro_batch: int | None = None) -> int:
    """Give how many windows are on a device at once in a validation."""
    most = EVALUATION_BATCH_ON_GPU if device.type == "cuda" else EVALUATION_BATCH
    return min(most, micro_batch or most)


def cast_weights(model: WriterModel) -> None:
    """Cast what autocast would cast for each batch anew, of a model that learns no more.

    The classifier computes in float32.
    """
    for part in (model.backbone, model.pool):
        for module in part.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(torch.bfloat16)
