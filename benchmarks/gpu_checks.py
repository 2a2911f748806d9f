"""Checks of `benchmarks.gpu` that need no trial: setup, numbers, batches, speed of steps."""

from __future__ import annotations

import copy
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from data import LineSet
from train import train_epoch, training_step
from writer_search.config import TrialConfig
from writer_search.training.batches import EpochImages, Lines, strip_on
from writer_search.training.evaluation import line_logits
from writer_search.training.optimisation import autocast, build_model, steps_per_epoch
from writer_search.training.state import TrainingState

CPU = torch.device("cpu")
FLOAT32, TF32, BFLOAT16 = 1e-4, 5e-3, 3e-2  # of the largest value: what rounding may change


@dataclass(frozen=True)
class Found:
    """What a check has found. passes: None where it cannot be judged."""

    passes: bool | None
    value: Any
    bar: Any = None


@dataclass(frozen=True)
class Setting:
    """What checks run on. values: of the trial's configuration, for tests."""

    device: str
    root: Path
    work: Path
    values: dict[str, Any] = field(default_factory=dict)
    steps: int = 20

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    def config(self, backbone: str = "resnet18", **values: Any) -> TrialConfig:
        precision = {"precision": "bfloat16" if self.device == "cuda" else "float32"}
        values = precision | values | self.values
        return common.trial_config(self.device, values.pop("backbone", backbone), **values)

    def data(self, config: TrialConfig) -> LineSet:
        return common.decoded(self.root, self.work / "cache", config.line_height)


def nvidia_smi(query: str) -> list[str]:
    """Ask nvidia-smi; nothing where it does not answer."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if done.returncode == 0]


def difference(found: Tensor, wanted: Tensor) -> float:
    """Give the largest difference as a share of the largest value."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def setup(setting: Setting) -> Found:
    """Let each GPU compute: a convolution in bfloat16 against the CPU, and a copy to it."""
    number = torch.cuda.device_count() if setting.device == "cuda" else 1
    gpus = []
    for index in range(number):
        place = torch.device("cuda", index) if setting.device == "cuda" else CPU
        images, weights = torch.randn(4, 16, 32, 64), torch.randn(16, 16, 3, 3)
        wanted = torch.nn.functional.conv2d(images, weights)
        own = (tensor.to(place).bfloat16() for tensor in (images, weights))
        gpu: dict[str, Any] = {"error": difference(torch.nn.functional.conv2d(*own), wanted)}
        if setting.device == "cuda":
            sent = torch.randn(1000).pin_memory()
            gpu["copied"] = torch.equal(sent.to(place, non_blocking=True).cpu(), sent)
            gpu["name"] = torch.cuda.get_device_name(index)
            gpu["free_gib"] = round(torch.cuda.mem_get_info(place)[0] / 2**30, 1)
        gpus.append(gpu)
    said = nvidia_smi("--query-gpu=driver_version,compute_mode,mig.mode.current")
    passes = all(gpu["error"] <= BFLOAT16 and gpu.get("copied", True) for gpu in gpus)
    return Found(passes, {"gpus": gpus, "driver_mode_mig": said}, BFLOAT16)


def logits(setting: Setting) -> Found:
    """Compare logits with the CPU's, and whom they name where the margin is clear."""
    kinds: tuple[dict[str, Any], ...] = (
        {"backbone": "resnet_thin", "pooling": "gem"},
        {"backbone": "resnet_thin", "pooling": "attention"},
        {"backbone": "tiny", "loss": "cosface"},
    )
    value, passes = {}, True
    for kind in kinds:
        config = replace(setting.config(), **kind, precision="float32")
        model, images = build_model(config, 20).eval(), torch.randn(16, 1, 64, 256)
        with torch.inference_mode():
            wanted = model(images)
        there = copy.deepcopy(model).to(setting.place)
        for name, bar in (("float32", FLOAT32), ("tf32", TF32), ("bfloat16", BFLOAT16)):
            answer = _answer(there, images.to(setting.place), config, name)
            apart = difference(answer, wanted)
            value[f"{kind['backbone']} {kind.get('pooling', 'cosface')} {name}"] = apart
            tolerance = bar * float(wanted.abs().max())
            passes = passes and apart <= bar and names_agree(answer, wanted, tolerance)
    return Found(passes, value, {"float32": FLOAT32, "tf32": TF32, "bfloat16": BFLOAT16})


def _answer(model: torch.nn.Module, images: Tensor, config: TrialConfig, name: str) -> Tensor:
    config = replace(config, precision="bfloat16" if name == "bfloat16" else "float32")
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        backend.allow_tf32 = name != "float32"
    with torch.inference_mode(), autocast(config, images.device):
        found: Tensor = model(images)
    return found.cpu()


def names_agree(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Tell whether both name the same writer, images aside where rounding may decide."""
    first, second = wanted.topk(2, dim=1).values.unbind(1)
    is_clear = first - second > 2 * tolerance
    return torch.equal(found.argmax(1)[is_clear], wanted.argmax(1)[is_clear])


def batches(setting: Setting) -> Found:
    """Compare crops and augmented images with the CPU's, from a strip there and on the host."""
    config = setting.config()
    data = setting.data(config)
    share, are_equal = 1.0, True
    on_host = torch.from_numpy(data.strip)
    for strip in (on_host.to(setting.place), on_host):
        for strength in (0.0, 1.0):
            made = []
            for own, place in ((strip, setting.place), (on_host, CPU)):
                lines = Lines.of(data, "train", own, place)
                order = torch.arange(32).view(2, 16) % len(lines)
                arguments = (order, config.crop_width, strength, strength, 3)
                drawn = EpochImages.draw(lines, *arguments)
                made.append(torch.cat([drawn.batch(number)[0].cpu() for number in range(2)]))
            if strength == 0:
                are_equal = are_equal and torch.equal(*made)
            near = (made[0] - made[1]).abs() <= 1e-4
            share = min(share, float(near.double().mean()))
    value = {"crops_equal": are_equal, "share_within_1e-4": share}
    return Found(are_equal and share >= 0.9999, value, 0.9999)


def twenty_steps(setting: Setting) -> Found:
    """Compare how far weights come apart with what another number of threads does on the CPU."""
    config = setting.config("resnet_thin", precision="float32", dropout=0.0)
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        backend.allow_tf32 = False
    one, two = (weights_after(setting, config, CPU, threads) for threads in (1, 2))
    there = weights_after(setting, config, setting.place, 1)
    threads, device = difference(two, one), difference(there, one)
    ratio = device / max(threads, 1e-7)
    return Found(ratio <= 20, {"device": device, "threads": threads, "ratio": ratio}, 20)


def weights_after(
    setting: Setting, config: TrialConfig, place: torch.device, threads: int
) -> Tensor:
    """Train some steps; give all weights in a row."""
    torch.set_num_threads(threads)
    state, lines, steps = ready(setting, config, place)
    train_epoch(state, config, lines, min(steps, setting.steps), lambda progress: None)
    return torch.cat([p.detach().flatten().cpu() for p in state.model.parameters()])


def ready(
    setting: Setting, config: TrialConfig, place: torch.device, is_on_host: bool = False
) -> tuple[TrainingState, Lines, int]:
    """Make what an epoch needs, and count its steps."""
    data = setting.data(config)
    strip = torch.from_numpy(data.strip) if is_on_host else strip_on(data, place)
    lines = Lines.of(data, "train", strip, place)
    state = TrainingState.start(config, len(data.writers), place)
    return state, lines, steps_per_epoch(config, len(lines))


def epochs_of(setting: Setting, config: TrialConfig, is_on_host: bool = False) -> Any:
    """Give a function that trains one more epoch."""
    state, lines, steps = ready(setting, config, setting.place, is_on_host)

    def epoch() -> None:
        train_epoch(state, config, lines, steps, lambda progress: None)
        state.epoch += 1

    return epoch, state, steps


def seconds(work: Callable[[], object], device: str) -> float:
    """Time a call: the median of five, after two to warm up."""
    return median([common.seconds_of(work, device) for _ in range(7)][2:])


def epoch_over_ceiling(setting: Setting) -> Found:
    """Compare an epoch with its steps alone, on one batch that is there."""
    value = {}
    for backbone in ("resnet_thin", "resnet18"):
        config = setting.config(backbone)
        epoch, state, steps = epochs_of(setting, config)
        shape = (config.batch_size, 1, config.line_height, config.crop_width)
        images = torch.randn(shape, device=setting.place)
        labels = torch.zeros(config.batch_size, dtype=torch.long, device=setting.place)

        def ceiling(own: Any = (state, config, images, labels), steps: int = steps) -> None:
            for _ in range(steps):
                training_step(*own)

        value[backbone] = seconds(ceiling, setting.device) / seconds(epoch, setting.device)
    return Found(min(value.values()) >= 0.95, value, 0.95)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what operations read and write."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = tree_iter((args, result))
            self.bytes += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        return result


def roofline(setting: Setting) -> Found:
    """Compare the images a second with what multiplications and memory would allow."""
    config = setting.config()
    few = replace(config, batch_size=2)
    state, _, _ = ready(setting, few, CPU)
    images, labels = torch.randn(2, 1, config.line_height, config.crop_width), torch.zeros(2).long()
    with FlopCounterMode(display=False) as flops:
        training_step(state, few, images, labels)
    with Traffic() as traffic:
        training_step(state, few, images, labels)
    place, size = setting.place, 8192 if setting.device == "cuda" else 256
    matrix = torch.randn(size, size, device=place, dtype=torch.bfloat16)
    rate = 2 * size**3 / seconds(lambda: matrix @ matrix, setting.device)
    copied = 2 * matrix.nbytes / seconds(lambda: matrix.clone(), setting.device)
    there, _, _ = ready(setting, config, place)
    batch = images[:1].to(place).repeat(config.batch_size, 1, 1, 1)
    wanted = torch.zeros(config.batch_size, dtype=torch.long, device=place)
    step = seconds(lambda: training_step(there, config, batch, wanted), setting.device)
    allowed = min(rate / (flops.get_total_flops() / 2), copied / (traffic.bytes / 2))
    share = config.batch_size / step / allowed
    return Found(
        share >= 0.35, {"share": share, "images_per_second": config.batch_size / step}, 0.35
    )


def host_syncs(setting: Setting) -> Found:
    """Count how often the host waits for the device in an epoch, the reading of losses included."""
    epoch, _, steps = epochs_of(setting, setting.config())
    epoch()
    if setting.device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        epoch()
    if setting.device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    found = sum("synchronizing" in str(warning.message) for warning in told)
    return Found(found <= 10, {"an_epoch": found, "steps": steps}, 10)


def host_strip(setting: Setting) -> Found:
    """Compare epochs with crops cut on the host with those where the strip is on the device."""
    config = setting.config()
    there, here = (
        seconds(epochs_of(setting, config, is_on_host)[0], setting.device)
        for is_on_host in (False, True)
    )
    return Found(there / here >= 0.9, there / here, 0.9)


def prediction(setting: Setting) -> Found:
    """Compare the probabilities of a trained model on the device with the CPU's."""
    config = setting.config("resnet_thin")
    epoch, state, _ = epochs_of(setting, config)
    ends = time.monotonic() + 10
    for _ in range(5):
        if time.monotonic() < ends:
            epoch()
    data, found = setting.data(config), []
    for place in (setting.place, CPU):
        lines = Lines.of(data, "val", strip_on(data, place), place)
        own = replace(config, precision=config.precision if place != CPU else "float32")
        with torch.inference_mode():
            found.append(line_logits(state.average.to(place), own, lines, len(data.writers)))
    there, here = (logits.softmax(1) for logits in found)
    apart = float((there - here).abs().max())
    return Found(apart <= 0.02 and names_agree(there, here, 0.02), apart, 0.02)
