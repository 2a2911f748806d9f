"""Finds out, in a child process, what the machine can do: devices, weights, precision."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import torch

from model import WeightsUnavailableError, WriterModel, ensure_imagenet_weights
from writer_search.common.errors import UserError
from writer_search.common.files import read_dict, write_json
from writer_search.common.provenance import processor
from writer_search.common.text import counted, one_line
from writer_search.config import BACKBONES, PRECISIONS, TrialConfig
from writer_search.processes.child import DeviceError, open_device
from writer_search.processes.devices import visible_entries
from writer_search.processes.messages import Gpu, MachineQuestion, Message, reply
from writer_search.space import BACKBONES_BY_TIER
from writer_search.training.optimisation import emulates_bfloat16


def answer_question(connection: Connection, question: MachineQuestion) -> None:
    """Send ("machine", …) or ("mistake", …): devices, tier, weights, precision, versions.

    Before that, ("step", …) for each step that may take long.
    """

    def find() -> Message:
        torch.set_num_threads(question.threads)
        return "machine", _describe_machine(question, lambda step: _begin(connection, step))

    reply(connection, find)


def _describe_machine(
    question: MachineQuestion, begin: Callable[[str], None] = lambda step: None
) -> dict[str, Any]:
    gpus = question.gpus
    tier = "gpu" if gpus else "cpu"
    if question.weights != "none":
        begin("looking for ImageNet weights")
    weights, weights_why = _decide_weights(question, tier)
    backbones = question.backbones
    if backbones is None:
        backbones = BACKBONES_BY_TIER[tier, weights == "imagenet"]
    measured = backbones if question.measure else ()
    without = [gpu.name for gpu in gpus if not gpu.bfloat16]
    if not gpus and emulates_bfloat16(torch.device("cpu")):
        without = [processor()]
    return {
        "gpus": [gpu.entry for gpu in gpus],
        "without_bfloat16": without,
        "device_names": [gpu.name for gpu in gpus],
        "tier": tier,
        "weights": weights,
        "weights_why": weights_why,
        "precision": _precision_on_gpus(measured, gpus)
        if gpus
        else _precision_here(measured, question, begin),
        "versions": {
            # Plain text: the search process would import torch to read a TorchVersion.
            "torch": str(torch.__version__),
            "torchvision": version("torchvision"),
            "cuda": torch.version.cuda if gpus else None,
        },
    }


def _begin(connection: Connection, step: str) -> None:
    with contextlib.suppress(OSError):
        connection.send(("step", {"step": step}))


def say_ready(connection: Connection, _: None) -> None:
    """Send ("ready", …): torch is there."""
    with contextlib.suppress(OSError):
        connection.send(("ready", {}))


def list_devices(connection: Connection, device: str) -> None:
    """Send ("devices", …) or ("mistake", …): what CUDA counts, which it may be unable to use."""
    reply(connection, lambda: ("devices", {"entries": _visible_gpus(device)}))


def name_device(connection: Connection, entry: str) -> None:
    """Send ("gpu", …) of a device that this process can compute on, or ("failed", …)."""

    def find() -> Message:
        try:
            open_device(entry)
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return "gpu", {"gpu": Gpu(entry, torch.cuda.get_device_name(0), native)}
        except DeviceError as error:
            return "failed", {"cause": error.cause}

    reply(connection, find)


def _visible_gpus(device: str) -> list[str]:
    """Give the entries of CUDA_VISIBLE_DEVICES that trials may use."""
    count = torch.cuda.device_count()
    if count == 0:
        if device != "auto":
            raise UserError(
                f"--device {device}: torch {torch.__version__} sees no CUDA device here; "
                "use --device cpu, or install torch for your CUDA driver"
            )
        return []
    entries = visible_entries(os.environ.get("CUDA_VISIBLE_DEVICES"), count)
    if ":" in device:
        number = int(device.partition(":")[2])
        if number >= len(entries):
            raise UserError(
                f"--device {device}: only {counted(len(entries), 'CUDA device')} here, from cuda:0"
            )
        return [entries[number]]
    return entries


def _decide_weights(question: MachineQuestion, tier: str) -> tuple[str, str]:
    """Decide between ImageNet weights and none, once per study; also say why."""
    if question.weights == "none" or (question.weights == "auto" and question.backbones == ()):
        return "none", ""
    backbones = question.backbones
    if backbones is None:
        backbones = BACKBONES_BY_TIER[tier, True]
    without = [name for name in backbones if not BACKBONES[name]]
    why = f"there are no ImageNet weights for {without[0]}" if without else ""
    if not backbones:
        why = "no trial of this search has a network"
    try:
        for name in [] if without else backbones:
            ensure_imagenet_weights(name)
    except WeightsUnavailableError as error:
        why = f"ImageNet weights cannot be had: {one_line(error)}"
    if not why:
        return "imagenet", ""
    if question.weights == "imagenet":
        raise UserError(
            f"--weights imagenet: {why}; fix that, or begin a "
            "search with --weights none or other backbones"
        )
    return "none", why


def _precision_on_gpus(backbones: tuple[str, ...], gpus: tuple[Gpu, ...]) -> dict[str, str]:
    """Decide each backbone's precision by what all GPUs have said."""
    return dict.fromkeys(backbones, "bfloat16" if all(gpu.bfloat16 for gpu in gpus) else "float32")


def _precision_here(
    backbones: tuple[str, ...], question: MachineQuestion, begin: Callable[[str], None]
) -> dict[str, str]:
    """Decide each backbone's precision on this CPU, once for each processor and torch."""
    here = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    here += f", {question.threads} threads"
    kept = read_dict(question.memory) if question.memory is not None else {}
    found = {name: kept.get(f"{here}, {name}") for name in backbones}
    unknown = [name for name, precision in found.items() if precision not in PRECISIONS]
    if unknown:
        begin("measuring bfloat16")
        found |= {name: _faster_precision(name) for name in unknown}
        if question.memory is not None:
            with contextlib.suppress(OSError):  # then it is measured again next time
                question.memory.parent.mkdir(parents=True, exist_ok=True)
                write_json(
                    question.memory, kept | {f"{here}, {name}": found[name] for name in unknown}
                )
    return {name: str(precision) for name, precision in found.items()}


def _faster_precision(backbone: str) -> str:
    """Measure whether a backbone trains faster in bfloat16 on this CPU.

    It ranges from twice as fast (with AVX-512 or AMX units for it) to 14 times slower (an AMD EPYC
    without them), and depends on the backbone.
    """
    # A whole network would take minutes on a CPU that only emulates bfloat16. Sizes matter: a small
    # convolution measured slower where the networks made of it were 1.6 times as fast.
    convolution = torch.nn.Conv2d(64, 64, 3, padding=1)
    if _bfloat16_time(convolution, torch.randn(8, 64, 32, 128)) > 1.2:
        return "float32"
    config = TrialConfig(seed=0, epochs=1, patience=1, backbone=backbone)
    share = _bfloat16_time(WriterModel(config, 8), torch.randn(16, 1, 64, 256))
    return "bfloat16" if share < 0.9 else "float32"


def _bfloat16_time(module: torch.nn.Module, images: torch.Tensor) -> float:
    """Measure the time in bfloat16 as a share of that in float32.

    The best of three each, after one to warm up; in turns, since others may keep the cores busy
    for a while, and what is decided here is remembered.
    """
    module = module.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    turns = [(_seconds(module, images, True), _seconds(module, images, False)) for _ in range(4)]
    return min(turn[0] for turn in turns[1:]) / min(turn[1] for turn in turns[1:])


def _seconds(module: torch.nn.Module, images: torch.Tensor, bfloat16: bool) -> float:
    """Time a forward and backward pass."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = module(images)
    output.float().sum().backward()
    return time.perf_counter() - started
