"""Several processes that train one trial together; torch.distributed does the work.

Each rank trains on its share of every batch, so that batches, their order and their augmentation
are those of one process. Rank 0 alone reports and writes files.
"""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Seconds that a rank waits for the others, in whatever they do together: longer than rank 0 may
# wait for the search's answer, while a shared storage is out of reach.
TIME_LIMIT = 480.0

# The option of torch, named anew since 2.11.
_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one trial together, seen from one of them; by default it is alone.

    All ranks have to call the same methods in the same order. A rank that waits for another one
    longer than TIME_LIMIT, or whose other one is gone, raises an error that `is_lost` tells.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int, with_neighbour: bool = False) -> slice | Tensor:
        """Choose this rank's images of a batch, in their order; shares differ by one at most.

        with_neighbour: with the image before the first one, in a circle.
        """
        if self.size == 1:
            return slice(None)
        first, end = (batch * rank // self.size for rank in (self.rank, self.rank + 1))
        return torch.arange(first - with_neighbour, end) % batch

    def largest_share(self, batch: int) -> int:
        return -(-batch // self.size)

    def shared(
        self, call: Callable[P, T], *outcomes: type[Exception], every: int = 1
    ) -> Callable[P, T]:
        """Let rank 0 alone make a call, and all ranks raise which of `outcomes` it raises there.

        `call` gives True, False or None; True is given to all.   every: the ranks meet for it at
        each so many calls only. The word goes through the CPUs: waiting for it waits for no device.
        """
        if self.size == 1:
            return call
        calls = 0
        found: Exception | None = None  # rank 0's, until the ranks meet
        answered = False

        def call_on_first(*arguments: P.args, **named: P.kwargs) -> bool:
            nonlocal calls, found, answered
            calls += 1
            if self.is_first and found is None:
                try:
                    answered |= call(*arguments, **named) is True
                except outcomes as error:
                    found = error
            if calls % every:
                return False
            raised, found = found, None
            answer, answered = answered, False
            code = torch.tensor(int(answer) if raised is None else 2 + outcomes.index(type(raised)))
            # Not a broadcast, which rank 0 would leave without knowing that the others are there.
            dist.all_reduce(code, dist.ReduceOp.MAX)
            if raised is not None:
                raise raised
            if code > 1:
                raise outcomes[int(code) - 2]
            return bool(code)

        return call_on_first  # type: ignore[return-value]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def total(self, tensor: Tensor) -> Tensor:
        """Give a tensor's sum over all ranks, and leave the tensor as it is."""
        total = tensor.clone()
        self.add_up(total)
        return total

    def of_first(self, value: T) -> T:
        """Give rank 0's value, any that can be pickled, to all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def buffers_of_first(self, model: nn.Module) -> None:
        """Give rank 0's statistics of batch norm to all ranks."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def prepared(self, model: nn.Module, device: torch.device) -> Any:
        """Let batch norm take its statistics over all ranks, where torch can: on GPUs."""
        if self.size > 1 and device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return model

    def replicated(self, model: nn.Module) -> nn.Module:
        """Give the module to train with: its gradients are the mean over the ranks."""
        if self.size == 1:
            return model
        # Statistics of batch norm are rank 0's where they count: see `buffers_of_first`.
        options: dict[str, Any] = {"gradient_as_bucket_view": True, SYNC_BUFFERS: False}
        return DistributedDataParallel(model, **options)

    def accumulating(self, replicated: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients to this rank, until a backward pass outside of this block."""
        if isinstance(replicated, DistributedDataParallel):
            return replicated.no_sync()
        return nullcontext()


ALONE = Ranks()


def join(rank: int, size: int, port: int, listener: socket.socket | None, device: str) -> Ranks:
    """Meet the other ranks of a trial at a port of this machine.

    listener: on rank 0, the socket that listens there. The search holds it before any rank is
    started, so that no other trial and nothing else on the machine can have the port.
    """
    if size == 1:
        return ALONE
    # Ranks are on one machine, whose name may lead nowhere.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=TIME_LIMIT)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1",
        port,
        size,
        is_master=rank == 0,
        timeout=limit,
        master_listen_fd=listener.detach() if listener is not None else None,
    )
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=limit,
    )
    return Ranks(rank, size)


def is_lost(error: BaseException) -> bool:
    """Tell an error that says no more than that another rank is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    # Gloo's errors have no type of their own; most name its source file.
    words = ("/gloo/", "Application timeout caused pair closure")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
