"""One trial: its metrics, its use of every hyperparameter, its breaks and its files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn

import train as train_module
from data import LineSet, find_lines, load_lines
from model import WriterModel
from train import train, training_step
from writer_search.config import TrialConfig
from writer_search.training import batches
from writer_search.training.batches import Lines, strip_on
from writer_search.training.checkpoints import CheckpointMismatchError, load_checked, load_model
from writer_search.training.evaluation import evaluate, line_logits
from writer_search.training.metrics import Metrics, compute_metrics
from writer_search.training.optimisation import (
    AdamW,
    TensorPairs,
    build_model,
    build_optimizer,
    schedule,
    steps_per_epoch,
    update_average,
)
from writer_search.training.outcomes import DivergedError, Stopped
from writer_search.training.ranks import Ranks
from writer_search.training.state import TrainingState

CPU = torch.device("cpu")
ROOT = Path(train_module.__file__).parent


def changed(config: TrialConfig, **values: Any) -> TrialConfig:
    return dataclasses.replace(config, **values)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return loaded


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand() -> None:
    """Three writers; the third has no lines and is in no mean, but may be guessed."""
    logits = np.array([[3.0, 1, 0], [0, 1, 2], [1, 2, 0], [0, 5, 1], [4, 1, 0]])
    labels = np.array([0, 0, 1, 1, 1])
    pages = np.array([0, 0, 1, 1, 2])
    metrics = compute_metrics(logits, labels, pages, ("a", "b", "c"))
    assert metrics.per_writer == pytest.approx({"a": 1 / 2, "b": 2 / 3})
    assert metrics.macro_top1 == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics.micro_top1 == pytest.approx(3 / 5)
    # Page 0 of a: log-softmax sums favour a (3 of the first line outweigh the second line).
    assert metrics.page_macro_top1 == pytest.approx((1 + 1 / 2) / 2)
    assert metrics.macro_top5 is None
    assert metrics.confusion.tolist() == [[0, 0, 1], [0, 2, 1], [1, 0, 1], [1, 1, 2]]


def test_top5_needs_more_than_five_writers_and_counts_them() -> None:
    logits = np.arange(7.0)[None].repeat(2, 0)  # the first five guesses are 6, 5, 4, 3, 2
    labels = np.array([2, 1])
    six = compute_metrics(logits, labels, np.array([0, 1]), tuple("abcdefg"))
    assert six.macro_top5 == pytest.approx(0.5)
    five = compute_metrics(logits[:, :5], np.array([0, 1]), np.array([0, 1]), tuple("abcde"))
    assert five.macro_top5 is None


def test_macro_top1_is_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 200)
    logits = rng.normal(size=(200, 6)) + np.eye(6)[labels]
    metrics = compute_metrics(logits, labels, labels, tuple("abcdef"))
    expected = balanced_accuracy_score(labels, logits.argmax(1))
    assert metrics.macro_top1 == pytest.approx(expected)
    reference = nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert metrics.loss == pytest.approx(float(reference))


def test_writer_with_one_page_counts_like_any_other() -> None:
    logits = np.array([[1.0, 0], [1, 0], [0, 1]])
    metrics = compute_metrics(logits, np.array([0, 0, 1]), np.array([0, 1, 2]), ("a", "b"))
    assert metrics.page_macro_top1 == 1.0


def test_evaluation_refuses_output_that_is_not_finite(data: LineSet, config: TrialConfig) -> None:
    model = build_model(config, 4)
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    validation = Lines.of(data, "val", strip_on(data, CPU))
    with pytest.raises(DivergedError, match="not finite"):
        evaluate(model, config, validation, data.writers)


# --------------------------------------------------------------- every value arrives where it acts


def test_dropout_pooling_and_loss_reach_the_model(config: TrialConfig) -> None:
    model = build_model(changed(config, dropout=0.37, pooling="gem"), 4)
    assert model.dropout.p == 0.37
    assert type(model.pool).__name__ == "GeneralizedMeanPool"
    cosface = build_model(changed(config, loss="cosface", scale=20.0), 4)
    images = torch.randn(3, 1, 16, 32)
    assert cosface.eval()(images).abs().max() <= 20.0
    assert type(cosface.classifier).__name__ == "CosineClassifier"


def test_backbone_reaches_the_model(config: TrialConfig) -> None:
    tiny, thin = build_model(config, 4), build_model(changed(config, backbone="resnet_thin"), 4)
    assert sum(p.numel() for p in thin.parameters()) > 50 * sum(
        p.numel() for p in tiny.parameters()
    )


def test_rates_and_decay_reach_the_optimiser(config: TrialConfig) -> None:
    config = changed(config, learning_rate=0.003, weight_decay=0.07, backbone_lr_mult=0.25)
    model = build_model(config, 4)
    scratch = build_optimizer(config, model)
    assert {group["peak"] for group in scratch.param_groups} == {0.003}
    pretrained = build_optimizer(changed(config, pretrained=True), model)
    head = {id(p) for p in model.head_parameters()}
    for group in pretrained.param_groups:
        in_head = all(id(p) in head for p in group["params"])
        assert group["peak"] == pytest.approx(0.003 if in_head else 0.003 * 0.25)
        is_matrix = all(p.ndim > 1 for p in group["params"])
        assert group["weight_decay"] == (0.07 if is_matrix else 0.0)
    trained = [p for group in pretrained.param_groups for p in group["params"]]
    assert len(trained) == len(list(model.parameters()))


def test_the_optimiser_is_torch_s(config: TrialConfig) -> None:
    after = []
    for optimizer_class in (torch.optim.AdamW, AdamW):
        model = build_model(config, 4)
        optimizer = optimizer_class(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((2, 1, 16, 32), 1.0 + step)).square().sum().backward()
            optimizer.step()
            if step == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        after.append([*model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*after, strict=True))
    assert not any(
        torch.equal(*pair)
        for pair in zip(build_model(config, 4).parameters(), after[1], strict=True)
    )


def test_own_networks_train_without_what_takes_seconds_to_import() -> None:
    code = (
        "import sys, torch, train\n"
        "from writer_search.config import TrialConfig\n"
        "from writer_search.training.fitting import softmax_regression\n"
        "from writer_search.training.state import TrainingState\n"
        "config = TrialConfig(backbone='resnet_thin', seed=0, epochs=1, patience=1)\n"
        "state = TrainingState.start(config, 3, torch.device('cpu'))\n"
        "labels = torch.arange(2)\n"
        "train.training_step(state, config, torch.randn(2, 1, 16, 64), labels)\n"
        "state.load(state.contents())\n"
        "softmax_regression(torch.eye(3).double(), torch.arange(3), 3, 0.1)\n"
        "print(*sorted({'torchvision', 'torch._dynamo'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("", "")


def test_lines_of_another_height_are_refused(
    data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="line_height=32, and the lines' is 16"):
        train(changed(config, line_height=32), data, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2),
        ("sampler_alpha", 1.0),
        ("augment_geometry", 0.0),
        ("augment_photometry", 0.0),
        ("mixup_alpha", 0.4),
        ("crop_width", 48),
        ("batch_size", 4),
        ("learning_rate", 0.01),
        ("precision", "bfloat16"),
    ],
)
def test_value_changes_the_training(
    name: str, value: Any, data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    """Each of these acts in the loop itself: the trained weights must differ."""
    unbalanced = dataclasses.replace(data, splits=data.splits.copy())
    unbalanced.splits[data.select("train")[:3]] = 2  # sampling acts on unequal writers only
    config = changed(config, epochs=1)
    train(config, unbalanced, tmp_path / "a")
    train(changed(config, **{name: value}), unbalanced, tmp_path / "b")
    first = weights_of(tmp_path / "a" / "final_model.pth")
    second = weights_of(tmp_path / "b" / "final_model.pth")
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_line_height_is_the_cache_s(data: LineSet, config: TrialConfig) -> None:
    assert data.strip.shape[1] == config.line_height


def test_epochs_and_patience_end_a_trial(
    data: LineSet, config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.3, 0.5, 0.4, 0.5, 0.2, 0.9])

    def scripted(*_: Any, **__: Any) -> Metrics:
        return Metrics(next(values), None, 0.0, 0.0, 1.0, {}, np.zeros((0, 3), np.int32))

    monkeypatch.setattr(train_module, "evaluate", scripted)
    epochs: list[int] = []
    config = changed(config, epochs=6, patience=3)
    metrics = train(config, data, tmp_path, lambda epoch, row: epochs.append(epoch))
    assert epochs == [1, 2, 3, 4, 5]  # the best was the second; an equal value is not better
    assert metrics.macro_top1 == 0.5


def test_a_network_that_still_learns_beside_a_descriptor_is_waited_for(
    data: LineSet, config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor's value hides it at first; after a break as well."""
    values = [0.6, 0.6, 0.6, 0.6, 0.6, 0.7, 0.5, 0.6]
    alone = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]
    shown = iter(zip(values, alone, strict=True))

    def scripted(*_: Any, **__: Any) -> Metrics:
        both, network = next(shown)
        nothing = np.zeros((0, 3), np.int32)
        return Metrics(both, None, 0.0, 0.0, 1.0, {}, nothing, network_macro_top1=network)

    def stop(progress: float) -> None:
        if progress >= 3:
            raise Stopped

    monkeypatch.setattr(train_module, "evaluate", scripted)
    config = changed(config, epochs=8, patience=2, with_cohog=True)
    with pytest.raises(Stopped):
        train(config, data, tmp_path, check=stop)
    epochs: list[int] = []
    metrics = train(config, data, tmp_path, lambda n, _: epochs.append(n), continue_from=tmp_path)
    assert epochs == [1, 2, 3, 4, 5, 6, 7, 8]
    assert metrics is not None
    assert (metrics.macro_top1, metrics.network_macro_top1) == (0.7, 0.4)


def test_stop_after_the_last_epoch_is_its_end(
    data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    def report(epoch: int, row: dict[str, Any]) -> None:
        if epoch == config.epochs:
            raise Stopped

    assert train(config, data, tmp_path, report) is not None
    assert (tmp_path / "metrics.json").exists()


def test_of_equally_good_epochs_the_one_of_the_least_loss_is_kept(
    data: LineSet, config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not lengthen the training: patience counts from the first of them."""
    shown = iter([(0.5, 1.2), (0.5, 1.1), (0.4, 0.2), (0.5, 1.3), (0.9, 0.1)])
    epochs: list[int] = []

    def scripted(*_: Any, **__: Any) -> Metrics:
        value, loss = next(shown)
        return Metrics(value, None, 0.0, 0.0, loss, {}, np.zeros((0, 3), np.int32))

    monkeypatch.setattr(train_module, "evaluate", scripted)
    config = changed(config, epochs=6, patience=3)
    metrics = train(config, data, tmp_path, lambda epoch, row: epochs.append(epoch))
    assert epochs == [1, 2, 3, 4]
    assert metrics.loss == 1.1
    assert json.loads((tmp_path / "metrics.json").read_text())["best"]["epoch"] == 2


# --------------------------------------------------------------------------------------- learning


def test_loss_falls_on_one_batch(data: LineSet, config: TrialConfig) -> None:
    state = TrainingState.start(changed(config, learning_rate=0.01, dropout=0.0), 4, CPU)
    images, labels = torch.randn(8, 1, 16, 32), torch.arange(8) % 4
    losses = [float(training_step(state, config, images, labels)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_schedule_rises_then_falls_to_nothing() -> None:
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates.index(1.0) == 9  # a twentieth of the steps
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.001


def test_average_is_the_moving_average_of_weights_and_statistics(config: TrialConfig) -> None:
    model, average = (WriterModel(config, 3) for _ in range(2))
    before = {name: value.clone() for name, value in average.state_dict().items()}
    model(torch.rand(4, 1, 16, 64))
    pairs = TensorPairs.of(average, model)
    update_average(pairs, step=1, total_steps=10_000)  # decay 1 / 10 at the first step
    current = model.state_dict()
    for name, value in average.state_dict().items():
        expected = before[name] + 0.9 * (current[name] - before[name])
        if value.is_floating_point():
            torch.testing.assert_close(value, expected)
        else:
            assert value == 0, "batches are not counted"


def test_average_moves_as_far_in_one_go_as_step_by_step(config: TrialConfig) -> None:
    model = build_model(config, 4)
    averages = [build_model(changed(config, seed=1), 4) for _ in range(2)]
    slow, fast = (TensorPairs.of(average, model) for average in averages)
    for step in (6, 7, 8):
        update_average(slow, step, total_steps=10_000)
    update_average(fast, 8, total_steps=10_000, covered=3)
    for one, other in zip(slow.average, fast.average, strict=True):
        torch.testing.assert_close(one, other)


def test_no_seed_is_used_twice(
    data: LineSet, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images one an epoch, the same on all ranks; of dropout one a step and rank."""
    images: dict[int, list[int]] = {0: [], 1: []}
    dropout: list[int] = []
    training = Lines.of(data, "train", strip_on(data, CPU))
    draw = batches.EpochImages.draw
    for rank in images:

        def note(*arguments: Any, rank: int = rank) -> batches.EpochImages:
            images[rank].append(arguments[5])
            return draw(*arguments)

        monkeypatch.setattr(batches.EpochImages, "draw", note)
        monkeypatch.setattr(train_module, "seed_generator", lambda _, seed: dropout.append(seed))
        state = TrainingState.start(config, len(data.writers), CPU)
        state.ranks = Ranks(rank, 2)
        for _ in range(2):
            train_module.train_epoch(state, config, training, 3, lambda progress: None)
            state.epoch += 1
    assert images[0] == images[1]
    assert len(set(images[0])) == 2
    assert len(set(dropout)) == len(dropout) == 2 * 2 * 3


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_average_covers_each_step_once(
    steps: int, data: LineSet, config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered: list[int] = []

    def note(pairs: TensorPairs, step: int, total_steps: int, steps_covered: int) -> None:
        covered.extend(range(step - steps_covered + 1, step + 1))

    monkeypatch.setattr(train_module, "update_average", note)
    config = changed(config, batch_size=2)
    state = TrainingState.start(config, len(data.writers), CPU)
    training = Lines.of(data, "train", strip_on(data, CPU))
    for epoch in range(3):
        train_module.train_epoch(state, config, training, steps, lambda progress: None)
        state.epoch += 1
        assert covered == list(range(1, (epoch + 1) * steps + 1)), "validation sees all of them"


def test_fewer_lines_than_a_batch_make_one_step(config: TrialConfig) -> None:
    assert steps_per_epoch(config, 3) == 1
    assert steps_per_epoch(config, 17) == 2


def test_validated_and_saved_model_is_the_average(
    data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    metrics = train(config, data, tmp_path)
    model, loaded, writers = load_model(tmp_path / "best_model.pth")
    assert (loaded, writers) == (config, data.writers)
    validation = Lines.of(data, "val", strip_on(data, CPU))
    assert evaluate(model, config, validation, writers) == metrics


def test_diverged_trial_ends_at_once(data: LineSet, config: TrialConfig, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="epoch 1"):
        train(
            changed(config, epochs=50, learning_rate=1.0, weight_decay=10.0),
            poisoned(data),
            tmp_path,
        )


def poisoned(data: LineSet) -> LineSet:
    """Lines of a strip that, scaled, overflows: any training on it gives no finite loss."""
    broken = dataclasses.replace(data)
    broken.__dict__["strip"] = np.full(data.strip.shape, np.nan, np.float32)
    return broken


# --------------------------------------------------------------------------- lines on the host


def test_lines_too_large_for_the_device_stay_on_the_host(
    data: LineSet,
    config: TrialConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`cpu:0` stands for a device here: torch takes it for another one than `cpu`."""
    device = torch.device("cpu", 0)
    monkeypatch.setattr(batches, "free_memory", lambda device: data.strip.nbytes)
    sent: list[torch.Tensor] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if tensor.device != device:
            sent.append(tensor)
        return tensor.to(device)

    monkeypatch.setattr(batches, "to_device", to_device)
    train(config, data, tmp_path, device=str(device))
    assert "stay on the host" in capfd.readouterr().out
    crops = [tensor for tensor in sent if tensor.dtype == torch.uint8]
    assert {tensor.shape[1:] for tensor in crops} == {(config.crop_width, config.line_height)}
    labels = [tensor for tensor in sent if tensor.dtype == torch.int64]
    drawn = [tensor for tensor in sent if tensor.dtype == torch.float32]  # geometry, ink, noise
    assert len(crops) + len(labels) + len(drawn) == len(sent), "what is sent is small"
    assert (len(labels), len(drawn)) == (config.epochs, 3 * config.epochs)

    model, _, writers = load_model(tmp_path / "final_model.pth")
    strip = strip_on(data, device)
    at_home, far = (Lines.of(data, "val", strip, place) for place in (CPU, device))
    assert far.strip.device != far.device
    near, of_far = (line_logits(model, config, lines, len(writers)) for lines in (at_home, far))
    assert torch.equal(near, of_far)


def test_lines_that_fit_go_to_the_device(data: LineSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda device: 3 * data.strip.nbytes)
    assert strip_on(data, torch.device("meta")).device.type == "meta"
    # Two that start at once each find all of it free.
    assert strip_on(data, torch.device("meta"), sharing=2).device.type == "cpu"


# ----------------------------------------------------------------------------------------- breaks


def test_continued_trial_equals_an_unbroken_one_for_every_break(
    data: LineSet, config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at each call of `check`, go on in a new directory: bit for bit the same trial."""
    monkeypatch.setattr(train_module, "AVERAGE_STEPS", 2)  # also in the middle of an epoch
    calls: list[float] = []
    whole = train(config, data, tmp_path / "whole", check=calls.append)
    steps = steps_per_epoch(config, len(data.select("train")))
    assert len(calls) > 2 * steps
    for stop_at in range(len(calls)):
        seen: list[float] = []
        reported: dict[int, dict[str, Any]] = {}

        def check(progress: float, stop_at: int = stop_at, seen: list[float] = seen) -> None:
            if len(seen) == stop_at:
                raise Stopped
            seen.append(progress)

        def report(
            epoch: int, row: dict[str, Any], reported: dict[int, dict[str, Any]] = reported
        ) -> None:
            assert reported.setdefault(epoch, row) == row, "what is told again is the same"

        broken, continued = tmp_path / f"broken_{stop_at}", tmp_path / f"continued_{stop_at}"
        with pytest.raises(Stopped):
            train(config, data, broken, report, check)
        metrics = train(
            config,
            data,
            continued,
            report,
            seen.append,
            continue_from=broken,
        )
        assert metrics == whole
        assert_same_weights(continued / "final_model.pth", tmp_path / "whole" / "final_model.pth")
        assert_same_weights(continued / "best_model.pth", tmp_path / "whole" / "best_model.pth")
        assert list(reported) == [1, 2]
        batches = [progress for progress in seen if progress != int(progress)]
        assert len(batches) == len(set(batches)), "no batch is trained twice"


@pytest.mark.parametrize("k", range(20))
def test_crash_at_any_replace_leaves_whole_files(
    k: int,
    data: LineSet,
    config: TrialConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_each_batch: None,
) -> None:
    """Fail at the k-th `os.replace`; what is there loads, and going on gives the same result."""
    whole = train(config, data, tmp_path / "whole")
    replace, count = os.replace, iter(range(1000))

    def failing(source: Any, target: Any) -> None:
        if next(count) == k:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    directory = tmp_path / "crashed"
    try:
        train(config, data, directory)
    except OSError:
        monkeypatch.undo()
    else:
        assert k >= 18, "every replace of a trial was tried"
        return
    assert not list(directory.glob("*.tmp")), "no temporary file stays behind"
    assert not (directory / "metrics.json").exists()
    for file in directory.glob("*.pth"):
        load_checked(file, config, data)
    has_checkpoint = (directory / "latest_checkpoint.pth").exists()
    metrics = train(config, data, directory, continue_from=directory if has_checkpoint else None)
    assert metrics == whole


def test_checkpoint_of_another_configuration_or_data_is_refused(
    data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    def stop(epoch: int, row: dict[str, Any]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(config, data, tmp_path / "a", stop)
    other = changed(config, learning_rate=0.004)
    with pytest.raises(CheckpointMismatchError, match="config_hash"):
        train(other, data, tmp_path / "b", continue_from=tmp_path / "a")
    elsewhere = dataclasses.replace(data, fingerprint="0" * 16)
    with pytest.raises(CheckpointMismatchError, match="data_fingerprint"):
        train(config, elsewhere, tmp_path / "b", continue_from=tmp_path / "a")


def test_files_of_a_finished_trial(data: LineSet, config: TrialConfig, tmp_path: Path) -> None:
    metrics = train(config, data, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best_model.pth",
        "final_model.pth",
        "history.jsonl",
        "metrics.json",
        "predictions.csv",
    ]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["value"] == metrics.macro_top1
    assert written["config_hash"] == config.hash()
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [1, 2]
    assert {"train_loss", "macro_top1", "learning_rate", "seconds", "images_per_second"} <= set(
        history[0]
    )
    confusion = written["best"].pop("confusion")
    assert written["best"] in history
    assert not any("confusion" in row for row in history)
    counts = np.zeros((len(data.writers), len(data.writers)))
    for true, guessed, lines in confusion["pairs"]:
        counts[true, guessed] = lines
    assert confusion["writers"] == list(data.writers)
    assert counts.sum() == data.report["lines"]["val"]
    assert (counts.diagonal() / counts.sum(1)).mean() == pytest.approx(metrics.macro_top1)
    assert written["final"] == history[-1]
    assert set(written["best"]["per_writer"]) == set(data.writers)


# ------------------------------------------------------------------------------------- real lines


def test_real_hands_are_learned(real_lines: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Three hands in a few seconds: far beyond chance, which is 33 %."""
    data = load_lines(real_lines, find_lines(real_lines, 3, 0), 32, cache_dir)
    sizes = {"line_height": 32, "crop_width": 128, "batch_size": 16}
    config = TrialConfig(seed=0, epochs=4, patience=4, backbone="resnet_thin", **sizes)
    assert train(config, data, tmp_path).macro_top1 > 0.7
