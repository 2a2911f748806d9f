"""A classical descriptor of handwriting: co-occurrences of the directions of its strokes' edges."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CoHOG(nn.Module):
    """Describe a line by how often pairs of edge directions stand at given distances.

    After CoHOG (Watanabe, Ito and Yokoi 2009); in the study of handwriting Hinge is akin (Bulacu
    and Schomaker 2007). The ink is smoothed; where its gradient is strong, the gradient's direction
    is one of `directions` around the circle; pairs of directions are counted at six offsets. The
    frequencies of each offset are square roots of shares, so that long lines and short ones, dense
    and sparse ones are described alike. Nothing is learned.

    Images (batch, 1, height, width), float, unit deviation of a line's ink, zero background;
    returns (batch, channels), float32. Background around a line changes nothing.

    directions: bins of the circle.   reach: of the nearer offsets, in pixels; the farther ones are
    7/3 of it.   smoothing: deviation of the Gaussian, in pixels.   edge: the least length of a
    gradient that counts, in deviations of ink over two pixels.
    """

    def __init__(self, directions: int, reach: int, smoothing: float, edge: float) -> None:
        super().__init__()
        self.directions, self.edge = directions, edge
        far = round(reach * 7 / 3)
        # (down, right)
        near = ((0, reach), (reach, 0), (reach, reach), (reach, -reach))
        self.offsets = (*near, (0, far), (far, 0))
        self.margin = far
        self.channels = directions + len(self.offsets) * directions**2
        taps = torch.arange(math.ceil(3 * smoothing) + 1) / smoothing
        weights = torch.exp(-(taps**2) / 2)
        self.taps: list[float] = (weights / (2 * weights.sum() - weights[0])).tolist()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        across, down = self._gradient(images[:, 0].float())
        batch, height, width = across.shape
        strong = across.square().add_(down.square()) > self.edge**2
        place = strong.flatten().nonzero().squeeze(1)
        across, down = (part.flatten()[place] for part in (across, down))
        angle = torch.atan2(down, across) * (self.directions / (2 * math.pi))
        direction = angle.floor().long() % self.directions

        # A map of directions with a margin, so that no offset leads from one line into another.
        line, rest = place // (height * width), place % (height * width)
        margin, nothing = self.margin, self.directions
        wide, high = width + 2 * margin, height + margin
        place = (line * high + rest // width) * wide + rest % width + margin
        size = (batch * high + margin + 1) * wide
        where = torch.full((size,), nothing, dtype=torch.uint8, device=images.device)
        where[place] = direction.to(torch.uint8)

        single = line * self.directions + direction
        counts = [torch.bincount(single, minlength=batch * self.directions).view(batch, -1)]
        first = single * (self.directions + 1)
        for rows, columns in self.offsets:
            other = where.index_select(0, place + (rows * wide + columns))
            pairs = torch.bincount(
                first + other, minlength=batch * self.directions * (self.directions + 1)
            ).view(batch, self.directions, -1)
            counts.append(pairs[:, :, :nothing].flatten(1))
        return torch.cat([_frequencies(count) for count in counts], 1)

    def _gradient(self, ink: Tensor) -> tuple[Tensor, Tensor]:
        """Smooth (batch, height, width) and give its gradient to the right and downwards.

        Both are wider and higher by as much as smoothing spreads the ink.
        """
        ink = F.pad(ink, [2 * len(self.taps)] * 4)
        for dim in (1, 2):
            ink = self._smoothed(ink, dim)
        across = ink[:, 1:-1, 2:] - ink[:, 1:-1, :-2]
        down = ink[:, 2:, 1:-1] - ink[:, :-2, 1:-1]
        return across, down

    def _smoothed(self, ink: Tensor, dim: int) -> Tensor:
        """Smooth along a dimension, which loses what the taps reach over at both ends.

        By sums of shifted images: on a CPU a tenth of the time of a convolution of one channel.
        """
        reach = len(self.taps) - 1
        size = ink.shape[dim] - 2 * reach
        smoothed = ink.narrow(dim, reach, size) * self.taps[0]
        for shift, weight in enumerate(self.taps[1:], 1):
            for start in (reach - shift, reach + shift):
                smoothed.add_(ink.narrow(dim, start, size), alpha=weight)
        return smoothed


def _frequencies(counts: Tensor) -> Tensor:
    """Give square roots of shares; zeros where nothing was counted. Whole numbers: exact sums."""
    return (counts.float() / counts.sum(1, keepdim=True).clamp(min=1)).sqrt()
