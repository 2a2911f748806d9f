"""Order, windows, crops and augmentation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data import SPLITS, LineSet
from writer_search.lines.decoding import INK_DEVIATION
from writer_search.training.batches import (
    EpochImages,
    Lines,
    Noise,
    affine_grid,
    change_ink,
    cut,
    darkest_neighbours,
    distort,
    draw_geometry,
    draw_ink,
    epoch_order,
    gather,
    places,
    random_offsets,
    strip_on,
    windows,
)

CROP = 32
HEIGHT = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unbalanced_labels(seed: int) -> NDArray[np.int64]:
    """Labels of seven writers with 1 to 90 lines each, in random order."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.repeat(np.arange(7), rng.integers(1, 90, 7)))


# ------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("seed", range(5))
def test_alpha_zero_takes_every_line_once(seed: int) -> None:
    labels = unbalanced_labels(seed)
    order = epoch_order(labels, 0.0, np.random.default_rng(seed))
    assert np.array_equal(np.sort(order), np.arange(len(labels)))
    assert not np.array_equal(order, np.arange(len(labels)))


def test_alpha_one_takes_every_writer_equally_often() -> None:
    for seed in range(20):
        labels = unbalanced_labels(seed)
        order = epoch_order(labels, 1.0, np.random.default_rng(seed))
        counts = np.bincount(labels[order], minlength=7)
        assert np.abs(counts - len(labels) / 7).max() <= 2, counts


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_a_line_is_drawn_as_often_as_its_expectation_rounded(seed: int, alpha: float) -> None:
    labels = unbalanced_labels(seed)
    weights = np.bincount(labels)[labels] ** -alpha
    expected = weights * len(labels) / weights.sum()
    order = epoch_order(labels, alpha, np.random.default_rng(seed))
    drawn = np.bincount(order, minlength=len(labels))
    assert len(order) == len(labels)
    # An expectation that is whole but for rounding may take either neighbour.
    assert (drawn >= np.floor(expected - 1e-9)).all()
    assert (drawn <= np.ceil(expected + 1e-9)).all()


def test_every_line_is_drawn_at_some_time() -> None:
    labels = np.repeat([0, 1], [100, 2])
    orders = [epoch_order(labels, 1.0, np.random.default_rng(epoch)) for epoch in range(30)]
    assert len(set(np.concatenate(orders))) == len(labels)


def test_order_depends_on_the_random_numbers_alone() -> None:
    labels = unbalanced_labels(0)
    one, same, other = (epoch_order(labels, 0.5, np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_writers_do_not_come_in_blocks() -> None:
    labels = np.repeat([0, 1], 200)
    for alpha in (0.0, 1.0):
        order = epoch_order(labels, alpha, np.random.default_rng(0))
        assert 140 < np.count_nonzero(np.diff(labels[order])) < 260


# --------------------------------------------------------------------------------------- windows


def test_windows_cover_each_line_and_nothing_else() -> None:
    widths = torch.arange(1, 5 * CROP)
    line, offset = windows(widths, CROP)
    assert line.dtype == offset.dtype == torch.int64
    assert torch.equal(line, line.sort().values)
    for number, width in enumerate(widths.tolist()):
        own = offset[line == number]
        assert len(own) == max(1, -(-width // CROP))  # as few as can cover it
        if width <= CROP:
            assert own.tolist() == [0]
            continue
        assert own.min() == 0
        assert own.max() == width - CROP
        covered = torch.zeros(width, dtype=torch.bool)
        for start in own.tolist():
            covered[start : start + CROP] = True
        assert covered.all()


def test_windows_of_a_line_do_not_depend_on_its_neighbours() -> None:
    widths = torch.tensor([10, 100, 33, 64, 65, 1])
    line, offset = windows(widths, CROP)
    for number in range(len(widths)):
        _, alone = windows(widths[number : number + 1], CROP)
        assert torch.equal(alone, offset[line == number])


# ----------------------------------------------------------------------------------------- crops


@pytest.fixture(scope="module")
def lines() -> Lines:
    """Lines of many widths side by side, without a zero in them."""
    rng = np.random.default_rng(0)
    widths = torch.tensor([5, 200, 31, 32, 33, 64, 1])
    strip = torch.from_numpy(rng.integers(1, 256, (1 + int(widths.sum()), HEIGHT), np.uint8))
    strip[0] = 0
    starts = 1 + widths.cumsum(0) - widths
    zeros = torch.zeros_like(widths)
    return Lines(strip, starts, widths, zeros, zeros, strip.device)


def gathered(lines: Lines, chosen: Tensor, offsets: Tensor, crop_width: int = CROP) -> Tensor:
    return gather(lines, places(lines, chosen, offsets), crop_width)


@pytest.mark.parametrize("offset", [0, 3, -4, -31, -32, -40, 100, 180, 199, 200, 1000])
def test_a_crop_is_a_slice_of_its_line_and_zero_outside(lines: Lines, offset: int) -> None:
    chosen = torch.arange(len(lines)).flip(0)
    crops = gathered(lines, chosen, torch.full((len(lines),), offset))
    assert crops.shape == (len(lines), 1, HEIGHT, CROP)
    assert crops.dtype == torch.float32
    for crop, number in zip(crops, chosen.tolist(), strict=True):
        start, width = int(lines.starts[number]), int(lines.widths[number])
        expected = torch.zeros(HEIGHT, CROP)
        for column in range(CROP):
            if 0 <= offset + column < width:
                expected[:, column] = lines.strip[start + offset + column] / INK_DEVIATION
        assert torch.equal(crop[0], expected)


def test_a_batch_may_hold_a_line_twice(lines: Lines) -> None:
    crops = gathered(lines, torch.tensor([1, 1, 1]), torch.tensor([0, 7, 0]))
    assert torch.equal(crops[0], crops[2])
    assert torch.equal(crops[0][..., 7:], crops[1][..., :-7])


def test_random_crops_stay_inside_and_reach_both_ends() -> None:
    widths = torch.tensor([CROP + 5, CROP, CROP - 5, 1]).repeat_interleave(400)
    offsets = random_offsets(widths, CROP, generator()).reshape(4, 400)
    assert offsets.dtype == torch.int64
    assert sorted(set(offsets[0].tolist())) == list(range(6))
    assert set(offsets[1].tolist()) == {0}
    assert sorted(set(offsets[2].tolist())) == list(range(-5, 1))
    assert (offsets[3].min(), offsets[3].max()) == (1 - CROP, 0)


def test_a_narrow_line_stands_wholly_in_its_crop(lines: Lines) -> None:
    chosen = torch.tensor([0, 2, 6]).repeat(50)
    offsets = random_offsets(lines.widths[chosen], CROP, generator())
    inked = (gathered(lines, chosen, offsets) > 0).all(2).sum((1, 2))
    assert torch.equal(inked, lines.widths[chosen])


def test_random_crops_depend_on_the_generator_alone() -> None:
    widths = torch.full((50,), 500)
    one, same, other = (random_offsets(widths, CROP, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_lines_of_a_split_are_those_of_the_set(data: LineSet) -> None:
    strip = strip_on(data, torch.device("cpu"))
    for split in SPLITS:
        own = Lines.of(data, split, strip)
        chosen = data.select(split)
        assert len(own) == len(chosen) > 0
        assert own.labels.tolist() == data.labels[chosen].tolist()
        assert sorted(set(own.pages.tolist())) == list(range(len(set(data.pages[chosen]))))
        crops = gathered(own, torch.arange(len(own)), torch.zeros(len(own), dtype=torch.int64), 16)
        for crop, index in zip(crops, chosen, strict=True):
            start = data.starts[index]
            columns = torch.from_numpy(np.array(data.strip[start : start + 16]))
            assert torch.equal(crop[0] * INK_DEVIATION, columns.T.float())


def test_crops_of_whole_lines_have_unit_deviation(data: LineSet) -> None:
    lines = Lines.of(data, "train", strip_on(data, torch.device("cpu")))
    for number in range(len(lines)):
        width = int(lines.widths[number])
        whole = gathered(lines, torch.tensor([number]), torch.tensor([0]), width)
        assert whole.std().item() == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------------------------- augmentation


def blot(batch: int = 16, height: int = 64, width: int = 256) -> Tensor:
    """The same ink in the middle of each crop of a batch, uint8, three deviations dark."""
    crop = torch.zeros(1, 1, height, width, dtype=torch.uint8)
    crop[..., height // 4 : -height // 4, width // 4 : -width // 4] = 3 * int(INK_DEVIATION)
    return crop.repeat(batch, 1, 1, 1)


def as_image(crops: Tensor) -> Tensor:
    return crops / INK_DEVIATION


def moved(crops: Tensor, strength: float, seed: int = 0) -> Tensor:
    """Distort a batch of crops, as images."""
    theta = draw_geometry(crops.shape[:1], strength, *crops.shape[2:], generator(seed))
    return distort(as_image(crops), theta)


def inked(crops: Tensor, strength: float, seed: int = 0) -> Tensor:
    """Change the ink of a batch of crops."""
    return change_ink(crops, draw_ink(crops.shape[:1], strength, generator(seed)))


@pytest.mark.parametrize("change", [moved, inked])
@pytest.mark.parametrize("strength", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 1, 16, 32), (5, 1, 64, 96)])
def test_a_change_keeps_shape_and_is_finite(
    change: Callable[..., Tensor], strength: float, shape: tuple[int, ...]
) -> None:
    crops = torch.randint(256, shape, generator=generator(), dtype=torch.uint8)
    before = crops.clone()
    changed = change(crops, strength)
    assert changed.shape == crops.shape
    assert changed.dtype == torch.float32
    assert changed.isfinite().all()
    assert torch.equal(crops, before)


def test_strength_zero_is_identity() -> None:
    crops = torch.randint(256, (3, 1, 16, 32), generator=generator(), dtype=torch.uint8)
    assert torch.allclose(moved(crops, 0.0), as_image(crops), atol=1e-4)
    assert torch.allclose(inked(crops, 0.0), as_image(crops))


def test_strength_scales_the_change() -> None:
    crops = blot()
    for change in (moved, inked):
        weak, strong = (
            (change(crops, strength) - as_image(crops)).abs().mean() for strength in (0.2, 1.0)
        )
        assert 0 < 2 * weak < strong


def test_distortion_keeps_the_ink() -> None:
    """Scale and stretch of 10 % each change an area by a third at most."""
    crops = blot(batch=100)
    ink = moved(crops, 1.0).sum((1, 2, 3)) / as_image(crops[0]).sum()
    assert 0.7 < ink.min() < 0.95
    assert 1.05 < ink.max() < 1.4
    assert ink.mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("width", [64, 256, 512])
def test_distortion_turns_a_stroke_by_few_pixels_at_any_width(width: int) -> None:
    """Twice the strength: 2 degrees, a shear of a tenth, 8 pixels and a few rows."""
    height = 64
    rows = torch.arange(height).float()
    level = torch.zeros(50, 1, height, width)
    level[:, :, height // 2 - 2 : height // 2 + 2] = 1
    turned = moved(level, 2.0)[:, 0, :, width // 4 : -width // 4]
    centre = (turned * rows[:, None]).sum(1) / turned.sum(1)  # (batch, columns)
    rise = centre[:, -1] - centre[:, 0]
    most = np.tan(np.radians(2)) * width / 2 * 1.3
    assert 0.4 * most < rise.abs().max() < most
    assert (centre - height / 2).abs().max() < most + 4

    columns = torch.arange(width).float()
    upright = torch.zeros(50, 1, height, width)
    upright[..., width // 2 - 2 : width // 2 + 2] = 1
    leaning = moved(upright, 2.0)[:, 0, height // 4 : -height // 4]
    centre = (leaning * columns).sum(2) / leaning.sum(2)  # (batch, rows)
    lean = centre[:, -1] - centre[:, 0]
    most = (0.1 + np.radians(2)) * height / 2 * 1.3
    assert 0.4 * most < lean.abs().max() < most


def test_change_of_ink_moves_no_stroke() -> None:
    crops = blot(batch=32)
    changed = inked(crops, 1.0)
    inside, outside = crops > 0, crops == 0
    for before, after in zip(as_image(crops), changed, strict=True):
        together = torch.stack([before.flatten(), after.flatten()])
        assert torch.corrcoef(together)[0, 1] > 0.95
    ratio = changed[inside].reshape(32, -1).mean(1) / 3
    assert ratio.min() < 0.9
    assert ratio.max() > 1.1
    assert changed[outside].abs().mean() < 0.5


@pytest.mark.parametrize("shape", [(2, 1, 9, 12), (1, 1, 1, 5), (1, 1, 4, 1)])
def test_darkest_neighbours_are_those_of_a_window_of_three(shape: tuple[int, ...]) -> None:
    crops = torch.randint(256, shape, generator=generator(), dtype=torch.uint8)
    expected = F.max_pool2d(crops.double(), 3, 1, padding=1)
    for stored in (crops, crops.transpose(2, 3).contiguous().transpose(2, 3)):
        found = darkest_neighbours(stored)
        assert found.dtype == torch.uint8
        assert torch.equal(found.double(), expected)


# ------------------------------------------------------------------------------- an epoch's images


def drawn_images(
    lines: Lines, geometry: float = 1.0, photometry: float = 1.0, seed: int = 0
) -> EpochImages:
    order = torch.arange(12).reshape(3, 4) % len(lines)
    return EpochImages.draw(lines, order, CROP, geometry, photometry, seed)


def test_images_without_augmentation_are_the_crops(lines: Lines) -> None:
    drawn = drawn_images(lines, 0.0, 0.0)
    for number in range(3):
        images, _ = drawn.batch(number)
        chosen = torch.arange(4 * number, 4 * number + 4) % len(lines)
        assert torch.equal(images, gather(lines, drawn.place[number], CROP))
        first, start, end = drawn.place[number].squeeze(1).unbind(1)
        assert torch.equal(start, lines.starts[chosen])
        assert torch.equal(end, start + lines.widths[chosen])
        assert (first != start).any()


def test_labels_are_those_of_the_lines() -> None:
    strip, numbers = torch.zeros(100, HEIGHT, dtype=torch.uint8), torch.arange(7)
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    numbered = Lines(strip, numbers, torch.full((7,), 20), labels, numbers, strip.device)
    drawn = drawn_images(numbered)
    assert drawn.batch(1)[1].tolist() == [5, 9, 2, 3]


def blotted_line() -> Lines:
    """One line as wide as a crop, with a blot in it."""
    strip = torch.zeros(1 + 2 * CROP, HEIGHT, dtype=torch.uint8)
    strip[CROP // 2 : CROP, 2:6] = 120
    one = torch.ones(1, dtype=torch.int64)
    return Lines(strip, one, CROP * one, one, one, strip.device)


def differences(images: Tensor) -> Tensor:
    """Give the largest difference of each image to each."""
    return (images[:, None] - images[None]).abs().amax((2, 3, 4))


@pytest.mark.parametrize("geometry", [0.0, 1.0])
def test_augmentation_differs_between_images_and_follows_the_seed(geometry: float) -> None:
    def images(seed: int) -> Tensor:
        drawn = drawn_images(blotted_line(), geometry, 1.0, seed)
        return torch.cat([drawn.batch(number)[0] for number in range(3)])

    first, same, other = (images(seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert (differences(first) + torch.eye(12) > 0.01).all()


@pytest.mark.parametrize(("geometry", "photometry"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_batches_take_turns_at_geometry_and_ink(
    geometry: float, photometry: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noise, "of", lambda noise, number: torch.zeros(4, 1, HEIGHT, CROP))
    lines = blotted_line()
    drawn = drawn_images(lines, geometry, photometry)
    for number in range(3):
        images, _ = drawn.batch(number)
        crops = cut(lines, drawn.place[number], CROP)
        if number % 2 == 1 and drawn.ink is not None:
            expected = change_ink(crops, drawn.ink[number])
        elif number % 2 == 0 and drawn.geometry is not None:
            expected = distort(gather(lines, drawn.place[number], CROP), drawn.geometry[number])
        else:
            expected = gather(lines, drawn.place[number], CROP)
        assert torch.equal(images, expected)


def test_noise_reaches_the_images_and_differs_between_batches() -> None:
    """Of lines without ink the rest is paper, one level an image."""
    strip, one = torch.zeros(1 + 2 * CROP, 32, dtype=torch.uint8), torch.ones(1, dtype=torch.int64)
    lines = Lines(strip, one, CROP * one, one, one, strip.device)
    drawn = drawn_images(lines, geometry=0.0)
    assert drawn.ink is not None
    paper, noise = torch.stack(drawn.ink)[:, :, 2:].unbind(2)
    paper[::2] = 0  # in turns with geometry
    rest = torch.stack([drawn.batch(number)[0] for number in range(3)]) - paper
    torch.testing.assert_close(rest.std((2, 3, 4)), noise.flatten(1), rtol=0.15, atol=1e-3)
    together = torch.corrcoef(rest.flatten(2).flatten(0, 1))
    assert (together - torch.eye(12)).abs().max() < 0.2


def test_noise_of_many_images_of_few_pixels() -> None:
    noise = Noise.draw(batch_size=500, height=8, width=16, generator=generator())
    for number in (0, 1, 1000):
        assert noise.of(number).shape == (500, 1, 8, 16)


def test_noise_is_normal_and_differs_between_images_and_batches() -> None:
    noise = Noise.draw(batch_size=32, height=64, width=256, generator=generator())
    batches = torch.stack([noise.of(number) for number in range(34)])
    assert batches.shape == (34, 32, 1, 64, 256)
    assert batches.mean().item() == pytest.approx(0, abs=0.02)
    assert batches.std().item() == pytest.approx(1, abs=0.02)
    firsts = batches[..., 0, 0, :8].reshape(34 * 32, 8)
    assert len(firsts.unique(dim=0)) == 34 * 32
    assert abs(torch.corrcoef(batches[0].flatten(1))[0, 1].item()) < 0.05


def test_affine_grid_is_that_of_torch() -> None:
    theta = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = F.affine_grid(theta, [3, 1, 10, 30], align_corners=False)
    torch.testing.assert_close(affine_grid(theta, 10, 30), expected)
