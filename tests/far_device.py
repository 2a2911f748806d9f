"""A device that is elsewhere, made of the CPU: what mixes the two fails, as it does on a GPU.

Its tensors call their device `meta`, the one beside the CPU for which autograd has room without
such hardware, but they have numbers: each holds one of the CPU, on which all operations are done.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

FAR = torch.device("meta")
done: Counter[str] = Counter()  # operations on the device's tensors, by name
BETWEEN = ("aten::_to_copy", "aten::copy_")  # take tensors of any device
BY_INDEX = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class FarTensor(Tensor):
    """A tensor of the device; `near` has its numbers."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        far: FarTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device=FAR,
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = FarTensor(self.near.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy


class FarDevice(TorchDispatchMode):
    """Within it, tensors can be made on the device, and sent there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation on the CPU. Raises RuntimeError where its tensors are on two devices."""
    name = func._schema.name
    if name in BY_INDEX:  # indices may be on the CPU
        on_device = isinstance(args[0], FarTensor)
        if not on_device and any(isinstance(t, FarTensor) for t in tree_iter(args[1:])):
            raise RuntimeError(f"{name}: a tensor of the CPU with one of the device")
        for values in args[2:3]:
            if on_device and not isinstance(values, FarTensor) and values.dim():
                raise RuntimeError(f"{name}: values of the CPU into a tensor of the device")
    else:
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(isinstance(t, FarTensor) for t in tensors)
        near = [t for t in tensors if not isinstance(t, FarTensor)]
        # Of the CPU a single number may be read, but not changed.
        amiss = [t for t in near if t.dim() or (func._schema.is_mutable and t is args[0])]
        if on_device and amiss and name not in BETWEEN:
            raise RuntimeError(f"{name}: tensors are on the CPU and on the device")
    if name == "aten::copy_":
        on_device = isinstance(args[0], FarTensor)
    if (device := kwargs.get("device")) is not None:
        on_device = torch.device(device) == FAR
        kwargs = {**kwargs, "device": torch.device("cpu")}
    done[name] += on_device
    result = func(*tree_map(near_of, args), **tree_map(near_of, kwargs))
    if func._schema.is_mutable:
        changed = kwargs.get("out", args[0] if args else None)
        return changed if isinstance(result, Tensor) else result
    if not on_device:
        return result
    return tree_map(lambda t: FarTensor(t) if isinstance(t, Tensor) else t, result)


def near_of(value: Any) -> Any:
    return value.near if isinstance(value, FarTensor) else value
