"""Claim: a validation pass is nearly all forward.

    python -m benchmarks.validation [--data_root DIR] [--backbones resnet_thin resnet18]

Measures windows/s of the program's pass (train.evaluate: windows, crops, forward, logits by line,
metrics) and of the model's forward pass alone on the same windows, cut beforehand, in alternation,
also with its batch norms folded into the convolutions, as the pass does it; then lines/s of the
pass and of the obvious way, which decodes each image and squeezes it to one window.

JSON: ratio: pass / forward alone on the CPU, first backbone; cpu_ratio: the same of CPU time, which
holds on a busy machine too; folded_ratio, folded_cpu_ratio: against the folded model's forward.
squeezed_ratio: lines/s of the obvious way / lines/s of the pass; it looks at one window a line, the
pass at several.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

import train
from benchmarks import common
from benchmarks.obvious import LineImages, Squeezed, loader
from data import LineSet
from model import WriterModel, for_inference
from writer_search.common.environment import as_in_a_trial
from writer_search.config import TrialConfig
from writer_search.training import evaluation
from writer_search.training.batches import Lines, gather, places, strip_on, windows
from writer_search.training.state import TrainingState


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_for(__doc__)
    common.add_data_flags(parser)
    parser.add_argument("--backbones", nargs="+", default=["resnet_thin", "resnet18"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2, help="of the obvious way's loader")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    print(common.describe_machine())
    result: dict[str, float] = {}
    with common.line_images(args) as (root, cache_dir):
        for device in common.devices():
            rows = []
            for backbone in args.backbones:
                config = common.trial_config(device, backbone)
                data = common.decoded(root, cache_dir, config.line_height)
                rates = Bench(config, data, root, device).rates(args)
                rows.append([f"{backbone}, {config.precision}", *rates.values()])
                result = result or {k: v for k, v in rates.items() if k.endswith("ratio")}
            header = [
                "",
                "pass",
                "forward",
                "ratio",
                "of CPU",
                "folded",
                "ratio",
                "of CPU",
                "pass lines/s",
                "squeezed lines/s",
                "ratio",
            ]
            common.print_table(f"{device}: windows/s", header, rows)
    common.print_result(**result)
    return 0


class Bench:
    """One configuration on one device, and its sides."""

    def __init__(self, config: TrialConfig, data: LineSet, root: Path, device: str) -> None:
        self.config, self.data, self.root, self.device = config, data, root, device
        on = torch.device(device)
        self.lines = Lines.of(data, "val", strip_on(data, on), on)
        self.model = TrainingState.start(config, len(data.writers), on).average
        self.folded = for_inference(self.model)
        line, offsets = windows(self.lines.widths, config.crop_width)
        place = places(self.lines, line, offsets)
        self.windows = len(line)
        parts = torch.split(
            torch.arange(self.windows, device=line.device),
            evaluation.windows_at_once(self.lines.device),
        )
        self.resident = [gather(self.lines, place[part], config.crop_width) for part in parts]

    def evaluate(self) -> None:
        train.evaluate(self.model, self.config, self.lines, self.data.writers)

    @torch.inference_mode()
    def forward(self, model: WriterModel) -> None:
        model.eval()
        for images in self.resident:
            with train.autocast(self.config, torch.device(self.device)):
                model(images)

    def rates(self, args: argparse.Namespace) -> dict[str, float]:
        """Give rates and ratios of the sides."""
        config = self.config
        chosen = self.data.select("val")
        paths = [self.root / self.data.paths[index] for index in chosen]
        read = Squeezed(config.line_height, config.crop_width, training=False)
        dataset = LineImages(paths, self.data.labels[chosen].tolist(), read)
        batches = loader(dataset, evaluation.EVALUATION_BATCH, args.workers, training=False)

        @torch.inference_mode()
        def squeezed() -> None:
            for images, _ in batches:
                with train.autocast(config, torch.device(self.device)):
                    self.folded(
                        images.to(self.device).contiguous(memory_format=torch.channels_last)
                    )

        sides = {
            "pass": self.evaluate,
            "forward": lambda: self.forward(self.model),
            "folded": lambda: self.forward(self.folded),
            "squeezed": squeezed,
        }
        seconds, cpu_seconds = common.alternate(sides, args.rounds, self.device)
        return {
            "pass": self.windows / median(seconds["pass"]),
            "forward": self.windows / median(seconds["forward"]),
            "ratio": common.ratio(seconds["forward"], seconds["pass"]),
            "cpu_ratio": common.ratio(cpu_seconds["forward"], cpu_seconds["pass"]),
            "folded": self.windows / median(seconds["folded"]),
            "folded_ratio": common.ratio(seconds["folded"], seconds["pass"]),
            "folded_cpu_ratio": common.ratio(cpu_seconds["folded"], cpu_seconds["pass"]),
            "pass lines/s": len(self.lines) / median(seconds["pass"]),
            "squeezed lines/s": len(self.lines) / median(seconds["squeezed"]),
            "squeezed_ratio": common.ratio(seconds["pass"], seconds["squeezed"]),
        }


if __name__ == "__main__":
    as_in_a_trial()
    raise SystemExit(main())
