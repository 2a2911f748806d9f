"""The state of a trial under way. What `contents` does not give does not survive a break.

There is no state of random numbers: they are derived from the seed, the epoch and the step.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from model import WriterModel
from writer_search.config import TrialConfig
from writer_search.training.optimisation import TensorPairs, build_model, build_optimizer
from writer_search.training.ranks import ALONE, Ranks


@dataclass
class TrainingState:
    """All that changes while a trial trains."""

    model: WriterModel
    replicated: nn.Module  # the same, with its gradients averaged over the ranks
    average: WriterModel
    optimizer: torch.optim.Optimizer
    loss_sum: Tensor  # (), float64 so that it is exact in any order: of the epoch's steps so far
    step: int = 0  # steps done in all
    epoch: int = 0  # epochs done, validation included
    seconds: float = 0.0  # that this epoch had taken before a break
    best: dict[str, Any] | None = None  # the best epoch's row of the history, and its confusion
    history: list[dict[str, Any]] = field(default_factory=list)
    described: Tensor | None = None  # a descriptor's logits of the validation lines, once known
    ranks: Ranks = ALONE
    started: float = field(default_factory=time.perf_counter)  # this epoch, or its rest

    @cached_property
    def pairs(self) -> TensorPairs:
        return TensorPairs.of(self.average, self.model)

    @property
    def nbytes(self) -> int:
        """Bytes of the model, its average and the optimiser's two moments."""
        return 4 * sum(parameter.nbytes for parameter in self.model.parameters())

    def seconds_of_epoch(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    @classmethod
    def start(
        cls,
        config: TrialConfig,
        num_writers: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> TrainingState:
        model = ranks.prepared(build_model(config, num_writers).to(device), device)
        average = copy.deepcopy(model).requires_grad_(False)
        optimizer = build_optimizer(config, model)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        return cls(model, ranks.replicated(model), average, optimizer, loss_sum, ranks=ranks)

    def contents(self) -> dict[str, Any]:
        """Give all of it as tensors and plain values, for `load`."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.ranks.total(self.loss_sum),
            "step": self.step,
            "epoch": self.epoch,
            "seconds": self.seconds_of_epoch(),
            "best": self.best,
            "history": list(self.history),
        }

    def load(self, contents: dict[str, Any]) -> None:
        """Take over what `contents` gave."""
        self.model.load_state_dict(contents["model"])
        self.average.load_state_dict(contents["average"])
        self.optimizer.load_state_dict(contents["optimizer"])
        self.step, self.epoch = contents["step"], contents["epoch"]
        self.seconds = contents.get("seconds", 0.0)  # an earlier version did not note it
        self.best, self.history = contents["best"], contents["history"]
        if self.best is not None:
            self.best.setdefault("sure_from", None)  # an earlier version did not measure it
        if self.best is not None and isinstance(self.best["confusion"], dict):  # the same
            counts = torch.tensor(self.best["confusion"]["counts"], dtype=torch.int32)
            pairs = counts.nonzero()
            self.best["confusion"] = torch.cat([pairs, counts[pairs.unbind(1)][:, None]], 1)
        if self.ranks.is_first:  # it is the sum over the ranks
            self.loss_sum.copy_(contents["loss_sum"])
