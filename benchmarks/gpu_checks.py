"""Checks of `benchmarks.gpu` that need no trial: setup, numbers, batches, speed of steps."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from data import LineSet
from train import CHECK_LOSS_STEPS, train_epoch, training_step
from writer_search.common.text import one_line
from writer_search.config import TrialConfig
from writer_search.lines.decoding import INK_DEVIATION
from writer_search.processes.child import open_device
from writer_search.processes.messages import Message, obey_in_thread
from writer_search.processes.questions import Question
from writer_search.training.batches import EpochImages, Lines, strip_on
from writer_search.training.optimisation import autocast, build_model, steps_per_epoch
from writer_search.training.state import TrainingState

CPU = torch.device("cpu")
SHARED_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"  # for NCCL
FLOAT32, TF32, BFLOAT16 = 1e-4, 5e-3, 3e-2  # of the largest value: what rounding may change
ROUNDS = 5  # of what is timed, after one to warm up


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
    seconds: float = 8.0  # of training that is timed by the clock
    precision: str = "float32"
    gpus: tuple[str, ...] = ()  # entries of CUDA_VISIBLE_DEVICES; checks of one GPU have the first
    uuids: tuple[str, ...] = ()  # the same GPUs, for nvidia-smi
    trials_at_once: int = 1  # on each GPU, as the check of that name advises
    images_per_second: float | None = None  # of all of these together

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    def config(self, backbone: str = "resnet18", **values: Any) -> TrialConfig:
        values = {"precision": self.precision} | values | self.values
        return common.trial_config(self.device, values.pop("backbone", backbone), **values)

    def data(self, config: TrialConfig) -> LineSet:
        return common.decoded(self.root, self.work / "cache", config.line_height)


def nvidia_smi(*words: str) -> list[str]:
    """Ask nvidia-smi; nothing where it does not answer."""
    command = ["nvidia-smi", "--format=csv,noheader,nounits", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if done.returncode == 0]


class Asked:
    """A child process that calls a function, while this process goes on."""

    def __init__(self, function: Callable[[Any], Any], argument: Any) -> None:
        self._question = Question("benchmarks.gpu_checks:answer", (function, argument))

    def answer(self, seconds: float = 60.0) -> Any:
        """Give what it returns. Raises RuntimeError where it fails, dies or takes longer."""
        kind, content = self._question.answer(seconds)
        if kind == "failed":
            raise RuntimeError(content["cause"])
        return content["answer"]

    def give_up(self) -> None:
        """End the process."""
        self._question.answer(0.0)


def asked(function: Callable[[Any], Any], argument: Any, seconds: float = 60.0) -> Any:
    """Call a function in a child process; see `Asked.answer`."""
    return Asked(function, argument).answer(seconds)


def answer(connection: Connection, call: tuple[Callable[[Any], Any], Any]) -> None:
    """Call a function and send what it returns, or why it fails. Runs in the child."""
    obey_in_thread(connection, lambda order: None)
    function, argument = call
    if gpus := getattr(argument, "gpus", ()):  # not one that was left out
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    try:
        message: Message = ("answer", {"answer": function(argument)})
    except Exception as error:
        traceback.print_exc()
        message = ("failed", {"cause": one_line(f"{type(error).__name__}: {error}")})
    connection.send(message)
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(0)  # as in a trial: a group's end may wait for ranks that are gone


def difference(found: Tensor, wanted: Tensor) -> float:
    """Give the largest difference as a share of the largest value."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def without_tf32(is_without: bool = True) -> None:
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        backend.allow_tf32 = not is_without


# ------------------------------------------------------------------------------------------ setup


def setup(setting: Setting) -> Found:
    """Let a process for each GPU compute: a convolution against the CPU, and a copy to it."""
    entries = setting.gpus or (None,)
    gpus = [asked(compute, (entry, setting.precision)) for entry in entries]
    query = "--query-gpu=name,driver_version,compute_mode,mig.mode.current"
    value = {
        "gpus": gpus,
        "nvidia_smi": nvidia_smi(query),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "cores": len(os.sched_getaffinity(0)),
        "shared_memory_mib": shutil.disk_usage(SHARED_MEMORY).free // 2**20,
    }
    passes = all(gpu["error"] <= BFLOAT16 and gpu["copied"] for gpu in gpus)
    return Found(passes, value, BFLOAT16)


def compute(argument: tuple[str | None, str]) -> dict[str, Any]:
    """Tell what one GPU is and computes. Runs in a process of its own."""
    entry, precision = argument
    place = torch.device(open_device(entry))
    images, weights = torch.randn(4, 16, 32, 64), torch.randn(16, 16, 3, 3)
    wanted = torch.nn.functional.conv2d(images, weights)
    own = (tensor.to(place, getattr(torch, precision)) for tensor in (images, weights))
    error = difference(torch.nn.functional.conv2d(*own), wanted)
    sent = torch.randn(1000)
    if place.type == "cpu":
        return {"error": error, "copied": True}
    back = sent.pin_memory().to(place, non_blocking=True).cpu()
    free, total = torch.cuda.mem_get_info(place)
    return {
        "error": error,
        "copied": torch.equal(sent, back),
        "name": torch.cuda.get_device_name(place),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(place))),
        "cudnn": torch.backends.cudnn.version(),
        "free_gib": round(free / 2**30, 1),
        "total_gib": round(total / 2**30, 1),
    }


# ---------------------------------------------------------------------------------------- numbers


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
    without_tf32(name == "float32")
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
    share, most, are_equal = 1.0, 0.0, True
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
                # A GPU divides by a number by its reciprocal: the last bit may differ.
                grey = [(images * INK_DEVIATION).round() for images in made]
                are_equal = are_equal and torch.equal(*grey)
            apart = (made[0] - made[1]).abs()
            share = min(share, float((apart <= 1e-4).double().mean()))
            most = max(most, float(apart.max()))
    value = {"crops_equal": are_equal, "share_within_1e-4": share, "most_apart": most}
    # The last bit of a map moves 0.03 % of the pixels by more than 1e-4, by 2e-4 at most (a CPU).
    passes = are_equal and share >= 0.999 and most <= 5e-3
    return Found(passes, value, {"share_within_1e-4": 0.999, "most_apart": 5e-3})


def twenty_steps(setting: Setting) -> Found:
    """Compare how far weights come apart with what another number of threads does on the CPU.

    With small batches: one thread of a CPU takes a minute for those of a GPU's trial.
    """
    small: dict[str, Any] = {"batch_size": 8, "crop_width": 256, "precision": "float32"}
    config = setting.config("resnet_thin", dropout=0.0, **small)
    without_tf32()
    one, two = (weights_after(setting, config, CPU, threads) for threads in (1, 2))
    there = weights_after(setting, config, setting.place, 1)
    threads, device = difference(two, one), difference(there, one)
    if not threads and device:
        return Found(None, {"device": device, "threads": 0.0}, "two threads compute as one does")
    ratio = device / max(threads, 1e-30)
    return Found(ratio <= 20, {"device": device, "threads": threads, "ratio": ratio}, 20)


def weights_after(
    setting: Setting, config: TrialConfig, place: torch.device, threads: int
) -> Tensor:
    """Train some steps; give all weights in a row."""
    torch.set_num_threads(threads)
    state, lines, steps = ready(setting, config, place)
    train_epoch(state, config, lines, min(steps, setting.steps), lambda progress: None)
    return weights_of(state.model)


def weights_of(model: torch.nn.Module) -> Tensor:
    """Give all weights in a row, on the host."""
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


# ------------------------------------------------------------------------------------------ speed


def ready(
    setting: Setting, config: TrialConfig, place: torch.device, is_on_host: bool = False
) -> tuple[TrainingState, Lines, int]:
    """Make what an epoch needs, and count its steps."""
    data = setting.data(config)
    strip = torch.from_numpy(data.strip) if is_on_host else strip_on(data, place)
    lines = Lines.of(data, "train", strip, place)
    state = TrainingState.start(config, len(data.writers), place)
    return state, lines, steps_per_epoch(config, len(lines))


def epochs_of(
    setting: Setting, config: TrialConfig, is_on_host: bool = False
) -> tuple[Callable[[], None], TrainingState, int]:
    """Give a function that trains one more epoch, what it trains, and the steps of an epoch."""
    state, lines, steps = ready(setting, config, setting.place, is_on_host)

    def epoch() -> None:
        train_epoch(state, config, lines, steps, lambda progress: None)
        state.epoch += 1

    return epoch, state, steps


def a_batch(setting: Setting, config: TrialConfig) -> tuple[Tensor, Tensor]:
    """Make a batch that is on the device."""
    shape = (config.batch_size, 1, config.line_height, config.crop_width)
    labels = torch.zeros(config.batch_size, dtype=torch.long, device=setting.place)
    return torch.randn(shape, device=setting.place), labels


def quotient(setting: Setting, one: Callable[[], object], other: Callable[[], object]) -> float:
    """Divide the time of a call by that of another one, measured in alternation."""
    wall, _ = common.alternate({"one": one, "other": other}, ROUNDS, setting.device)
    return common.ratio(wall["one"], wall["other"])


def seconds(setting: Setting, work: Callable[[], object]) -> float:
    wall, _ = common.alternate({"it": work}, ROUNDS, setting.device)
    return sorted(wall["it"])[ROUNDS // 2]


def epoch_over_ceiling(setting: Setting) -> Found:
    """Compare an epoch with its steps alone, on one batch that is there."""
    value = {}
    for backbone in ("resnet_thin", "resnet18"):
        config = setting.config(backbone)
        epoch, state, steps = epochs_of(setting, config)
        images, labels = a_batch(setting, config)

        def ceiling(own: Any = (state, config, images, labels), steps: int = steps) -> None:
            for _ in range(steps):
                training_step(*own)

        value[backbone] = quotient(setting, ceiling, epoch)
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


def cost_of_a_step(setting: Setting, config: TrialConfig) -> tuple[float, float]:
    """Count the operations and bytes of a step, from steps with few images on the CPU."""
    flops, traffic = [], []
    for number in (2, 4):
        few = replace(config, batch_size=number)
        state, _, _ = ready(setting, few, CPU)
        images = torch.randn(number, 1, config.line_height, config.crop_width)
        with FlopCounterMode(display=False) as counter, Traffic() as mode:
            training_step(state, few, images, torch.zeros(number, dtype=torch.long))
        flops.append(counter.get_total_flops())
        traffic.append(mode.bytes)
    # Part of the traffic is the weights', of which a step has as much with any number of images.
    per_image = (traffic[1] - traffic[0]) / 2
    return config.batch_size * flops[0] / 2, traffic[0] + (config.batch_size - 2) * per_image


def roofline(setting: Setting) -> Found:
    """Compare the images a second with what multiplications and memory would allow.

    Also tells how much longer a step takes than one whose model is a CUDA graph.
    """
    config = setting.config()
    flops, traffic = cost_of_a_step(setting, config)
    size = 8192 if setting.device == "cuda" else 256
    kind = getattr(torch, config.precision)
    matrix = torch.randn(size, size, device=setting.place).to(kind)
    rate = 2 * size**3 / seconds(setting, lambda: matrix @ matrix)
    copied = 2 * matrix.nbytes / seconds(setting, lambda: matrix.clone())
    state, _, _ = ready(setting, config, setting.place)
    state.model.train()
    images, labels = a_batch(setting, config)

    def step() -> None:
        training_step(state, config, images, labels)

    took = seconds(setting, step)
    share = max(flops / rate, traffic / copied) / took
    value = {"share": share, "images_per_second": config.batch_size / took}
    value |= graph_gain(setting, config, step, images, labels)
    return Found(share >= 0.35, value, 0.35)


def graph_gain(
    setting: Setting, config: TrialConfig, step: Callable[[], None], images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Divide the time of a step by that of a step with a graphed model; of no consequence yet."""
    if setting.device != "cuda":
        return {"eager_over_graphed": None}
    state, _, _ = ready(setting, config, setting.place)
    state.model.train()
    try:
        graph(state, config, images)
    except RuntimeError as error:
        return {"eager_over_graphed": None, "no_graph": one_line(error, 200)}
    gain = quotient(setting, step, lambda: training_step(state, config, images, labels))
    return {"eager_over_graphed": gain}


def graph(state: TrainingState, config: TrialConfig, images: Tensor) -> None:
    """Let forward and backward pass be CUDA graphs, for images of this shape."""
    images = images.contiguous(memory_format=torch.channels_last)
    is_mixed = config.precision == "bfloat16"
    # A cache of casts would be part of the graph: weights of its first day.
    with torch.autocast(images.device.type, torch.bfloat16, is_mixed, cache_enabled=False):
        state.replicated = torch.cuda.make_graphed_callables(state.model, (images,))


@contextmanager
def synchronisations(device: str, noted: list[str]) -> Iterator[None]:
    """Note where in the program the host waits for the device, each time that it does."""

    def note(message: Any, category: Any, filename: str, line: int, *more: Any) -> None:
        if "synchronizing" in str(message):
            noted.append(f"{Path(filename).name}:{line}")

    if device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", note):
            warnings.simplefilter("always")
            yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def host_syncs(setting: Setting) -> Found:
    """Count how often the host waits for the device: in a step, and in an epoch with its losses."""
    config = setting.config()
    state, lines, steps = ready(setting, config, setting.place)
    train_epoch(state, config, lines, steps, lambda progress: None)
    state.epoch += 1
    noted: list[str] = []
    before: list[int] = []  # each step
    with synchronisations(setting.device, noted):
        train_epoch(state, config, lines, steps, lambda progress: before.append(len(noted)))
    in_steps = [later - sooner for sooner, later in pairwise(before)]
    a_step = max(without_loss_check(in_steps, steps), default=0)
    value = {"a_step": a_step, "an_epoch": len(noted), "steps": steps, "where": sorted({*noted})}
    return Found(a_step == 0 and len(noted) <= 10, value, {"a_step": 0, "an_epoch": 10})


def without_loss_check(counts: Sequence[int], first: int) -> list[int]:
    """Give the counts of those steps after which the loss is not read."""
    return [n for step, n in enumerate(counts, first + 1) if step % CHECK_LOSS_STEPS]


def host_strip(setting: Setting) -> Found:
    """Compare epochs with crops cut on the host with those where the strip is on the device."""
    config = setting.config()
    there, here = (epochs_of(setting, config, is_on_host)[0] for is_on_host in (False, True))
    value = quotient(setting, there, here)
    return Found(value >= 0.9, value, 0.9)
