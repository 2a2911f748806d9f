"""Fits a linear classifier to descriptions of lines in one step: by LDA, or by a softmax.

All of it is done on the CPU in float64, so that the device makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model import WriterModel
from writer_search.config import TrialConfig
from writer_search.training.batches import SIZES, InMemory, Lines, gather, varied_lines, views
from writer_search.training.optimisation import LBFGS

FOLDS = 3  # of the training lines, to find out how sure the classifier may be
SHARPEST, FLATTEST = 100.0, 1e-3  # of the factors that its logits may get
ITERATIONS = 200  # of the softmax; it has settled after some dozens


@dataclass(frozen=True)
class Classifier:
    """Logits are weight @ ((description - mean) / deviation) + bias; all float64.

    mean, deviation (channels,);  weight (writers, channels);  bias (writers,)
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, descriptions: Tensor) -> Tensor:
        """Give the logits of descriptions: (lines, channels) to (lines, writers)."""
        return F.linear((descriptions - self.mean) / self.deviation, self.weight, self.bias)

    def scaled(self, factor: float) -> Classifier:
        return replace(self, weight=self.weight * factor, bias=self.bias * factor)

    def give_to(self, model: WriterModel) -> None:
        """Make a model's own classifier this one."""
        device = next(model.pool.buffers()).device
        own = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        model.pool.load_state_dict({name: own.pop(name) for name in ("mean", "deviation")})
        model.classifier.load_state_dict(own)


# Sizes, slants and widths of strokes that a line is described in besides its own, at a variation of
# 1: a book may be written larger or smaller than those to train on, more or less upright, and with
# another pen.
VARIANTS = (
    *((size, 0.0, 0.0) for size in reversed(SIZES[1:])),
    *((0.0, slant, 0.0) for slant in (-0.1, 0.1)),
    *((0.0, 0.0, stroke) for stroke in (-0.5, 0.5)),
)
MOST_ROWS = 8000  # of descriptions: beyond, a line has fewer variants, one at least
NO_VARIANTS = 20_000  # lines: for more of them none, for the sake of memory


@torch.no_grad()
def describe(
    model: WriterModel, lines: Lines, variation: float, check: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Describe each line whole by the model's backbone, also in other sizes, slants and strokes.

    variation: how much those differ from the line; 0: nothing but the line itself.
    Returns descriptions (rows, channels), float64, and which line's they are (rows,), int64; both
    are on the CPU. Where lines are many, they take turns at the variants.
    """
    line, place, parts = views(lines, None)
    number = min(len(VARIANTS), max(1, MOST_ROWS // max(1, len(lines)) - 1))
    if variation == 0 or len(lines) > NO_VARIANTS:
        number = 0

    def versions(chosen: list[tuple[float, float, float]], place: Tensor, width: int) -> Tensor:
        images = gather(lines, place, width)
        varied = (varied_lines(images, *(variation * much for much in each)) for each in chosen)
        return torch.stack([model.backbone(version) for version in (images, *varied)], 1).cpu()

    described: list[Tensor] = []
    of_line: list[Tensor] = []
    in_memory = InMemory()
    for turn, (part, width) in enumerate(parts):
        check()
        chosen = [VARIANTS[(turn * number + i) % len(VARIANTS)] for i in range(number)]
        described += in_memory(partial(versions, chosen), place[part], width).unbind(1)
        of_line += [line[part].cpu()] * (1 + number)
    return torch.cat(described).double(), torch.cat(of_line)


def fit(
    config: TrialConfig,
    descriptions: Tensor,
    labels: Tensor,
    pages: Tensor,
    writers: int,
    check: Callable[[], None] = lambda: None,
) -> Classifier:
    """Fit the configuration's classifier, as sure of itself as it may be.

    descriptions (lines, channels), float64;  labels, pages (lines,), int64

    Each of FOLDS parts of the lines is told by what was fitted to the others, and all logits get
    the factor with which these answers are the most probable: LDA is far too sure by itself.
    """

    def fitted(chosen: Tensor) -> Classifier:
        check()
        return fit_head(config, descriptions[chosen], labels[chosen], writers)

    fold = _folds(labels.numpy(), pages.numpy())
    unseen, truth = [], []
    for number in range(FOLDS):
        own = fold == number
        # A writer with one line cannot be told by others, and is not to be unknown to them.
        own &= torch.isin(labels, labels[~own])
        if own.any():
            unseen.append(fitted(~own).logits(descriptions[own]))
            truth.append(labels[own])
    whole = fitted(torch.ones_like(fold, dtype=torch.bool))
    if not unseen:
        return whole
    return whole.scaled(best_factor(torch.cat(unseen), torch.cat(truth)))


def fit_head(config: TrialConfig, descriptions: Tensor, labels: Tensor, writers: int) -> Classifier:
    """Fit the configuration's classifier to standardised descriptions."""
    mean, deviation = descriptions.mean(0), descriptions.std(0, correction=0)
    deviation = torch.where(deviation > 1e-12, deviation, 1.0)
    standard = (descriptions - mean) / deviation
    if config.cohog_head == "lda":
        weight, bias = shrinkage_lda(standard, labels, writers)
    else:
        weight, bias = softmax_regression(standard, labels, writers, config.cohog_penalty)
    return Classifier(mean, deviation, weight, bias)


def shrinkage_lda(features: Tensor, labels: Tensor, writers: int) -> tuple[Tensor, Tensor]:
    """Fit linear discriminant analysis: weight (writers, channels) and bias (writers,).

    features (lines, channels), float64;  labels (lines,), int64

    Each writer's covariance is shrunk towards its diagonal as Ledoit and Wolf (2004) have it, and
    they are averaged, weighted by their lines. All writers are taken for equally probable, as the
    macro accuracy takes them. A writer without lines is never named.
    """
    lines, channels = features.shape
    counts = torch.bincount(labels, minlength=writers)
    means = torch.zeros(writers, channels, dtype=features.dtype).index_add_(0, labels, features)
    means /= counts.clamp(min=1)[:, None]
    residuals = features - means[labels]
    # What is shrunk keeps its plain covariance, times a weight: one matrix product is enough.
    weights = torch.zeros(lines, dtype=features.dtype)
    diagonal = torch.zeros(channels, dtype=features.dtype)
    for writer in torch.nonzero(counts)[:, 0].tolist():
        own = labels == writer
        deviations = residuals[own].square().mean(0).sqrt()
        deviations = torch.where(deviations > 1e-12, deviations, 1.0)
        shrinkage, mean_variance = ledoit_wolf(residuals[own] / deviations)
        if int(counts[writer]) < 3:  # it would be none: two deviate alike from their mean
            shrinkage = 1.0
        weights[own] = (1 - shrinkage) / lines
        diagonal += shrinkage * mean_variance * deviations.square() * (len(weights[own]) / lines)
    covariance = (residuals * weights[:, None]).T @ residuals
    # A trace of the identity: features without any spread say nothing, and break nothing.
    covariance.diagonal().add_(diagonal + 1e-9)
    weight = torch.linalg.solve(covariance, means.T).T
    bias = -0.5 * (means * weight).sum(1)
    return weight, torch.where(counts > 0, bias, bias.min() - 1e6)


def ledoit_wolf(centred: Tensor) -> tuple[float, float]:
    """Give how much of the identity belongs into a covariance, and the mean variance.

    centred (lines, channels), float64. The closed form of Ledoit and Wolf 2004, with sums over
    pairs of channels or of lines, whichever are fewer.
    """
    lines, channels = centred.shape
    squares = centred.square().sum(1)
    mean_variance = squares.sum() / (lines * channels)
    smaller = centred @ centred.T if lines < channels else centred.T @ centred  # as many squares
    of_covariance = smaller.square().sum() / lines**2
    distance = of_covariance / channels - mean_variance.square()
    error = (squares.square().sum() / lines - of_covariance) / (lines * channels)
    error = min(error, distance)
    return (float(error / distance) if error > 0 else 0.0), float(mean_variance)


def softmax_regression(
    features: Tensor, labels: Tensor, writers: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """Fit a softmax with a squared penalty on its weights: weight (writers, channels), bias.

    features (lines, channels), float64. Every writer counts alike, whatever lines he has. The
    problem is convex, and L-BFGS finds its one solution from zeros: no seed decides anything.
    """
    weight = torch.zeros(writers, features.shape[1], dtype=features.dtype, requires_grad=True)
    bias = torch.zeros(writers, dtype=features.dtype, requires_grad=True)
    counts = torch.bincount(labels, minlength=writers)
    of_writer = len(labels) / (counts.clamp(min=1) * (counts > 0).sum()).to(features.dtype)
    optimizer = LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        history_size=10,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(features, weight, bias)
        value = F.cross_entropy(logits, labels, of_writer) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def best_factor(logits: Tensor, labels: Tensor) -> float:
    """Find the factor of logits (lines, writers) with which the labels are the most probable.

    Where all of n are told, the next is wrong with 1 / (n + 2): Laplace's rule of succession.
    Without it a handful of easy lines would make the logits as large as they may be. Versions of a
    line count as lines: by lines alone the same validation losses are up to twice as high.
    """
    doubt = 1 / (len(labels) + 2)
    factors = torch.logspace(np.log10(FLATTEST), np.log10(SHARPEST), 101, dtype=logits.dtype)
    losses = [
        float(F.cross_entropy(logits * factor, labels, label_smoothing=doubt)) for factor in factors
    ]
    return float(factors[int(np.argmin(losses))])


def _folds(labels: NDArray[np.int64], pages: NDArray[np.int64]) -> Tensor:
    """Number FOLDS parts of the descriptions, (lines,): by pages, where a writer has as many.

    Otherwise one by one, so that the versions of a line stand in all parts. With a line's versions
    together, what is told is harder than lines to come, and the answers are not sure enough: with
    2, 4, 8, 16, 30 and 100 random lines of each of 24 hands the validation loss is 0.34, 0.16,
    0.14, 0.026, 0.023 and 0.008, against 0.62, 0.24, 0.14, 0.030, 0.023 and 0.010.
    """
    fold = np.zeros(len(labels), np.int64)
    for writer in np.unique(labels):
        own = np.flatnonzero(labels == writer)
        _, page = np.unique(pages[own], return_inverse=True)
        fold[own] = (page if page.max() + 1 >= FOLDS else np.arange(len(own))) % FOLDS
    return torch.from_numpy(fold)
