"""Tells what an error says of a device: no memory left, or that it has failed."""

from __future__ import annotations

import re

import torch

# In the words of the caching allocator, the CUDA driver, cuBLAS and cuDNN, and of the host.
NO_MEMORY = re.compile(
    r"out of memory|ALLOC_FAILED|ALLOCATION_FAILED|can't allocate memory"
    r"|Unable to find a valid cuDNN algorithm"
)
# What they say where they get no memory for themselves, and also for other reasons: a type of
# numbers that the GPU does not have, a GPU that has failed.
PERHAPS_NO_MEMORY = re.compile(
    r"(CUBLAS|CUDNN)_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR)|unable to find an engine"
)
LITTLE = 0.1  # of a GPU's memory


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a device, or a host, that has no memory left for this batch."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError) or has_failed():
        return False
    if NO_MEMORY.search(str(error)):
        return True
    return PERHAPS_NO_MEMORY.search(str(error)) is not None and free_share() < LITTLE


def is_device_fault(error: BaseException) -> bool:
    """Tell a device that failed (its memory, its link, a kernel) while it computed.

    An index out of range in a kernel looks the same: only another device can tell whose fault it
    is. What cuDNN, cuBLAS and NCCL say of it are plain RuntimeErrors, of any kind.
    """
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or has_failed()


def has_failed() -> bool:
    """Ask the GPU in use: after a fault it gives the same error to each call. Waits for nothing."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.current_stream().query()
    except RuntimeError as error:
        return NO_MEMORY.search(str(error)) is None
    return False


def free_share() -> float:
    """Give the share of the memory of the GPU in use that is free; 0 where nobody can tell."""
    try:
        free, total = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError):  # the latter from a torch without CUDA
        return 0.0
    return free / total
