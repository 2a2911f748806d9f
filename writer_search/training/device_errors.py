"""Tells what an error says of a device: no memory left, or that it has failed."""

from __future__ import annotations

import re

import torch

# In the words of the caching allocator, the CUDA driver, cuBLAS and cuDNN, and of the host. cuDNN
# finds no engine where none of them gets its memory.
NO_MEMORY = re.compile(
    r"out of memory|ALLOC_FAILED|ALLOCATION_FAILED|can't allocate memory"
    r"|unable to find an engine|Unable to find a valid cuDNN algorithm"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a device, or a host, that has no memory left for this batch."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def is_device_fault(error: BaseException) -> bool:
    """Tell a device that failed (its memory, its link, a kernel) while it computed.

    An index out of range in a kernel looks the same: only another device can tell whose fault it
    is.
    """
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
