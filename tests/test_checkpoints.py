"""Checkpoints are written behind the training: what for, what is in them, what fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data import LineSet
from train import train
from writer_search.config import TrialConfig
from writer_search.training import checkpoints
from writer_search.training.checkpoints import Checkpoints
from writer_search.training.outcomes import Stopped


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keeps latest_checkpoint.pth from being written until it is set."""
    gate = threading.Event()
    real = checkpoints.write_tensors

    def write_tensors(path: Path, content: dict[str, Any]) -> None:
        if path.name == "latest_checkpoint.pth":
            assert gate.wait(60)
        real(path, content)

    monkeypatch.setattr(checkpoints, "write_tensors", write_tensors)
    return gate


def test_training_goes_on_while_the_disk_is_slow_and_changes_nothing_that_is_written(
    data: LineSet, config: TrialConfig, tmp_path: Path, gate: threading.Event
) -> None:
    """The first epoch's state reaches the disk when the second one is half done; all is equal."""
    progress: list[float] = []
    written: list[dict[str, Any]] = []

    def check(now: float) -> None:
        progress.append(now)
        latest = tmp_path / "slow" / "latest_checkpoint.pth"
        if 1 < now < 2 and not gate.is_set():
            assert not latest.exists()
            gate.set()
        elif now == 2.0:  # validation of the second epoch
            patience = time.monotonic() + 60
            while not latest.exists() and time.monotonic() < patience:
                time.sleep(0.01)
            written.append(torch.load(latest, weights_only=True))

    train(config, data, tmp_path / "slow", check=check)
    assert written[0]["epoch"] == 1
    with pytest.raises(Stopped):
        train(config, data, tmp_path / "stopped", report=stop)
    at_once = torch.load(tmp_path / "stopped" / "latest_checkpoint.pth", weights_only=True)
    for part in ("model", "average"):
        for name, tensor in at_once[part].items():
            assert torch.equal(written[0][part][name], tensor), name
    for number, state in at_once["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(written[0]["optimizer"]["state"][number][name], tensor)


def stop(epoch: int, row: dict[str, Any]) -> None:
    raise Stopped


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_state_that_cannot_be_written_ends_the_trial(
    epoch: int,
    data: LineSet,
    config: TrialConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last one, too; and what is there already stays whole."""
    real = checkpoints.write_tensors

    def write_tensors(path: Path, content: dict[str, Any]) -> None:
        if path.name == "latest_checkpoint.pth" and content["epoch"] == epoch:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoints, "write_tensors", write_tensors)
    with pytest.raises(OSError, match="No space left"):
        train(config, data, tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    assert (tmp_path / "latest_checkpoint.pth").exists() == (epoch == 2)


def test_a_trial_that_is_stopped_ends_when_all_is_on_the_disk(
    data: LineSet, config: TrialConfig, tmp_path: Path, gate: threading.Event
) -> None:
    def check(progress: float) -> None:
        if progress > 1:
            threading.Timer(0.2, gate.set).start()
            raise Stopped

    with pytest.raises(Stopped):
        train(config, data, tmp_path, check=check)
    saved = torch.load(tmp_path / "latest_checkpoint.pth", weights_only=True)
    assert saved["epoch"] == 1
    assert saved["step"] > 0
    assert not list(tmp_path.glob(".*.tmp"))


def test_no_more_than_one_state_waits_for_the_disk(
    data: LineSet, config: TrialConfig, tmp_path: Path, gate: threading.Event
) -> None:
    """A disk slower than the epochs holds training up, not the memory."""
    contents = {"average": {}, "history": [], "epoch": 1}
    with Checkpoints(tmp_path, config, data) as writer:
        writer.save(contents)
        second = threading.Thread(target=writer.save, args=(contents,))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        gate.set()
        second.join(60)
        assert not second.is_alive()
