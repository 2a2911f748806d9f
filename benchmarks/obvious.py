"""The obvious ways to feed a model: each image decoded anew in each epoch, one by one.

`squeezed` is how most such scripts begin: a Dataset, Pillow, a fixed size, torchvision's transforms
per image. `padded` is the other usual form: lines of 160 x 1760 pixels, RGB, floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

PADDED_HEIGHT, PADDED_WIDTH = 160, 1760


class LineImages(Dataset[tuple[Tensor, int]]):
    """Line images on the disk, read when they are asked for."""

    def __init__(
        self, paths: list[Path], labels: list[int], read: Callable[[Image.Image], Tensor]
    ) -> None:
        self._paths, self._labels, self._read = paths, labels, read

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self._paths[index]) as image:
            return self._read(image), self._labels[index]


class Squeezed:
    """Grey, squeezed to a fixed size; distorted where it is for training."""

    def __init__(self, height: int, width: int, training: bool) -> None:
        augmentation = [
            v2.RandomAffine(1.0, translate=(0.02, 0.03), scale=(0.95, 1.05), shear=3.0, fill=255),
            v2.ColorJitter(brightness=0.1, contrast=0.2),
        ]
        self._transform = v2.Compose(
            [
                v2.Resize((height, width)),
                *(augmentation if training else []),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5], [0.5]),
            ]
        )

    def __call__(self, image: Image.Image) -> Tensor:
        transformed: Tensor = self._transform(image.convert("L"))
        return torch.Tensor(transformed)  # a plain tensor


def padded(image: Image.Image) -> Tensor:
    """RGB, resized to a height, padded or cut on the right: (3, 160, 1760), 3.4 MB."""
    image = image.convert("RGB")
    width = min(PADDED_WIDTH, max(1, round(image.width * PADDED_HEIGHT / image.height)))
    image = image.resize((width, PADDED_HEIGHT), Image.Resampling.BILINEAR)
    sheet = Image.new("RGB", (PADDED_WIDTH, PADDED_HEIGHT), "white")
    sheet.paste(image, (0, 0))
    pixels = np.asarray(sheet, dtype=np.float32) / 255
    return torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1).contiguous()


def loader(dataset: LineImages, batch_size: int, workers: int, training: bool) -> DataLoader:
    """Make the usual loader; its workers are started at the beginning of each epoch."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=training,
        num_workers=workers,
        drop_last=training,
        pin_memory=torch.cuda.is_available(),
    )
