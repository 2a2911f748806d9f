"""`train.py --config`: the same trial bit for bit, the final model, breaks, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_train import assert_same_weights, weights_of

import hyperparameter_search
import train as train_module
from data import SPLITS, LineSet
from model import WeightsUnavailableError
from train import main
from writer_search.common.environment import training_environment
from writer_search.common.errors import UserError
from writer_search.common.signals import Interrupted, StopSignals
from writer_search.config import TrialConfig
from writer_search.train_flags import tell_before_torch
from writer_search.training import repeat as retraining
from writer_search.training.checkpoints import load_model
from writer_search.training.repeat import with_validation_lines

FIXED = ("backbone=tiny", "line_height=16", "crop_width=32", "batch_size=8", "precision=float32")


@pytest.fixture(scope="module")
def search(lines_root: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of two trials on three of the writers."""
    directory = tmp_path_factory.mktemp("search") / "c"
    argv = ["--data_root", lines_root, "--checkpoint_dir", directory, "--cache_dir", cache_dir]
    argv += ["--n_trials", "2", "--epochs", "4", "--patience", "3", "--num_writers_subset", "3"]
    argv += [word for value in FIXED for word in ("--fix", value)]
    argv += ["--weights", "none", "--device", "cpu", "--n_jobs", "2"]
    assert hyperparameter_search.main([str(word) for word in argv]) == 0
    return directory


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def again(trial: Path, lines_root: Path, output_dir: Path, *more: str) -> int:
    argv = ["--config", trial / "config.json", "--data_root", lines_root]
    return main([str(word) for word in [*argv, "--output_dir", output_dir, *more]])


def history_of(directory: Path) -> list[dict[str, Any]]:
    """Read a trial's history, without what time it took."""
    rows = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize(("split", "seed"), [("by seed 7", 7), ("given", 0)])
def test_lines_are_split_as_the_trial_had_them(
    split: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def find_lines(root: Path, writers: int | None, seed: int, left_out: Any) -> Any:
        asked.append((root, writers, seed))
        raise UserError("no more")

    monkeypatch.setattr(retraining, "find_lines", find_lines)
    original: Any = SimpleNamespace(settings={"data": {"split": split, "writers": 3}})
    wanted: Any = SimpleNamespace(data_root=tmp_path, other_data=False)
    with pytest.raises(UserError, match="no more"):
        retraining.find_data(wanted, original)
    assert asked == [(tmp_path, 3, seed)]


@pytest.mark.parametrize("number", [0, 1])
def test_repeated_trial_is_the_same_bit_for_bit(
    number: int, search: Path, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trial = search / f"trial_{number:03d}"
    before = contents(trial)
    (tmp_path / "again").mkdir()
    planted = tmp_path / "again" / ".best_model.pth.host.1.tmp"
    planted.touch()
    assert again(trial, lines_root, tmp_path / "again") == 0
    assert not planted.exists(), "a killed training had left it half-written"
    printed, problems = capfd.readouterr()
    assert problems == ""
    metrics = json.loads((trial / "metrics.json").read_text())
    had = f"{100 * metrics['value']:.2f}% at epoch {metrics['best']['epoch']}"
    assert f"Best validation macro top-1: {had}\nThe trial had {had}: the same\n" in printed
    assert history_of(tmp_path / "again") == history_of(trial)
    for name in ("best_model.pth", "final_model.pth"):
        assert_same_weights(tmp_path / "again" / name, trial / name)
    assert contents(trial) == before, "the trial is left as it was"
    record = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {"versions", "git_commit", "command", "repeats"} <= set(record)


def test_repetition_can_be_repeated_and_needs_no_second_training(
    search: Path, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trial = search / "trial_001"
    assert again(trial, lines_root, tmp_path / "a") == 0
    assert again(tmp_path / "a", lines_root, tmp_path / "b") == 0
    assert_same_weights(tmp_path / "b" / "best_model.pth", trial / "best_model.pth")
    before = contents(tmp_path / "b")
    capfd.readouterr()
    assert again(tmp_path / "a", lines_root, tmp_path / "b") == 0
    assert capfd.readouterr().out.startswith(f"{tmp_path / 'b'} has finished already")
    assert contents(tmp_path / "b") == before


@pytest.mark.parametrize("train_on", ["train", "train+val"])
def test_stopped_training_goes_on(
    train_on: str,
    search: Path,
    lines_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM after the first epoch; the same command then gives what an unbroken one gives."""
    trial, broken = search / "trial_000", tmp_path / "broken"
    whole = tmp_path / "whole"
    assert again(trial, lines_root, whole, "--train_on", train_on) == 0
    shown = retraining.duration

    def signalled(seconds: float) -> str:
        if not (broken / "asked").exists():
            (broken / "asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return shown(seconds)

    monkeypatch.setattr(retraining, "duration", signalled)
    assert again(trial, lines_root, broken, "--train_on", train_on) == 143
    assert "stopped by SIGTERM: everything is saved" in capfd.readouterr().err
    assert (broken / "latest_checkpoint.pth").exists()
    assert not (broken / "metrics.json").exists()
    assert again(trial, lines_root, broken, "--train_on", train_on) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("Going on with the configuration of ")
    assert_same_weights(broken / "final_model.pth", whole / "final_model.pth")
    assert history_of(broken) == history_of(whole)


@pytest.mark.usefixtures("save_each_batch")
def test_training_that_is_out_of_memory_goes_on_with_fewer_images(
    search: Path,
    lines_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    step = train_module.training_step

    def limited(state: Any, *arguments: Any) -> Any:
        *_, micro_batch, batch = arguments
        if state.epoch == 1 and (micro_batch or batch) > room:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return step(state, *arguments)

    monkeypatch.setattr(train_module, "training_step", limited)
    room = 4
    assert again(search / "trial_000", lines_root, tmp_path / "again") == 0
    assert "out of memory: goes on with 4 images at once\n" in capfd.readouterr().out
    assert json.loads((tmp_path / "again" / "config.json").read_text())["micro_batch"] == 4
    before = history_of(search / "trial_000")[0]
    assert history_of(tmp_path / "again")[0] == before, "no epoch is trained twice"
    room = 3
    assert again(search / "trial_000", lines_root, tmp_path / "more") == 1
    problems = capfd.readouterr().err
    assert problems == "error: the training failed: CUDA error: out of memory\n"


@pytest.mark.parametrize("has_it", [False, True])
def test_bfloat16_that_is_only_emulated_is_told(
    has_it: bool,
    config: TrialConfig,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(retraining, "emulates_bfloat16", lambda device: not has_it)
    for precision in ("float32", "bfloat16"):
        retraining.warn_of_emulation(replace(config, precision=precision), torch.device("cpu"))
    assert capfd.readouterr().err.count("only emulates") == (not has_it)


def test_final_model_trains_on_validation_lines_and_claims_nothing(
    search: Path, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trial, final = search / "trial_000", tmp_path / "final"
    best_epoch = json.loads((trial / "metrics.json").read_text())["best"]["epoch"]
    assert again(trial, lines_root, final, "--train_on", "train+val") == 0
    printed = capfd.readouterr().out
    assert "lines: 27 train, 0 val, 9 test" in printed
    assert "no honest validation value is left" in printed
    assert "val macro" not in printed
    rows = history_of(final)
    assert [row["epoch"] for row in rows] == list(range(1, best_epoch + 1))
    assert all("macro_top1" not in row for row in rows)
    assert not (final / "best_model.pth").exists()
    assert json.loads((final / "metrics.json").read_text())["value"] is None
    _, _, writers = load_model(final / "final_model.pth")
    assert len(writers) == 3
    assert any(
        not torch.equal(value, weights_of(trial / "final_model.pth")[name])
        for name, value in weights_of(final / "final_model.pth").items()
    )


@pytest.mark.parametrize(("recorded", "taken"), [(2, 2), (64, 3)])
def test_without_metrics_all_epochs_are_trained_on_the_recorded_threads(
    recorded: int,
    taken: int,
    search: Path,
    lines_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as the trial had, where there are so many cores."""
    monkeypatch.setattr(retraining, "usable_cores", lambda: 3)
    trial = tmp_path / "trial"
    trial.mkdir()
    record = json.loads((search / "trial_000" / "config.json").read_text())
    (trial / "config.json").write_text(json.dumps({**record, "threads": recorded}))
    assert again(trial, lines_root, tmp_path / "final", "--train_on", "train+val") == 0
    assert len(history_of(tmp_path / "final")) == 4, "patience needs validation"
    assert torch.get_num_threads() == taken


def test_final_model_can_be_trained_again(
    search: Path, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From its own record, which is of all lines that it was trained on and has no best epoch."""
    final, same = tmp_path / "final", tmp_path / "same"
    assert again(search / "trial_000", lines_root, final, "--train_on", "train+val") == 0
    assert again(final, lines_root, same) == 0
    assert "no honest validation value is left" in capfd.readouterr().out
    assert_same_weights(same / "final_model.pth", final / "final_model.pth")
    assert history_of(same) == history_of(final)
    assert again(final, lines_root, tmp_path / "trial", "--train_on", "train") == 0
    assert history_of(tmp_path / "trial") == history_of(search / "trial_000")


def test_validation_lines_are_added_and_test_lines_are_not(data: LineSet) -> None:
    more = with_validation_lines(data)
    counts = [len(more.select(split)) for split in SPLITS]
    assert counts == [24 + 12, 0, 12]
    assert [len(data.select(split)) for split in SPLITS] == [24, 12, 12], (
        "the original is as it was"
    )
    assert more.fingerprint != data.fingerprint


def test_other_lines_are_refused_unless_asked_for(
    search: Path, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trial, other = search / "trial_000", tmp_path / "other"
    shutil.copytree(lines_root, other)
    line = sorted((other / "train").rglob("*.png"))[0]
    line.rename(line.with_name("line_099.png"))
    assert again(trial, other, tmp_path / "out") == 2
    printed, problems = capfd.readouterr()
    assert printed == ""
    assert problems.count("\n") == 1
    assert "holds other lines than the trial had" in problems
    assert not (tmp_path / "out").exists()
    assert again(trial, other, tmp_path / "out", "--other_data") == 0
    printed, problems = capfd.readouterr()
    assert "4 writers" in printed
    assert "The trial had" not in printed
    assert problems == ""
    assert again(tmp_path / "out", other, tmp_path / "repeated") == 0, "its config.json is its own"
    capfd.readouterr()
    shutil.copy(line.with_name("line_099.png"), sorted((other / "val").rglob("*.png"))[0])
    assert again(trial, other, tmp_path / "doubtful", "--other_data") == 0
    assert "warning: 1 identical image stands in two splits" in capfd.readouterr().err
    report = json.loads((tmp_path / "doubtful" / "data_report.json").read_text())
    assert report["images_in_two_splits"] == 1


def test_directory_of_something_else_is_refused(
    search: Path, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trial = search / "trial_000"
    other, foreign = tmp_path / "other", tmp_path / "foreign"
    assert again(search / "trial_001", lines_root, other) == 0
    foreign.mkdir()
    shutil.copy(other / "final_model.pth", foreign / "latest_checkpoint.pth")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "latest_checkpoint.pth").write_bytes(b"half")
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(other / "best_model.pth", model)
    file = tmp_path / "file"
    file.touch()
    capfd.readouterr()
    for directory, problem in [
        (trial, "is a search's trial"),
        (search, "holds optuna_study.db"),
        (other, "holds another training: config_hash is"),
        (foreign, "belongs to another config_hash"),
        (damaged, "cannot be read"),
        (model, "holds best_model.pth"),
        (file, "is a file"),
    ]:
        before = contents(directory) if directory.is_dir() else {}
        assert again(trial, lines_root, directory) == 2, directory
        printed, problems = capfd.readouterr()
        assert printed == ""
        assert problem in problems
        assert problems.count("\n") == 1
        assert directory.is_file() or contents(directory) == before
    assert again(trial, lines_root, other, "--train_on", "train+val") == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("{", "is not the config.json of a trial"),
        ("[]", "is not the config.json of a trial"),
        ('{"config": {"seed": 1}}', "incomplete trial configuration"),
        ('{"config": {"seed": 1, "epochs": 2, "patience": 0, "backbone": "tiny"}}', "patience=0"),
    ],
)
def test_configuration_that_is_none_is_refused(
    content: str | None,
    problem: str,
    lines_root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert again(tmp_path, lines_root, tmp_path / "out") == 2
    problems = capfd.readouterr().err
    assert problem in problems
    assert problems.count("\n") == 1


def test_the_program_takes_the_environment_of_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it imports torch, once, and not for a prediction."""

    class Replaced(Exception):
        pass

    def execve(program: str, words: list[str], environment: dict[str, str]) -> None:
        raise Replaced(program, words, environment)

    monkeypatch.setattr(os, "execve", execve)
    for name in training_environment({}):
        monkeypatch.delenv(name, raising=False)
    training = ["--config", "nowhere.json", "--data_root", "lines", "--output_dir", "again"]
    with pytest.raises(Replaced) as replaced:
        tell_before_torch(training)
    program, words, environment = replaced.value.args
    assert (program, words) == (sys.executable, sys.orig_argv)
    assert environment == os.environ | training_environment({})
    tell_before_torch(["--predict", "a.png", "--model", "nowhere.pth"])
    for name, value in training_environment({}).items():
        monkeypatch.setenv(name, value)
    tell_before_torch(training)


def test_signal_while_a_checkpoint_is_read_blames_no_file(
    lines_root: Path,
    tmp_path: Path,
    data: LineSet,
    config: TrialConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    checkpoint = tmp_path / "latest_checkpoint.pth"
    checkpoint.write_bytes(b"good")
    monkeypatch.setattr(retraining, "load_checked", interrupted)
    with pytest.raises(Interrupted), StopSignals():
        retraining.check_checkpoint(checkpoint, config, data)


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "at_once"), [(1, None, None), (4, None, 2), (2, 2, 2), (None, 4, 4)]
)
def test_trial_of_several_gpus_is_trained_in_their_parts(
    ranks: int | None, micro_batch: int | None, at_once: int | None, search: Path, tmp_path: Path
) -> None:
    """One process has the whole batch of 8, and no more memory than one GPU of the trial had."""
    found = json.loads((search / "trial_000" / "config.json").read_text())
    found |= {"ranks": ranks, "micro_batch": micro_batch}
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert retraining.read_original(tmp_path / "config.json").micro_batch == at_once


def test_weights_that_cannot_be_had_are_no_fault_of_the_directory(
    config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(_: str) -> None:
        raise WeightsUnavailableError("no network")

    monkeypatch.setattr(retraining, "ensure_imagenet_weights", offline)
    with pytest.raises(
        UserError, match="ImageNet weights of resnet18 are not available: no network"
    ):
        retraining.fetch_weights(replace(config, backbone="resnet18", pretrained=True))
