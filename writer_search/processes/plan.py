"""What a run of the search is to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import LineSet
from writer_search.common.cores import SharedCores
from writer_search.processes.devices import Slot
from writer_search.space import Space


@dataclass(frozen=True)
class Plan:
    """What a run of the search is to do; nothing in here but `cores` changes while it runs."""

    checkpoint_dir: Path
    data: LineSet
    space: Space
    settings: dict[str, Any]
    n_trials: int
    slots: tuple[Slot, ...]  # the GPUs of each trial that runs at once
    ranks: int  # processes that train one trial together
    threads: int  # of each process, at most
    sampler: str
    seed: int
    timeout: float | None
    stop_at: float  # before the end of a batch system's job, by time.monotonic(); or infinity
    trial_timeout: float | None
    max_consecutive_failed_trials: int
    kept_models: int | None  # so many trials keep their weights, the best; None: all
    provenance: dict[str, Any]  # for config.json
    on_event: tuple[str, ...] | None = None  # the command that is told of each trial's end
    continues: bool = False  # interrupted trials, by itself
    trains: bool = True  # false: all trials are complete already, and the machine was not asked
    cores: SharedCores | None = None  # shared with other programs; None: `threads` stand

    @property
    def epochs(self) -> int:
        return int(self.settings["epochs"])

    @property
    def patience(self) -> int:
        return int(self.settings["patience"])
