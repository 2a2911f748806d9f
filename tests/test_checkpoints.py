"""Checkpoints are written behind the training: when, what is in them, what fails."""

from __future__ import annotations

import json
import os
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import assert_same_weights

import train as train_module
from data import LineSet
from train import train
from writer_search.config import TrialConfig
from writer_search.results.rows import read_history
from writer_search.training import checkpoints
from writer_search.training.checkpoints import BEST, LATEST, Checkpoints, SaveTimes, load_checked
from writer_search.training.copies import TensorCopies, unpacked
from writer_search.training.metrics import Metrics
from writer_search.training.outcomes import Pruned, Stopped

CPU = torch.device("cpu")


class Killed(BaseException):
    """Ends a training where it stands, as SIGKILL does."""


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keeps latest_checkpoint.pth from being written until it is set."""
    gate = threading.Event()
    real = checkpoints.write_tensors

    def write_tensors(path: Path, *more: Any) -> None:
        if path.name == LATEST:
            assert gate.wait(60)
        real(path, *more)

    monkeypatch.setattr(checkpoints, "write_tensors", write_tensors)
    return gate


def save_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let trials save their state after so many steps, and at no other time."""

    def is_due(files: Checkpoints, epoch: int, step: int) -> bool:
        return step in steps and (epoch, step) != files._saved

    monkeypatch.setattr(Checkpoints, "is_due", is_due)


# ------------------------------------------------------------------------------------------- when


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def grown(self, times: SaveTimes) -> SaveTimes:
        """Let a training's first minute pass, in which twice as much is saved."""
        self.now += 60.0
        times.is_due()
        return times

    def first_due(self, times: SaveTimes, batch: float) -> float:
        """Give the seconds after which a state is saved, with batches that take so long."""
        times.begin()
        started = self.now
        while True:
            self.now += batch
            if times.is_due():
                return self.now - started


@pytest.mark.parametrize(
    ("cost", "interval"), [(0.0, 1.0), (0.005, 1.0), (0.05, 5.0), (0.3, 30.0), (4.0, 60.0)]
)
def test_a_state_is_saved_at_a_hundredth_of_the_time_once_a_minute_at_least(
    cost: float, interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    assert clock.first_due(clock.grown(SaveTimes(cost)), 0.01) == pytest.approx(interval, abs=0.03)
    times = clock.grown(SaveTimes(50.0))
    times.end(cost, 0.0)
    times.end(cost, 0.0)
    assert clock.first_due(times, 0.01) == pytest.approx(interval, abs=0.03), "as measured"
    times.end(50.0, 0.0)
    assert clock.first_due(times, 0.01) == pytest.approx(interval, abs=0.03), "one alone is chance"


def test_twice_as_much_is_saved_in_the_first_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = SaveTimes(0.1)
    intervals = [clock.first_due(times, 0.01) for _ in range(14)]
    assert intervals[:11] == pytest.approx([5.0] * 11, abs=0.03)
    assert intervals[12:] == pytest.approx([10.0, 10.0], abs=0.03)
    assert clock.first_due(SaveTimes(0.005), 0.01) == pytest.approx(1.0, abs=0.03), "a second"


def test_a_minute_holds_with_slow_batches_and_slow_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses what was done since the last state that had reached the disk was copied."""
    clock = Clock(monkeypatch)
    times = SaveTimes(4.0)
    assert clock.first_due(times, 26.0) == 52.0, "one batch more would have been 78 s"
    times.end(4.0, 20.0)
    assert clock.first_due(times, 1.0) == 39.0, "20 s until it is on the disk, a batch of 1 s"
    assert clock.first_due(times, 90.0) == 90.0, "no batch is divided"


def test_what_a_save_costs_is_measured(
    data: LineSet, config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that training waits for the copy, and how far what the thread computes slows it."""

    def contents() -> dict[str, Any]:
        time.sleep(0.2)
        return {"average": {}, "history": [], "epoch": 0, "step": 1, "best": None}

    def write_tensors(*_: Any) -> None:
        time.sleep(0.3)  # the disk: it costs the training nothing
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass

    monkeypatch.setattr(checkpoints, "write_tensors", write_tensors)
    with Checkpoints(tmp_path, config, data) as files:
        files.save(contents, at_once=True)
    slowdown = 0.1 * checkpoints.SLOWDOWN
    assert 0.2 + slowdown <= files.times._costs[-1] < 0.35 + 1.5 * slowdown
    assert files.times._took >= 0.6


def test_short_trial_saves_no_state_and_a_stop_saves_at_once(
    data: LineSet, config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of hundredths of a second: each state would cost more than an epoch."""
    written: list[str] = []
    real = checkpoints.write_tensors

    def write_tensors(path: Path, *more: Any) -> None:
        written.append(path.name)
        real(path, *more)

    monkeypatch.setattr(checkpoints, "write_tensors", write_tensors)
    monkeypatch.setattr(checkpoints, "LEAST_SECONDS", 60.0)  # this machine may be busy
    train(config, data, tmp_path / "whole")
    assert LATEST not in written
    assert written.count(BEST) == 1, "the best of all epochs"
    for outcome in (Pruned, Stopped):

        def report(epoch: int, row: dict[str, Any], outcome: type[Exception] = outcome) -> None:
            raise outcome

        directory = tmp_path / outcome.__name__
        with pytest.raises(outcome):
            train(config, data, directory, report)
        assert torch.load(directory / LATEST, weights_only=True)["epoch"] == 1
        assert torch.load(directory / BEST, weights_only=True)["epoch"] == 1
        assert len((directory / "history.jsonl").read_text().splitlines()) == 1


# ------------------------------------------------------------------------------------------- what


def test_training_goes_on_while_the_disk_is_slow_and_changes_nothing_that_is_written(
    data: LineSet,
    config: TrialConfig,
    tmp_path: Path,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A state of the first epoch reaches the disk when the second is half done; all is equal."""
    written: list[dict[str, Any]] = []
    steps = train_module.steps_per_epoch(config, len(data.select("train")))
    save_at(monkeypatch, steps - 1)

    def check(now: float) -> None:
        latest = tmp_path / "slow" / LATEST
        if 1 < now < 2 and not gate.is_set():
            assert not latest.exists()
            gate.set()
        elif now == 2.0:  # validation of the second epoch
            patience = time.monotonic() + 60
            while not latest.exists() and time.monotonic() < patience:
                time.sleep(0.01)
            written.append(torch.load(latest, weights_only=True))

    train(config, data, tmp_path / "slow", check=check)
    assert (written[0]["epoch"], written[0]["step"]) == (0, steps - 1)
    save_at(monkeypatch)
    with pytest.raises(Stopped):
        train(config, data, tmp_path / "stopped", check=stop_at((steps - 1) / steps))
    at_once = torch.load(tmp_path / "stopped" / LATEST, weights_only=True)
    for part in ("model", "average"):
        for name, tensor in at_once[part].items():
            assert torch.equal(written[0][part][name], tensor), name
    for number, state in at_once["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(written[0]["optimizer"]["state"][number][name], tensor)


def stop_at(progress: float) -> Any:
    def check(now: float) -> None:
        if now >= progress:
            raise Stopped

    return check


def test_killed_after_any_saved_state_a_trial_comes_to_the_same_result(
    data: LineSet, config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within an epoch: SIGKILL some batches after the state was saved, and go on."""
    monkeypatch.setattr(train_module, "AVERAGE_STEPS", 2)
    config = replace(config, batch_size=4, epochs=3, patience=3, dropout=0.3, mixup_alpha=0.2)
    whole = train(config, data, tmp_path / "whole")
    steps = train_module.steps_per_epoch(config, len(data.select("train")))
    for saved in range(1, 3 * steps + 1):
        save_at(monkeypatch, saved)

        def check(progress: float, saved: int = saved) -> None:
            if progress >= (saved + 2) / steps:
                raise Killed

        directory, trained = tmp_path / f"killed_{saved}", []
        if saved + 2 < 3 * steps:
            with pytest.raises(Killed):
                train(config, data, directory, check=check)
        else:
            with pytest.raises(Stopped):
                train(config, data, directory, check=stop_at(saved / steps))
        assert torch.load(directory / LATEST, weights_only=True)["step"] == saved
        metrics = train(
            *(config, data, directory),
            check=trained.append,
            continue_from=directory,
        )
        assert metrics == whole
        assert min(trained) * steps >= saved, "what was saved is not trained again"
        assert_same_weights(directory / "final_model.pth", tmp_path / "whole" / "final_model.pth")
        rows = read_history(directory)
        assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_an_epoch_s_seconds_are_those_of_all_its_parts(
    data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    config = replace(config, epochs=1)

    def check(progress: float) -> None:
        time.sleep(0.3)
        if progress > 0.5:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, data, tmp_path, check=check)
    train(config, data, tmp_path, continue_from=tmp_path)
    (row,) = read_history(tmp_path)
    assert row["seconds"] >= 0.6
    images = config.batch_size * train_module.steps_per_epoch(config, len(data.select("train")))
    assert row["images_per_second"] == pytest.approx(images / row["seconds"], rel=0.01)


def test_an_epoch_before_a_stop_is_not_the_next_one_s_time(
    data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    def report(epoch: int, metrics: dict[str, Any]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(config, data, tmp_path, report, lambda progress: time.sleep(0.3))
    train(config, data, tmp_path, continue_from=tmp_path)
    first, second, *_ = (row["seconds"] for row in read_history(tmp_path))
    assert second < first / 2


@pytest.mark.parametrize("k", range(14))
def test_best_model_is_the_checkpoint_s_wherever_a_kill_comes(
    k: int,
    data: LineSet,
    config: TrialConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_each_batch: None,
) -> None:
    """Where what is trained again comes out differently, as on a GPU, and is never as good."""
    config = replace(config, epochs=4, patience=4)
    values: Iterator[float] = iter([0.4, 0.5, 0.6, 0.3])

    def scripted(*_: Any, **__: Any) -> Metrics:
        return Metrics(next(values), None, 0.0, 0.0, 1.0, {}, np.zeros((0, 3), np.int32))

    monkeypatch.setattr(train_module, "evaluate", scripted)
    real, moved = os.replace, iter(range(1000))

    def dying(source: Any, target: Any) -> None:
        if str(target).endswith(".pth") and next(moved) == k:
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            train(config, data, tmp_path / "killed")
    values = iter([0.2, 0.2, 0.2, 0.2])
    for directory in (tmp_path / "other", tmp_path / "killed"):
        go_on = tmp_path / "killed" if (tmp_path / "killed" / LATEST).exists() else None
        with pytest.raises(Stopped):
            train(config, data, directory, check=stop_at(0.0), continue_from=go_on)
        values = iter([0.2, 0.2, 0.2, 0.2])
        train(config, data, directory, continue_from=directory)
        best = json.loads((directory / "metrics.json").read_text())["best"]
        model = torch.load(directory / BEST, weights_only=True)
        assert model["epoch"] == best["epoch"]
        assert model["metrics"]["macro_top1"] == best["macro_top1"]
        assert sorted(path.name for path in directory.glob("*.pth")) == [BEST, "final_model.pth"]


def test_copies_are_apart_and_their_memory_is_used_again() -> None:
    copies = TensorCopies(CPU, on_host=True)
    rows = [{"epoch": 1}]
    weight = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    with torch.inference_mode():  # as in a validation
        first = copies.take({"model": {"weight": weight}, "history": rows, "step": 3})
    copied = first["model"]["weight"]
    weight += 1
    assert torch.equal(copied + 1, weight)
    assert copied.stride() == weight.stride()
    assert first["history"] is rows, "plain values are not copied"
    second = copies.take({"model": {"weight": weight}})
    assert second["model"]["weight"] is copied
    assert torch.equal(copied, weight)
    third = copies.take({"model": {"weight": weight}, "pairs": torch.ones(3, dtype=torch.int32)})
    assert third["model"]["weight"].data_ptr() == copied.data_ptr(), "of other types is apart"


def test_a_state_is_packed_and_unpacked_unchanged(tmp_path: Path) -> None:
    contents = {
        "model": {
            "weight": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
            "turned": torch.arange(6.0).view(2, 3).t(),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "count": torch.tensor(7),
            "none": torch.zeros(0, 2),
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "groups": [{"betas": (0.9, 0.99)}],
        },
        "history": [],
        "best": {},
        "loss": torch.tensor(0.1, dtype=torch.float64),
    }
    copies = TensorCopies(CPU, on_host=True)
    packed = copies.packed(copies.take(contents))
    assert len(packed["memory"]) == 4, "one for each type of number"
    torch.save(packed, tmp_path / "packed.pth")
    found = unpacked(torch.load(tmp_path / "packed.pth", weights_only=True))
    assert found.keys() == contents.keys()
    assert found["history"] == []
    assert found["best"] == {}
    assert found["optimizer"]["groups"] == contents["optimizer"]["groups"]
    assert torch.equal(found["optimizer"]["state"][0]["step"], torch.tensor(3.0))
    assert found["loss"].dtype == torch.float64
    assert torch.equal(found["loss"], contents["loss"])
    for name, tensor in contents["model"].items():
        assert found["model"][name].dtype == tensor.dtype, name
        assert found["model"][name].stride() == tensor.stride(), name
        assert torch.equal(found["model"][name], tensor), name


def test_a_checkpoint_of_an_earlier_version_is_continued(
    data: LineSet, config: TrialConfig, tmp_path: Path, save_each_batch: None
) -> None:
    """It holds the tensors one by one."""
    whole = train(config, data, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, data, tmp_path / "cut", check=stop_at(0.5))
    latest = tmp_path / "cut" / LATEST
    earlier = load_checked(latest, config, data)
    assert "layout" not in earlier
    assert isinstance(earlier["model"], dict)
    torch.save(earlier, latest)
    assert train(config, data, tmp_path / "cut", continue_from=tmp_path / "cut") == whole
    assert_same_weights(*(tmp_path / name / "final_model.pth" for name in ("whole", "cut")))


# ------------------------------------------------------------------------------------- what fails


def test_a_damaged_best_model_is_not_carried_on(
    data: LineSet, config: TrialConfig, tmp_path: Path, save_each_batch: None
) -> None:
    """Numbers changed within it, which torch reads without a word."""

    def check(progress: float) -> None:
        if progress > 1.4:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, data, tmp_path / "a", check=check)
    best = tmp_path / "a" / BEST
    with zipfile.ZipFile(best) as saved:
        largest = saved.read(max(saved.infolist(), key=lambda member: member.file_size))
    content = bytearray(best.read_bytes())
    content[bytes(content).index(largest) + len(largest) // 2] ^= 0x40
    best.write_bytes(content)
    torch.load(best, weights_only=True)
    with pytest.raises(Exception, match="damaged"):
        train(config, data, tmp_path / "b", continue_from=tmp_path / "a")


@pytest.mark.parametrize("step", [1, 4])
def test_a_state_that_cannot_be_written_ends_the_trial(
    step: int,
    data: LineSet,
    config: TrialConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_each_batch: None,
) -> None:
    """What is there already stays whole."""
    real = checkpoints.write_tensors

    def write_tensors(path: Path, content: dict[str, Any], *more: Any) -> None:
        if path.name == LATEST and content["step"] == step:
            raise OSError(28, "No space left on device")
        real(path, content, *more)

    monkeypatch.setattr(checkpoints, "write_tensors", write_tensors)
    with pytest.raises(OSError, match="No space left"):
        train(config, data, tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    assert torch.load(tmp_path / LATEST, weights_only=True)["step"] == step - 1


def test_a_failed_writing_is_told_before_the_next_batch(
    data: LineSet, config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a minute later, when the next state is saved."""

    def write_tensors(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_tensors", write_tensors)
    with Checkpoints(tmp_path, config, data) as files:
        files.save(lambda: {"history": [], "epoch": 0, "step": 1, "best": None})
        files._thread.submit(int).result()  # all before it is done
        with pytest.raises(OSError, match="No space left"):
            files.is_due(0, 2)


def test_a_trial_that_is_stopped_ends_when_all_is_on_the_disk(
    data: LineSet, config: TrialConfig, tmp_path: Path, gate: threading.Event
) -> None:
    def check(progress: float) -> None:
        if progress > 1:
            threading.Timer(0.2, gate.set).start()
            raise Stopped

    with pytest.raises(Stopped):
        train(config, data, tmp_path, check=check)
    saved = torch.load(tmp_path / LATEST, weights_only=True)
    assert saved["epoch"] == 1
    assert saved["step"] > 0
    assert not list(tmp_path.glob(".*.tmp"))


def test_no_more_than_one_state_waits_for_the_disk(
    data: LineSet,
    config: TrialConfig,
    tmp_path: Path,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a disk is slow, less is saved: neither training nor memory pays for it."""
    monkeypatch.setattr(SaveTimes, "is_due", lambda times: True)
    steps = iter(range(100))

    def contents() -> dict[str, Any]:
        return {"history": [], "epoch": 0, "step": next(steps), "best": None}

    with Checkpoints(tmp_path, config, data) as files:
        assert files.is_due(0, 1)
        files.save(contents)
        assert not files.is_due(0, 2)
        stop = threading.Thread(target=lambda: files.save(contents, at_once=True))
        stop.start()
        stop.join(0.3)
        assert stop.is_alive(), "a stop waits for what is being written, and for its own state"
        gate.set()
        stop.join(60)
        assert not stop.is_alive()
        assert torch.load(tmp_path / LATEST, weights_only=True)["step"] == 1
        assert files.is_due(0, 3)
