"""What the benchmarks share: lines to work on, alternation of sides, tables, the JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from data import LineSet, default_cache_dir, find_lines, load_lines
from writer_search.common.cores import usable_cores
from writer_search.config import TrialConfig
from writer_search.demo import make_lines


def parser_for(documentation: str | None) -> argparse.ArgumentParser:
    """Make a parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of torch")
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says which lines to measure on."""
    parser.add_argument("--data_root", type=Path, help="line images (default: synthetic ones)")
    parser.add_argument("--writers", type=int, default=8, help="of synthetic lines")
    parser.add_argument("--pages", type=int, default=12, help="of each writer; a third validates")


@contextmanager
def line_images(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """Give the data root and the cache directory; synthetic lines vanish afterwards."""
    if args.data_root is not None:
        yield args.data_root, default_cache_dir()
        return
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "lines"
        held_out = max(1, args.pages // 3)
        pages = {"train": max(1, args.pages - held_out), "val": held_out}
        make_lines(root, num_writers=args.writers, pages_per_split=pages)
        yield root, Path(directory) / "cache"


def decoded(data_root: Path, cache_dir: Path, line_height: int) -> LineSet:
    """Open all lines, decoded to a height."""
    return load_lines(data_root, find_lines(data_root), line_height, cache_dir)


def trial_config(device: str, backbone: str, **values: Any) -> TrialConfig:
    """Give the default trial of a device's tier, in the precision that trials have there."""
    from writer_search.processes.machine import _faster_precision
    from writer_search.space import default_space

    if device == "cuda":
        fixed = default_space("gpu", pretrained=False).fixed
        values = {n: fixed[n] for n in ("line_height", "crop_width", "batch_size")} | values
    if "precision" not in values:
        values["precision"] = gpu_precision() if device == "cuda" else _faster_precision(backbone)
    return TrialConfig(seed=0, epochs=1000, patience=1000, backbone=backbone, **values)


def gpu_precision() -> str:
    """Give what trials compute in on this process's GPU, which it opens for that."""
    import torch

    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def devices() -> list[str]:
    """Name the devices to measure on."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def default_batch_sizes(device: str, wanted: Sequence[int]) -> Sequence[int]:
    """Give the batch sizes that were asked for, or the default of the device's tier."""
    return wanted or ([64] if device == "cuda" else [32])


def seconds_of(work: Callable[[], object], device: str = "cpu") -> float:
    """Time one call, with all that it started on the device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def alternate(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time each side once a round, after a round to warm up; every other round backwards.

    What else the machine does then slows all sides alike. Returns seconds by the clock, and seconds
    of CPU, of this process and all its threads.
    """
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        names = list(sides)[:: 1 if number % 2 else -1]
        for name in names:
            before = time.process_time()
            seconds = seconds_of(sides[name], device)
            if number > 0:
                wall[name].append(seconds)
                cpu[name].append(time.process_time() - before)
    return wall, cpu


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Give the median of the ratios of what was measured in the same round."""
    return median(n / d for n, d in zip(numerators, denominators, strict=True))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, numbers to three digits or more, the first column to the left."""
    cells = [list(header), *([shown(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([first, *rest]).rstrip(), flush=True)


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def describe_machine(gpus: str = "") -> str:
    """Say in one line what is measured on. gpus: their names; asked for where none are given."""
    import torch

    processor = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    if not gpus:
        gpus = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu = f", {gpus}" if gpus else ""
    instructions = torch.backends.cpu.get_cpu_capability()  # type: ignore[no-untyped-call]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "optuna", "numpy"))
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    name = (names or [processor])[0]
    return f"{cores} cores of {name} ({instructions}){gpu}; Python {python}, {packages}"


def memory_mib(kind: str = "VmRSS") -> float:
    """Give this process's resident memory: VmRSS, or its parts RssAnon and RssFile."""
    with open("/proc/self/status") as file:
        found = {line.partition(":")[0]: line.split()[1] for line in file if "kB" in line}
    return int(found[kind]) / 1024


def print_result(**keys: float | None) -> None:
    """Print the JSON line that ends each benchmark."""
    rounded = {key: None if value is None else round(value, 4) for key, value in keys.items()}
    print(json.dumps(rounded), flush=True)
