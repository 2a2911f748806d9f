"""Claim: an epoch is nearly all forward, backward and optimiser.

    python -m benchmarks.epoch [--data_root DIR] [--backbones resnet_thin resnet18]

Measures images/s of the program's epoch (train.train_epoch on cached lines: order, crops,
augmentation, training step, moving average) and of the same model, loss and optimiser on one batch
that stays where it is (the ceiling), in alternation. Also of the epoch while a state saved at its
start is written: what that takes longer, by the interval between saves, is what saving costs. Then
the same model fed the obvious way.

JSON: ratio: epoch / ceiling on the CPU, first backbone and batch size; cpu_ratio: the same of CPU
time, which holds on a busy machine too. saving_ratio: share of the training time that saving takes,
cpu_saving_ratio: of its CPU time. squeezed_ratio and
padded_ratio: images/s of the two obvious ways / ceiling, as a whole epoch with its training.
The padded way trains on images 17 times as large.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import train
from benchmarks import common
from benchmarks.obvious import LineImages, Squeezed, loader, padded
from data import LineSet
from writer_search.common.environment import as_in_a_trial
from writer_search.config import TrialConfig
from writer_search.training.batches import (
    EpochImages,
    Lines,
    as_images,
    change_ink,
    cut,
    distort,
    epoch_order,
    strip_on,
)
from writer_search.training.checkpoints import Checkpoints
from writer_search.training.state import TrainingState


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_for(__doc__)
    common.add_data_flags(parser)
    parser.add_argument("--backbones", nargs="+", default=["resnet_thin", "resnet18"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="of a round's part of an epoch")
    parser.add_argument("--obvious_steps", type=int, default=6, help="0: leave it out")
    parser.add_argument("--padded_steps", type=int, default=1, help="0: leave it out")
    parser.add_argument("--workers", type=int, default=2, help="of the obvious way's loaders")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    print(common.describe_machine())
    result: dict[str, float | None] = {}
    with common.line_images(args) as (root, cache_dir):
        for device in common.devices():
            ratios = measure_device(args, device, root, cache_dir)
            result = result or ratios
    common.print_result(**result)
    return 0


def measure_device(
    args: argparse.Namespace, device: str, root: Path, cache_dir: Path
) -> dict[str, float | None]:
    """Print a device's tables; give the ratios of its first configuration."""
    rows, parts, ratios = [], [], []
    for backbone in args.backbones:
        for batch_size in common.default_batch_sizes(device, args.batch_sizes):
            config = common.trial_config(device, backbone, batch_size=batch_size)
            data = common.decoded(root, cache_dir, config.line_height)
            with tempfile.TemporaryDirectory() as trial_dir:
                bench = Bench(config, data, root, device, Path(trial_dir))
                rates = bench.rates(args)
            name = f"{backbone} x {batch_size}, {config.precision}"
            rows.append([name, *rates.values()])
            ratios.append(rates)
            parts.append([name, *bench.parts(args.rounds).values()])
    header = ["", "epoch", "ceiling", "ratio", "of CPU", "saving, s", "each, s", "ratio", "of CPU"]
    header += ["squeezed", "ratio", "padded", "ratio"]
    common.print_table(f"{device}: images/s", header, rows)
    header = ["", "step", "crops", "photometry", "geometry", "noise", "average", "draws"]
    common.print_table(
        f"{device}: where the time goes, ms a batch (CPU: of all threads)", header, parts
    )
    return {key: rate for key, rate in ratios[0].items() if key.endswith("ratio")}


class Bench:
    """One configuration on one device: its sides, and the parts of its epoch."""

    def __init__(
        self, config: TrialConfig, data: LineSet, root: Path, device: str, trial_dir: Path
    ) -> None:
        self.config, self.data, self.root, self.device = config, data, root, device
        place = torch.device(device)
        self.lines = Lines.of(data, "train", strip_on(data, place), place)
        self.state = TrainingState.start(config, len(data.writers), place)
        self.fixed_state = TrainingState.start(config, len(data.writers), place)
        self.files = Checkpoints(trial_dir, config, data, device=place, expected=self.state.nbytes)
        # A batch with all that is drawn for it.
        self.drawn = self.draw(torch.arange(config.batch_size)[None] % len(self.lines))
        self.images, self.labels = self.drawn.batch(0)

    def draw(self, order: Tensor) -> EpochImages:
        return EpochImages.draw(self.lines, order, self.config.crop_width, 1.0, 1.0, seed=0)

    def epoch(self, steps: int) -> None:
        """Train the program's epoch, cut short after some steps."""
        self.state.step = self.state.epoch * steps
        train.train_epoch(self.state, self.config, self.lines, steps, lambda progress: None)
        self.state.epoch += 1

    def saved(self, steps: int) -> None:
        """Train as much while a state is written, with a new best model."""
        self.state.best = {"epoch": self.state.epoch, "confusion": torch.zeros(1)}
        self.files.end_epoch([], self.state.average)
        self.files.save(self.state.contents)
        self.epoch(steps)
        self.files.wait()

    def resident(self, steps: int) -> None:
        """Take as many steps on one batch."""
        total = torch.zeros((), device=self.device)
        for _ in range(steps):
            total += train.training_step(self.fixed_state, self.config, self.images, self.labels)
        total.item()

    def feed(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Train on what a loader gives, made grey for the model."""
        for images, labels in batches:
            grey = images.to(self.device, non_blocking=True).mean(1, keepdim=True)
            train.training_step(self.fixed_state, self.config, grey, labels.to(self.device))

    def rates(self, args: argparse.Namespace) -> dict[str, float | None]:
        """Give images/s of all sides, and their ratios to the ceiling."""
        steps = min(args.steps, train.steps_per_epoch(self.config, len(self.lines)))
        sides = {
            "epoch": lambda: self.epoch(steps),
            "saved": lambda: self.saved(steps),
            "ceiling": lambda: self.resident(steps),
        }
        seconds, cpu_seconds = common.alternate(sides, args.rounds, self.device)
        images = steps * self.config.batch_size
        ceiling = images / median(seconds["ceiling"])
        cost, cpu_cost = (
            median(b - a for a, b in zip(of["epoch"], of["saved"], strict=True))
            for of in (seconds, cpu_seconds)
        )
        interval = self.files.times.interval(median(seconds["epoch"]) / steps)
        rates: dict[str, float | None] = {
            "epoch": images / median(seconds["epoch"]),
            "ceiling": ceiling,
            "ratio": common.ratio(seconds["ceiling"], seconds["epoch"]),
            "cpu_ratio": common.ratio(cpu_seconds["ceiling"], cpu_seconds["epoch"]),
            "saving_seconds": cost,
            "saving_interval": interval,
            "saving_ratio": cost / interval,
            # Of as many cores as there are threads.
            "cpu_saving_ratio": cpu_cost / torch.get_num_threads() / interval,
        }
        for name, most in (("squeezed", args.obvious_steps), ("padded", args.padded_steps)):
            rate = self.obvious_rate(name, most, args.workers) if most else None
            rates[name] = rate
            rates[f"{name}_ratio"] = rate / ceiling if rate else None
        return rates

    def obvious_rate(self, name: str, steps: int, workers: int) -> float:
        """Give images/s of an epoch of so many steps fed from a loader: the median of three."""
        config = self.config
        chosen = self.data.select("train")
        chosen = np.resize(chosen, steps * config.batch_size)
        read: Any = padded
        if name == "squeezed":
            read = Squeezed(config.line_height, config.crop_width, training=True)
        paths = [self.root / self.data.paths[index] for index in chosen]
        dataset = LineImages(paths, self.data.labels[chosen].tolist(), read)
        batches = loader(dataset, config.batch_size, workers, training=True)
        rounds = 3 if name == "squeezed" else 1
        sides = {name: lambda: self.feed(batches)}
        self.feed(islice(batches, 1) if rounds == 3 else [])
        seconds = [common.seconds_of(sides[name], self.device) for _ in range(rounds)]
        return len(dataset) / median(seconds)

    def parts(self, rounds: int) -> dict[str, float]:
        """Give the milliseconds of each part of a step, each measured alone."""
        state, config, lines, drawn = self.state, self.config, self.lines, self.drawn
        every_label, rng = lines.labels.cpu().numpy(), np.random.default_rng(0)
        steps = train.steps_per_epoch(config, len(lines))
        ink, geometry = drawn.ink, drawn.geometry
        assert ink is not None
        assert geometry is not None
        crops = cut(lines, drawn.place[0], config.crop_width)
        images = as_images(crops)

        def draws() -> None:
            order = epoch_order(every_label, config.sampler_alpha, rng)
            self.draw(torch.from_numpy(order[: steps * config.batch_size]).view(steps, -1))

        sides = {
            "step": lambda: train.training_step(self.fixed_state, config, self.images, self.labels),
            "crops": lambda: cut(lines, drawn.place[0], config.crop_width),
            "photometry": lambda: change_ink(crops, ink[0]),
            "geometry": lambda: distort(images, geometry[0]),
            "noise": lambda: images.addcmul_(drawn.noise.of(0), ink[0][:, 3]),
            "average": lambda: train.update_average(state.pairs, 10, 1000),
            "draws": draws,
        }
        seconds, cpu_seconds = common.alternate(sides, 3 * rounds, self.device)
        if self.device == "cpu":  # what the machine does beside has no part in these
            seconds = cpu_seconds
        milliseconds = {name: 1000 * median(values) for name, values in seconds.items()}
        milliseconds["draws"] /= steps  # those of an epoch
        for part in ("photometry", "geometry"):
            milliseconds[part] /= 2  # batches take turns at these
        milliseconds["average"] /= train.AVERAGE_STEPS
        return milliseconds


if __name__ == "__main__":
    as_in_a_trial()
    raise SystemExit(main())
