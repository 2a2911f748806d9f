"""Optimiser, learning rate, moving average, and the seeds of all that is drawn."""

from __future__ import annotations

import inspect
import math
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from model import WriterModel
from writer_search.config import TrialConfig

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)

WARM_UP = 0.05  # share of all steps in which the learning rate rises


EMA_SHARE = 0.05  # the moving average looks back over this share of all steps


def build_model(config: TrialConfig, num_writers: int) -> WriterModel:
    """Build the configuration's model, its weights drawn from the configuration's seed."""
    torch.manual_seed(derived_seed(config.seed, 0, 0))
    return WriterModel(config, num_writers).to(memory_format=torch.channels_last)


def without_compiler(optimizer: type[Optimizer]) -> type[Optimizer]:
    """Give torch's optimiser without torch's compiler.

    Its methods import that so as not to be compiled: two seconds, for which every search would
    wait. Nothing here is compiled.
    """
    methods = {
        # One of the wrappers also turns gradients off, around `step`.
        name: torch.no_grad()(inspect.unwrap(method))
        for name, method in inspect.getmembers(optimizer, inspect.isfunction)
        if hasattr(method, "__wrapped__")
    }
    return type(optimizer.__name__, (optimizer,), methods)


AdamW = without_compiler(torch.optim.AdamW)
LBFGS = without_compiler(torch.optim.LBFGS)


def build_optimizer(config: TrialConfig, model: WriterModel) -> torch.optim.Optimizer:
    """AdamW; no weight decay on norms and biases; pretrained layers learn more slowly."""
    head = {id(p) for p in model.head_parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:  # of a descriptor beside the network
            continue
        key = (id(parameter) in head, parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    multiplier = config.backbone_lr_mult if config.pretrained else 1.0
    return AdamW(
        [
            {
                "params": parameters,
                "peak": config.learning_rate * (1.0 if in_head else multiplier),
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for (in_head, decayed), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        fused=True,  # a quarter of the time of the default on 2 CPU cores
    )


def schedule(step: int, total_steps: int) -> float:
    """Give the learning rate at a step, as a share of its peak: linear rise, cosine to 0."""
    rise = max(1, round(WARM_UP * total_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total_steps - rise)))


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


@dataclass(frozen=True)
class TensorPairs:
    """The tensors of a moving average and those of its model, in the same order.

    Listed once: going through the modules at each step took half of the average's time.
    """

    average: list[Tensor]  # weights and batch-norm statistics
    model: list[Tensor]

    @classmethod
    def of(cls, average: nn.Module, model: nn.Module) -> TensorPairs:
        tensors = (chain(module.parameters(), module.buffers()) for module in (average, model))
        # Not the batches that batch norm counts: nothing is computed from them.
        return cls(*([t for t in own if t.is_floating_point()] for own in tensors))


@torch.no_grad()
def update_average(pairs: TensorPairs, step: int, total_steps: int, covered: int = 1) -> None:
    """Move the average of weights and batch-norm statistics towards the model.

    The average looks back over EMA_SHARE of the training, and over less at its start. covered: the
    steps up to this one that it has not moved for.
    """
    horizon = max(1.0, EMA_SHARE * total_steps)
    since = range(step - covered + 1, step + 1)
    decay = math.prod(min(1 - 1 / horizon, number / (number + 9)) for number in since)
    blend = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    blend(pairs.average, pairs.model, step)


def autocast(config: TrialConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the configuration's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device computes in bfloat16 itself; others emulate it, up to 14 times slower.

    False for a CPU of which torch cannot say it.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def emulates_bfloat16(device: torch.device) -> bool:
    """Tell a device that is known to have no bfloat16 in hardware; of an ARM CPU it is not."""
    is_known = device.type == "cuda" or platform.machine() == "x86_64"
    return is_known and not has_bfloat16(device)


def for_use_on(config: TrialConfig, device: torch.device) -> TrialConfig:
    """Give the configuration to use a trained model with: float32 where bfloat16 is not native."""
    if config.precision == "float32" or has_bfloat16(device):
        return config
    return replace(config, precision="float32")


def steps_per_epoch(config: TrialConfig, num_lines: int) -> int:
    """Count the whole batches of an epoch; fewer lines than a batch make one smaller batch."""
    return max(1, num_lines // config.batch_size)


def derived_seed(*words: int) -> int:
    """Derive an independent seed of 63 bits from whole numbers."""
    return derived_seeds(words, 1)[0]


def derived_seeds(words: Sequence[int], number: int) -> list[int]:
    """Derive as many such seeds from the same words; the first ones do not depend on `number`."""
    states = np.random.SeedSequence(words).generate_state(number, np.uint64)
    return [int(state) >> 1 for state in states]


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that a device's layers draw from.

    Not by `torch.manual_seed`, which seeds those of all kinds of devices: for kinds that are not
    set up it notes its caller for later, which took 0.4 ms of each step of 55 on a CPU.
    """
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[number].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
