"""Makes batches from the strip of decoded lines: order, crops, windows, augmentation.

Everything is batched tensor code on the strip's device; nothing is done image by image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data import INK_DEVIATION, LineSet

NOISE_SHEET = 4  # images: noise is drawn for so many, and each of a batch takes a part of it
STRIP_SHARE = 0.4  # of a device's free memory; what is larger stays on the host


@dataclass(frozen=True)
class Lines:
    """The lines of one split. All tensors but the strip are (lines,), int64, on its device.

    Batches are wanted on `device`: the strip's own, or another where the strip is too large for it.
    """

    strip: Tensor  # (total_width, line_height), uint8; row 0 is empty background
    starts: Tensor
    widths: Tensor
    labels: Tensor
    pages: Tensor  # numbered from 0 without gaps
    device: torch.device

    @classmethod
    def of(
        cls, data: LineSet, split: str, strip: Tensor, device: torch.device | None = None
    ) -> Lines:
        """Take a split's lines; `strip` is the result of `strip_on`.

        device: where batches are wanted, if not where the strip is.
        """
        chosen = data.select(split)
        _, pages = np.unique(data.pages[chosen], return_inverse=True)
        starts, widths, labels, numbers = (
            torch.from_numpy(np.asarray(own)).to(strip.device)
            for own in (data.starts[chosen], data.widths[chosen], data.labels[chosen], pages)
        )
        return cls(strip, starts, widths, labels, numbers, device or strip.device)

    def __len__(self) -> int:
        return len(self.starts)


def strip_on(data: LineSet, device: torch.device) -> Tensor:
    """Put the strip on the device where it leaves room there for training.

    On the CPU it stays mapped, shared by all processes; so does one that is too large for a device,
    which then gets each batch's crops alone.
    """
    strip = torch.from_numpy(data.strip)
    room = free_memory(device)
    if room is not None and strip.nbytes > STRIP_SHARE * room:
        print(
            f"the lines ({strip.nbytes / 2**30:.1f} GiB) stay on the host: {device} has "
            f"{room / 2**30:.1f} GiB free",
            flush=True,
        )
        return strip
    return strip.to(device)


def free_memory(device: torch.device) -> int | None:
    """Give the bytes that are free on a device; None for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor from the host without waiting for what the device still computes."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from other memory waits for the device
    return tensor.to(device, non_blocking=True)


# ----------------------------------------------------------------------------- order and windows


def epoch_order(
    labels: NDArray[np.int64], alpha: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw as many lines as there are, in random order, writers weighted by lines^(1 - alpha).

    labels (lines,). Alpha 0 takes every line once, alpha 1 every writer equally often. Systematic
    sampling: a line with an expected count of c is drawn floor(c) or ceil(c) times.
    """
    counts = np.bincount(labels).astype(np.float64)
    weights = counts[labels] ** -alpha
    shuffled = rng.permutation(len(labels))
    # Writer by writer, so that the writers' counts are even as well.
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ends = np.cumsum(weights[shuffled]) * (len(labels) / weights.sum())
    points = np.arange(len(labels)) + rng.random()
    drawn = shuffled[np.searchsorted(ends, points, side="right").clip(max=len(labels) - 1)]
    return rng.permutation(drawn)


def windows(widths: Tensor, crop_width: int) -> tuple[Tensor, Tensor]:
    """Cover each line with evenly spaced windows: as few as cover it whole.

    widths (lines,). Returns (line, offset), each (windows,), int64, line by line.
    """
    per_line = (widths + crop_width - 1).div(crop_width, rounding_mode="floor").clamp(min=1)
    line = torch.repeat_interleave(torch.arange(len(widths), device=widths.device), per_line)
    first = per_line.cumsum(0) - per_line
    number = torch.arange(len(line), device=widths.device) - first[line]
    slack = (widths - crop_width).clamp(min=0)[line].double()
    offset = slack * number / (per_line[line] - 1).clamp(min=1)
    return line, offset.round().long()


def random_offsets(widths: Tensor, crop_width: int, generator: torch.Generator) -> Tensor:
    """Choose where a crop starts in each line: (batch,); negative where the line is narrower.

    A line that is narrower than the crop stands at a random place in it.
    """
    slack = (widths - crop_width).double()
    uniform = torch.rand(
        len(widths), generator=generator, dtype=torch.float64, device=widths.device
    )
    return (slack * uniform).round().long()


def gather(lines: Lines, chosen: Tensor, offsets: Tensor, crop_width: int) -> Tensor:
    """Cut crops out of the strip: (batch, 1, line_height, crop_width), float32, unit deviation.

    chosen, offsets (batch,), int64, on the strip's device; the crops are on `lines.device`. Columns
    outside of the line are empty background.
    """
    column = offsets[:, None] + torch.arange(crop_width, device=offsets.device)
    inside = (column >= 0) & (column < lines.widths[chosen, None])
    source = torch.where(inside, lines.starts[chosen, None] + column, 0)
    # (batch, crop_width, line_height), uint8: the smallest form to send. `index_select` copies
    # whole columns: an eighth of the time that indexing takes on a CPU.
    crops = lines.strip.index_select(0, source.flatten()).view(*source.shape, -1)
    crops = to_device(crops, lines.device)
    return crops.transpose(1, 2).unsqueeze(1).to(torch.float32).div_(INK_DEVIATION)


# --------------------------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class Own:
    """Which images of a batch are at hand, where several processes share it.

    Random numbers are drawn for the whole batch: what an image gets does not depend on its sharing.
    """

    rows: slice | Tensor  # their places in the batch
    batch: int  # images in all

    def cut(self, drawn: Tensor, dim: int) -> Tensor:
        """Take from what was drawn for the whole batch."""
        if isinstance(self.rows, slice):
            return drawn
        return drawn.index_select(dim, self.rows.to(drawn.device))


def augment(
    images: Tensor,
    geometry: float,
    photometry: float,
    generator: torch.Generator,
    own: Own | None = None,
) -> Tensor:
    """Distort a batch (batch, 1, height, width), each image differently, on its device.

    The generator lives on the images' device. own: where they are a part of a batch.
    """
    own = own or Own(slice(None), len(images))
    if geometry > 0:
        images = distort(images, geometry, generator, own)
    if photometry > 0:
        images = change_ink(images, photometry, generator, own)
    return images


def distort(
    images: Tensor, strength: float, generator: torch.Generator, own: Own | None = None
) -> Tensor:
    """Rotate (± 1°), shear, scale and stretch (± 5 %), and shift each image.

    The figures are for strength 1. They are small: slant and proportions are a writer's own. Twice
    as much of this and of `change_ink` cost 3 points of accuracy after 12 epochs on real lines.
    """
    own = own or Own(slice(None), len(images))
    height, width = images.shape[2:]
    drawn = own.cut(torch.rand(6, own.batch, generator=generator, device=images.device), 1)
    drawn = (drawn * 2 - 1) * strength
    angle = drawn[0] * math.radians(1.0)
    shear = drawn[1] * 0.05
    scale = torch.exp(drawn[2] * 0.05)
    stretch = torch.exp(drawn[3] * 0.05)
    shift_x, shift_y = drawn[4] * 4 / width, drawn[5] * 0.03
    aspect = height / width  # affine_grid works in units of half the image
    theta = torch.stack(
        [
            torch.stack([scale * stretch, (shear + angle) * aspect, shift_x], -1),
            torch.stack([-angle / aspect, scale, shift_y], -1),
        ],
        1,
    )
    return F.grid_sample(
        images, affine_grid(theta, height, width), "bilinear", "zeros", align_corners=False
    )


def affine_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Do what `F.affine_grid` does without `align_corners`: (batch, height, width, 2).

    By sums over rows and columns instead of a matrix product for each pixel: a tenth of its time on
    a CPU, where that is more than `grid_sample` itself takes.
    """
    x = (torch.arange(width, device=theta.device) * 2 + 1) / width - 1
    y = (torch.arange(height, device=theta.device) * 2 + 1) / height - 1
    rows = theta[:, :, 1:2] * y + theta[:, :, 2:3]  # (batch, 2, height)
    columns = theta[:, :, :1] * x  # (batch, 2, width)
    # As two planes: pairs that lie together take three times as long to add, and longer to sample.
    return (rows[..., :, None] + columns[..., None, :]).permute(0, 2, 3, 1)


def change_ink(
    images: Tensor, strength: float, generator: torch.Generator, own: Own | None = None
) -> Tensor:
    """Change each image's stroke width, sharpness, contrast, noise and paper."""
    own = own or Own(slice(None), len(images))
    drawn = torch.rand(5, own.batch, 1, 1, 1, generator=generator, device=images.device)
    drawn = own.cut(drawn, 1)
    signed = (drawn * 2 - 1) * strength
    # Sums and maxima over neighbours, one dimension after the other: on a CPU, pooling of one
    # channel takes ten times as long.
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    left, middle, right = _neighbours(padded, 3)
    thick = torch.maximum(left, middle)
    torch.maximum(thick, right, out=thick)
    blurred = (left + middle).add_(right)
    above, level, below = _neighbours(thick, 2)
    thick = torch.maximum(above, level)
    torch.maximum(thick, below, out=thick)
    above, level, below = _neighbours(blurred, 2)
    blurred = (above + level).add_(below)  # nine times the mean
    thicker = signed[0].clamp(min=0) * 0.25
    softer = signed[1] * 0.35  # negative: sharper
    contrast = torch.exp(signed[2] * 0.18)
    images = images * (contrast * (1 - thicker - softer))
    images.addcmul_(thick, contrast * thicker).addcmul_(blurred, contrast * softer / 9)
    noise = draw_noise(images, generator, own)
    return images.addcmul_(noise, drawn[3] * strength * 0.08).add_(signed[4] * 0.08)


def _neighbours(padded: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give each pixel's predecessor, itself and its successor along a dimension padded by one."""
    size = padded.shape[dim] - 2
    return padded.narrow(dim, 0, size), padded.narrow(dim, 1, size), padded.narrow(dim, 2, size)


def draw_noise(images: Tensor, generator: torch.Generator, own: Own) -> Tensor:
    """Give each image normal noise, (batch, 1, height, width), from a place of its own in a sheet.

    A sheet of a few images' size: drawing each pixel's anew was the most expensive part of
    augmentation on a CPU.
    """
    pixels = images.shape[2] * images.shape[3]
    device = images.device
    sheet = torch.randn(NOISE_SHEET * pixels, generator=generator, device=device)
    places = (NOISE_SHEET - 1) * pixels + 1
    begin = own.cut(torch.randint(places, (own.batch,), generator=generator, device=device), 0)
    return sheet.unfold(0, pixels, 1).index_select(0, begin).view_as(images)
